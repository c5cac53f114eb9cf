"""A trial: trains segments of a training recipe in one process, from a packed state to the next one."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from threading import Event

import torch

from raytrain.run.checkpoint import checkpoint_errors
from raytrain.serialization import pack, unpack
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.tasks.task import Task
from raytrain.tensors import autocast_type
from raytrain.training.build import build_task, load_callbacks, trainable
from raytrain.training.callbacks import check_finite, non_finite_buffers
from raytrain.training.evaluation import evaluate
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import Replica, inherit, progress_from_dict, progress_to_dict, state_of
from raytrain.training.segment import segment
from search.scheduling.driver import SegmentEnd
from search.scheduling.work import Work

ONCE = {"evaluation.every": 0, "evaluation.patience": 0, "checkpoint.every": 0}
"""A segment is evaluated at its end alone, and saved by whoever asked for it."""
TIMES = ("seconds", "data_wait_seconds", "communication_seconds", "waited_seconds")
NO_TIMES = {**dict.fromkeys(TIMES, 0.0), "bytes_sent": 0}
"""Fields of a replica's progress that depend on the machine: a state is named by its bytes, which must not."""


class Trial:
    """Trains segments, one after the other; the task's data is kept from one to the next.

    Args:
        base: the recipe whose fields are searched.
        device: where to compute.
        beat: called with the step at every sign of progress.

    Attributes:
        stop: set it to have a segment end after the step that it is at.
    """

    def __init__(self, base: TrainRecipe, device: torch.device, beat: Callable[[int], None]) -> None:
        self.stop = Event()
        self._base = base
        self._averager = ExactAverager(LocalTransport(device))
        self._beat = beat
        self._task: tuple[object, Task] | None = None

    def train(self, work: Work, packed: bytes | None) -> SegmentEnd:
        """Train a segment; equal work and equal states give equal states, whatever this process trained before.

        Raises:
            TrainingError: the loss or the weights are no longer numbers, or the state does not fit the recipe.
        """
        recipe = self._base.with_overrides({"seed": work.seed, **work.changes, **ONCE})
        task, replica = self._start(recipe, work, packed)
        callbacks = SegmentCallbacks(recipe, task, self._averager, self.stop, self._beat)
        constants = non_finite_buffers(replica.module)
        segment(recipe, task, replica, work.until, callbacks)
        state, step = state_of(replica), replica.progress.step
        check_finite(state["model"], constants, step)
        progress = {**progress_to_dict(replica.progress), **NO_TIMES}
        return SegmentEnd(pack({"replica": state, "progress": progress}), step, callbacks.metrics)

    def _start(self, recipe: TrainRecipe, work: Work, packed: bytes | None) -> tuple[Task, Replica]:
        """Return the recipe's task, and a replica that stands where the segment begins."""
        task = self._task_of(recipe)
        beat = partial(self._beat, work.snapshot.step)
        replica = trainable(recipe, task, self._averager, new=packed is None, heartbeat=beat)
        if packed is not None:
            state = unpack(packed)
            with checkpoint_errors(work.snapshot.digest):
                inherit(replica, state["replica"], state["replica"], work.snapshot.digest)
            replica.progress = replace(progress_from_dict(state["progress"], work.snapshot.digest), status="running")
        beat()
        return task, replica

    def _task_of(self, recipe: TrainRecipe) -> Task:
        """Return the recipe's task: that of the last segment, if its options are the same."""
        if self._task is None or self._task[0] != recipe.task:
            self._task = (recipe.task, build_task(recipe))
        return self._task[1]


class SegmentCallbacks:
    """What surrounds the loop in a segment: evaluate at its end, save nothing, stop when asked to.

    Args:
        recipe: of the segment.
        task: the recipe's.
        averager: of the one replica.
        stop: set when the segment is to end after the step that it is at.
        beat: called with the step at every sign of progress.

    Attributes:
        metrics: those at the segment's end; empty if it was stopped.
    """

    def __init__(
        self, recipe: TrainRecipe, task: Task, averager: ExactAverager, stop: Event, beat: Callable[[int], None]
    ) -> None:
        self.metrics: Mapping[str, float] = {}
        self._measure = partial(
            evaluate,
            task,
            examples=task.data("valid"),
            batch=recipe.evaluation.batch,
            averager=averager,
            autocast=autocast_type(recipe.precision),
        )
        self._callbacks = load_callbacks(recipe)
        self._stop = stop
        self._beat = beat

    def stop_requested(self) -> bool:
        """Return whether the segment is to end after the current step."""
        return self._stop.is_set()

    def on_step(self, replica: Replica, values: dict[str, float]) -> None:  # noqa: ARG002 - scores are what counts
        """Show a sign of progress, and call the recipe's callbacks."""
        self._beat(replica.progress.step)
        for callback in self._callbacks:
            callback(replica)

    def evaluate(self, replica: Replica) -> dict[str, float]:
        """Measure the whole held-out split, with the averaged weights if there are any."""
        with replica.sync.synced_parameters(), replica.ema.average_parameters() if replica.ema else nullcontext():
            metrics = self._measure(module=replica.module, heartbeat=partial(self._beat, replica.progress.step))
        self.metrics = metrics
        return metrics

    def save(self, replica: Replica) -> None:
        """Do nothing: the state is packed when the segment has ended."""

    def save_metrics(self, replica: Replica, metrics: dict[str, float]) -> None:
        """Do nothing, likewise."""
