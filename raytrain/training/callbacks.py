"""Callbacks of the loop in a run: evaluation, logging, checkpoints and stop requests."""

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
from raytrain.run.metrics import MetricsWriter
from raytrain.serialization import find_non_finite
from raytrain.sync.averaging import Averager
from raytrain.training.loop import every_n
from raytrain.training.replica import Progress, Replica, progress_to_dict, state_of

STOP_CHECK_SECONDS = 0.5


@dataclass(kw_only=True)
class RunCallbacks:
    """`LoopCallbacks` of a run's folder.

    Attributes:
        run: the folder.
        averager: over the workers.
        store: of checkpoints.
        measure: module -> metrics on the held-out split.
        callbacks: called with the replica after every step.
        log_every: steps between rows.
        heartbeat: called at every sign of progress.
        non_finite: buffers by name that are not finite at the start, and may stay so if they do not change.
        last_checkpoint: path and metrics of the newest checkpoint of this attempt.
    """

    run: RunDirectory
    averager: Averager
    store: CheckpointStore
    measure: Callable[..., dict[str, float]]
    callbacks: Sequence[Callable[[Replica], None]]
    log_every: int
    heartbeat: Callable[[], None]
    non_finite: Mapping[str, Tensor]
    last_checkpoint: tuple[Path, Mapping[str, float]] | None = None
    _writer: MetricsWriter | None = None
    _next_stop_check: float = 0.0

    @contextmanager
    def recording(self, progress: Progress, loggers: Sequence[str]) -> Iterator[None]:
        """Record metrics inside the `with` block, on the first worker, to the folder and to loggers."""
        if self.averager.transport.rank > 0:
            yield
            return
        self._writer = MetricsWriter(self.run, progress.step, progress.evaluated, loggers)
        try:
            yield
        except BaseException:
            self._writer.close(failed=True)
            raise
        self._writer.close()

    def stop_requested(self) -> bool:
        """Check the folder for a stop request, on the first worker and not at every step."""
        now = time.monotonic()
        if self.averager.transport.rank > 0 or now < self._next_stop_check:
            return False
        self._next_stop_check = now + STOP_CHECK_SECONDS
        if not self.run.recipe.is_file():
            raise TrainingError(f"{self.run.path} was removed or emptied while the run went on")
        return self.run.stop_requested()

    def on_step(self, replica: Replica, values: dict[str, float]) -> None:
        """Call the callbacks, and log every `log_every` steps."""
        self.heartbeat()
        for callback in self.callbacks:
            callback(replica)
        if every_n(replica.progress.step, self.log_every):
            self._record(replica.progress, {**values, **replica.progress.costs()})

    def evaluate(self, replica: Replica) -> dict[str, float]:
        """Evaluate the whole held-out split, with averaged weights if there are any."""
        with replica.sync.synced_parameters(), replica.ema.average_parameters() if replica.ema else nullcontext():
            metrics = self.measure(module=replica.module)
        self._record(replica.progress, {"valid": metrics})
        return metrics

    def save(self, replica: Replica) -> None:
        """Write a checkpoint, unless weights are not finite."""
        state = state_of(replica)
        if "model" in state:
            check_finite(state["model"], self.non_finite, replica.progress.step)
        if replica.zero_order and replica.zero_order.trajectory:
            replica.zero_order.trajectory.fsync()
        self._keep_rows()
        self.last_checkpoint = (self.store.save(state, progress_to_dict(replica.progress)), {})
        self.heartbeat()

    def save_metrics(self, replica: Replica, metrics: dict[str, float]) -> None:
        """Add metrics to the checkpoint of this step."""
        self._keep_rows()
        self.last_checkpoint = (self.store.save_metrics(progress_to_dict(replica.progress), metrics), metrics)

    def _keep_rows(self) -> None:
        """Flush the rows to disk: a run that resumes from a checkpoint does not write earlier ones again."""
        if self._writer:
            self._writer.keep()

    def _record(self, progress: Progress, values: Mapping[str, object]) -> None:
        if self._writer:
            row = {"step": progress.step, "samples": progress.position, "seconds": round(progress.seconds, 3)}
            self._writer.write({**row, **values})


def non_finite_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the buffers that are not all finite, by name."""
    buffers = module.named_buffers()
    return {name: value.clone() for name, value in buffers if not torch.isfinite(value).all()}


def check_finite(model: Mapping[str, Tensor], constants: Mapping[str, Tensor], step: int) -> None:
    """Check that weights and buffers are still numbers.

    Args:
        model: the saved ones, by name.
        constants: buffers that may hold something else, as `non_finite_buffers` returns them.
        step: optimizer steps done, for the message.

    Raises:
        TrainingError: they are not.
    """
    if name := find_non_finite(model, constants):
        raise TrainingError(f"after step {step} the weights {name} are not finite; a lower optimizer.lr may help")
