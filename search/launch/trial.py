"""A trial: trains segments of a training recipe in one process or a few, from a packed state to the next one."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any

import torch

from raytrain.run.checkpoint import checkpoint_errors
from raytrain.serialization import pack, unpack
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport, Transport
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
        connect: connects this worker with the others of the trial, for one segment; None: there are no others.
    """

    def __init__(
        self,
        base: TrainRecipe,
        device: torch.device,
        beat: Callable[[int], None],
        connect: Callable[[], AbstractContextManager[Transport]] | None = None,
    ) -> None:
        self._stop = Event()
        self._base = base
        self._connect = connect or (lambda: nullcontext(LocalTransport(device)))
        self._beat = beat
        self._task: tuple[object, Task] | None = None

    def train(self, work: Work, packed: bytes | None) -> SegmentEnd:
        """Train a segment; equal work and equal states give equal states, whatever this process trained before.

        Returns:
            How it ended; of several workers, that of the first one has the states of all.

        Raises:
            TrainingError: the loss or the weights are no longer numbers, or the state does not fit the recipe.
        """
        recipe = self._base.with_overrides({"seed": work.seed, **work.changes, **ONCE})
        with self._connect() as transport:
            return self._train(recipe, work, packed, ExactAverager(transport))

    def _train(self, recipe: TrainRecipe, work: Work, packed: bytes | None, averager: ExactAverager) -> SegmentEnd:
        task, replica = self._start(recipe, work, packed, averager)
        callbacks = SegmentCallbacks(recipe, task, averager, self._stop, self._beat)
        constants = non_finite_buffers(replica.module)
        segment(recipe, task, replica, work.until, callbacks)
        step, states = replica.progress.step, _states_of_all(replica, averager)
        if replica.rank > 0:
            return SegmentEnd(b"", step, callbacks.metrics)
        check_finite(states[0]["model"], constants, step)
        progress = {**progress_to_dict(replica.progress), **NO_TIMES}
        return SegmentEnd(pack({"replicas": states, "progress": progress}), step, callbacks.metrics)

    def stop(self) -> None:
        """Have a segment end after the step that it is at."""
        self._stop.set()

    def _start(
        self, recipe: TrainRecipe, work: Work, packed: bytes | None, averager: ExactAverager
    ) -> tuple[Task, Replica]:
        """Return the recipe's task, and a replica that stands where the segment begins."""
        task = self._task_of(recipe)
        beat = partial(self._beat, work.snapshot.step)
        replica = trainable(recipe, task, averager, new=packed is None, heartbeat=beat)
        if packed is not None:
            state = unpack(packed)
            with checkpoint_errors(work.snapshot.digest):
                saved, reset = state["replicas"], work.reset_optimizer
                inherit(replica, saved[0], saved[replica.rank], work.snapshot.digest, reset_optimizer=reset)
            replica.progress = replace(progress_from_dict(state["progress"], work.snapshot.digest), status="running")
        beat()
        return task, replica

    def _task_of(self, recipe: TrainRecipe) -> Task:
        """Return the recipe's task: that of the last segment, if its options are the same."""
        if self._task is None or self._task[0] != recipe.task:
            self._task = (recipe.task, build_task(recipe))
        return self._task[1]


def _states_of_all(replica: Replica, averager: ExactAverager) -> list[Any]:
    """Return the states of all replicas, on each of them."""
    state = state_of(replica)
    if replica.world_size == 1:
        return [state]
    return [unpack(part) for part in averager.all_gather_bytes(pack(state))]


class SegmentCallbacks:
    """What surrounds the loop in a segment: evaluate at its end, save nothing, stop when asked to.

    Args:
        recipe: of the segment.
        task: the recipe's.
        averager: with the trial's other replicas.
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
