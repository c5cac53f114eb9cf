"""What surrounds the loop in a run: the held-out data, the log, the checkpoints, and requests from outside."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from raytrain.errors import TrainingError
from raytrain.run.checkpoint import CheckpointStore
from raytrain.run.directory import RunDirectory
from raytrain.run.metrics import Recorder
from raytrain.serialization import find_non_finite
from raytrain.sync.averaging import Exchange
from raytrain.training.loop import due
from raytrain.training.replica import Progress, Replica, plain, state_of

STOP_CHECK_SECONDS = 0.5


@dataclass(kw_only=True)
class RunWatch:
    """The loop's `Watch` over a run's folder.

    Attributes:
        run: the folder.
        exchange: the workers.
        store: the checkpoints.
        measure: module -> its metrics on the held-out split.
        callbacks: called with the replica after every step.
        log_every: steps between rows.
        beat: called at every sign of progress.
        constants: buffers by name that are not all finite as the run finds them, and may stay so if they do not change.
        last: the newest checkpoint that was written here, and its metrics.
    """

    run: RunDirectory
    exchange: Exchange
    store: CheckpointStore
    measure: Callable[..., dict[str, float]]
    callbacks: Sequence[Callable[[Replica], None]]
    log_every: int
    beat: Callable[[], None]
    constants: Mapping[str, Tensor]
    last: tuple[Path, Mapping[str, float]] | None = None
    _recorder: Recorder | None = None
    _next_stop_check: float = 0.0

    @contextmanager
    def recording(self, progress: Progress, loggers: Sequence[str]) -> Iterator[None]:
        """Record inside the `with` block, from where the run stands, to loggers too; only the first worker does."""
        if self.exchange.transport.rank > 0:
            yield
            return
        self._recorder = Recorder(self.run, progress.step, progress.evaluated, loggers)
        try:
            yield
        except BaseException:
            self._recorder.close(failed=True)
            raise
        self._recorder.close()

    def stop_requested(self) -> bool:
        """Look for a request in the folder, on the first worker and not at every step."""
        now = time.monotonic()
        if self.exchange.transport.rank > 0 or now < self._next_stop_check:
            return False
        self._next_stop_check = now + STOP_CHECK_SECONDS
        if not self.run.recipe.is_file():
            raise TrainingError(f"{self.run.path} was removed or emptied while the run went on")
        return self.run.stop_requested()

    def stepped(self, replica: Replica, values: dict[str, float]) -> None:
        """Show a sign of progress, and log every so many steps."""
        self.beat()
        for callback in self.callbacks:
            callback(replica)
        if due(replica.progress.step, self.log_every):
            self._record(replica.progress, values)

    def evaluate(self, replica: Replica) -> dict[str, float]:
        """Measure the whole held-out split, with the averaged weights if there are any."""
        with replica.sync.shared(), replica.ema.average_parameters() if replica.ema else nullcontext():
            metrics = self.measure(module=replica.module)
        self._record(replica.progress, {"valid": metrics})
        return metrics

    def save(self, replica: Replica) -> None:
        """Write a checkpoint, unless the weights are no longer numbers."""
        state = state_of(replica)
        if "model" in state and (name := find_non_finite(state["model"], self.constants)):
            raise TrainingError(
                f"after step {replica.progress.step} the weights {name} are not finite; a lower optimizer.lr may help"
            )
        if replica.zeroth and replica.zeroth.trajectory:
            replica.zeroth.trajectory.fsync()
        self._keep_rows()
        self.last = (self.store.save(state, plain(replica.progress)), {})
        self.beat()

    def note(self, replica: Replica, metrics: dict[str, float]) -> None:
        """Add metrics to the checkpoint of this step."""
        self._keep_rows()
        self.last = (self.store.note(plain(replica.progress), metrics), metrics)

    def _keep_rows(self) -> None:
        """See to it that the rows up to here are on the disk: from a checkpoint that is, they are not written again."""
        if self._recorder:
            self._recorder.keep()

    def _record(self, progress: Progress, values: Mapping[str, object]) -> None:
        if self._recorder:
            row = {"step": progress.step, "samples": progress.position, "seconds": round(progress.seconds, 3)}
            self._recorder.write({**row, **values})


def constants_of(module: nn.Module) -> dict[str, Tensor]:
    """Return what each buffer holds, by its name, that is not all finite."""
    buffers = module.named_buffers()
    return {name: value.clone() for name, value in buffers if not torch.isfinite(value).all()}
