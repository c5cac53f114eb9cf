"""Data loading in Ray actors beside the training: a Ray Data pipeline, or a user's generators.

Either way an actor prepares whole batches for the steps of a `StepRange` and sends them as bytes, and the worker pulls
them in the order of its steps. The actors belong to the worker: they end with it, however it ends.
"""

import logging
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrain.data.packing import pack_batch, unpack_batch
from raytrain.data.source import GeneratorSource, RayDataSource
from raytrain.errors import TrainingError
from raytrain.registry import resolve
from raytrain.tasks.task import TASKS, Task, TaskOptions, make_task, task_options
from raytrain.training.loader import BatchLoader, GeneratorLoader, IndexedLoader, MicroBatches, StepRange, train_loader

MAX_STEPS_SENT = 64  # that are sent together; more would spare nothing
SEND_SECONDS = 0.05
QUEUED_BLOCKS = 2
HELD_BLOCKS = QUEUED_BLOCKS + 1  # that the worker may hold: the calls that wait, and the rows it is taking
DEALING = "dealing"  # the threads that answer the actors of a pipeline

PackedStep = tuple[int, str, bytes]
"""A position, and the packet of its batches; with "" for the containers, the trace of an error."""

ROW_TYPE = pa.list_(pa.struct([("position", pa.int64()), ("shape", pa.string()), ("content", pa.large_binary())]))

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoaderSpec:
    """Arguments of a data actor, as plain data.

    Attributes:
        task: options of the task.
        paths: of modules to import.
        step_range: steps to prepare.
        generation: number of actors that died before this one.
    """

    task: dict[str, Any]
    paths: list[str]
    step_range: StepRange
    generation: int

    def build_task(self) -> tuple[Task, TaskOptions]:
        """Return the task and its options, in the actor's process."""
        sys.path.extend(path for path in self.paths if path not in sys.path)
        torch.set_num_threads(1)
        factory = resolve(TASKS, self.task["name"], "task.name")
        options = task_options(factory).model_validate(self.task)
        return make_task(factory, options), options

    def pack_step(self, loader: Callable[[], BatchLoader], step: int) -> PackedStep:
        """Return the packed batches of a step, or the traceback of an error."""
        position = self.step_range.position(step)
        try:
            return position, *pack_batch(
                loader().load(position, self.step_range.local_batch, self.step_range.accumulate)
            )
        except Exception:  # in the user's code: the worker raises it when it loads this step
            return position, "", traceback.format_exc().encode()


@contextmanager
def ray_loader(
    task: Task,  # noqa: ARG001 - the actors make their own
    options: TaskOptions,
    step_range: StepRange,
    *,
    actors: int,
    cpus: float,
    restarts: int,
) -> Iterator[BatchLoader]:
    """Yield the loader of a worker on a Ray cluster whose source is not local, when its first batches are there.

    Args:
        task: to train.
        options: of the task.
        step_range: steps that the worker will load.
        actors: that prepare its batches.
        cpus: of each actor.
        restarts: of actors that die, at most.

    Raises:
        TrainingError: more of them died.
    """
    source, plain = options.source, options.model_dump(mode="json")

    def launch_reader(part: StepRange, generation: int) -> ActorHandle:
        spec = LoaderSpec(plain, list(sys.path), part, generation)
        if isinstance(source, RayDataSource):
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            remote = ray.remote(num_cpus=0, scheduling_strategy=here, concurrency_groups={DEALING: actors})
            return remote(PipelineActor).remote(spec, actors, cpus, source.prefetch_bytes)
        return ray.remote(GeneratorActor).options(num_cpus=cpus).remote(spec)

    what, count, prefetch = (
        ("actor", actors, source.prefetch) if isinstance(source, GeneratorSource) else ("pipeline", 1, QUEUED_BLOCKS)
    )
    count = min(count, step_range.steps)
    streams = [
        ActorStream(
            f"{what} {place} of task.source = {source.name!r}",
            launch_reader,
            step_range.every_nth(place, count),
            prefetch,
        )
        for place in range(count)
    ]
    try:
        yield ActorLoader(streams, restarts)
    finally:
        for stream in streams:
            stream.end()


class ActorStream:
    """An actor that prepares some of the steps, and pending calls to it.

    Args:
        name: of the actor, for messages.
        start: (steps, generation) -> an actor whose `next_rows` returns its next rows.
        step_range: steps to prepare, at least one.
        prefetch: pending calls, which bound how far the actor runs ahead.
    """

    def __init__(
        self, name: str, start: Callable[[StepRange, int], ActorHandle], step_range: StepRange, prefetch: int
    ) -> None:
        self.name = name
        self._start = start
        self._step_range = step_range
        self._prefetch = prefetch
        self._generation = 0
        self._launch()

    def _launch(self) -> None:
        self._actor = self._start(self._step_range, self._generation)
        self._calls = deque(self._actor.next_rows.remote() for _ in range(self._prefetch))

    def wait(self) -> None:
        """Wait for the first rows, or an error."""
        ray.wait([self._calls[0]])

    def next_rows(self) -> list[PackedStep]:
        """Return the next rows, at least one.

        Raises:
            RayError: the actor died.
        """
        rows: list[PackedStep] = ray.get(self._calls[0])
        if not rows:
            raise RuntimeError(f"{self.name} has nothing left, and the training takes more than it said")
        self._calls.popleft()
        self._calls.append(self._actor.next_rows.remote())
        self._step_range = self._step_range.after(rows[-1][0])
        return rows

    def end(self) -> None:
        """End the actor."""
        ray.kill(self._actor)

    def replace(self) -> None:
        """Replace an actor that died."""
        self.end()
        self._generation += 1
        self._launch()


class ActorLoader:
    """Loads batches that actors have prepared, from each of them in turn: a `BatchLoader`.

    Args:
        streams: of the actors; each of several returns one row at a time.
        restarts: of actors that die, at most.
    """

    def __init__(self, streams: Sequence[ActorStream], restarts: int) -> None:
        self._streams = deque(streams)
        self._restarts_left = restarts
        self._rows: deque[PackedStep] = deque()
        for stream in streams:
            stream.wait()

    def load(self, position: int, count: int, accumulate: int) -> MicroBatches:  # noqa: ARG002 - in the step range
        """Return the batches of the next step.

        Raises:
            TrainingError: preparing them failed.
        """
        if not self._rows:
            self._rows.extend(self._next_rows())
        found, shape, content = self._rows.popleft()
        if found != position:
            raise RuntimeError(f"the source is at position {found} and the loop at {position}")
        if not shape:
            raise TrainingError(
                f"{content.decode()}{self._streams[-1].name} failed on {self.describe(position, count)}"
            )
        batches: MicroBatches = unpack_batch((shape, content))
        return batches

    def describe(self, position: int, count: int) -> str:
        """Return the positions."""
        return f"the examples at positions {position} to {position + count - 1}"

    def _next_rows(self) -> list[PackedStep]:
        """Return the next rows of the next actor in turn."""
        stream = self._streams[0]
        self._streams.rotate(-1)
        while True:
            try:
                return stream.next_rows()
            except RayError as error:
                if self._restarts_left == 0:
                    raise TrainingError(f"{stream.name} died more often than max_failures allows: {error}") from error
                self._restarts_left -= 1
                logger.warning("%s died; starting another in its place", stream.name)
                stream.replace()


class GeneratorActor:
    """Prepares batches of a user's generator."""

    def __init__(self, spec: LoaderSpec) -> None:
        self._spec = spec
        self._step = 0

    def next_rows(self) -> list[PackedStep]:
        """Return the batches of the next step."""
        if self._step == self._spec.step_range.steps:
            return []
        self._step += 1
        return [self._spec.pack_step(lambda: self._loader, self._step - 1)]

    @cached_property
    def _loader(self) -> GeneratorLoader:
        task, options = self._spec.build_task()
        make = resolve({}, options.source.name, "task.source.name")
        step_range = self._spec.step_range
        return GeneratorLoader(
            task, options.source, make, [step_range.seed, step_range.first_position, self._spec.generation]
        )


class PipelineActor:
    """Runs a Ray Data pipeline, in a process of its own so that it does not hold up the training.

    Each actor of the pipeline asks for steps, prepares them and asks for more, so the quick ones do more of the work.
    What is dealt out and not yet taken is bounded here, and put in order here.

    Args:
        spec: what to prepare.
        actors: how many prepare it.
        cpus: processors of each.
        prefetch_bytes: how much they may prepare ahead.
    """

    def __init__(self, spec: LoaderSpec, actors: int, cpus: float, prefetch_bytes: int) -> None:
        self._step_range = spec.step_range
        self._actors = actors
        self._prefetch_bytes = prefetch_bytes
        self._step_bytes = prefetch_bytes  # of the largest step so far; as long as there is none, few are dealt out
        self._dealt = 0
        self._taken = 0
        self._room = threading.Condition()
        self._early: dict[int, PackedStep] = {}
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # so that what an actor yields is sent at once
        # A row for each actor, from here: `ray.data.range` has tasks of its own, for which no processor may be left.
        rows = ray.data.from_blocks([pa.table({"actor": [place]}) for place in range(actors)]).map_batches(
            BatchPreparer,
            fn_constructor_args=(spec, ray.get_runtime_context().current_actor),
            batch_format="pyarrow",
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
            num_cpus=cpus,
            max_restarts=0,  # the worker starts the pipeline again, counts how often, and says so
        )
        # Nothing prefetched: the iterator would keep back a row until there is another, which may wait for this one.
        self._blocks = iter(rows.iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=0))

    def next_steps(self) -> range:
        """Return the next steps to prepare, when there is room for them; none at the end."""
        with self._room:
            self._room.wait_for(lambda: self._dealt < min(self._taken + self._window(), self._step_range.steps + 1))
            steps = max(1, min(MAX_STEPS_SENT, self._window() // (2 * self._actors)))
            dealt = range(self._dealt, min(self._dealt + steps, self._step_range.steps))
            self._dealt = dealt.stop
        return dealt

    def next_rows(self) -> list[PackedStep]:
        """Return the rows of the next steps that are there, not too many; none at the end."""
        while self._step_range.position(self._taken) not in self._early:
            block = next(self._blocks, None)
            if block is None:
                return []
            (rows,) = block["rows"].to_pylist()
            self._early.update((row["position"], tuple(row.values())) for row in rows)
        ready: list[PackedStep] = []
        while len(ready) < self._most() and (
            row := self._early.pop(self._step_range.position(self._taken + len(ready)), None)
        ):
            ready.append(row)
        with self._room:
            largest = max(len(content) for _, _, content in ready)
            self._step_bytes = max(largest, self._step_bytes if self._taken else 1)
            self._taken += len(ready)
            self._room.notify_all()
        return ready

    def _window(self) -> int:
        """Return how many steps may be prepared and not yet sent: enough to keep all actors busy, however large."""
        return max(2 * self._actors, self._prefetch_bytes // self._step_bytes - HELD_BLOCKS * self._most())

    def _most(self) -> int:
        """Return how many steps may be sent together: what the worker holds takes up at most half of the room."""
        return max(1, self._prefetch_bytes // self._step_bytes // (2 * HELD_BLOCKS))


class BatchPreparer:
    """Prepares batches of the task's own examples, in an actor of Ray Data.

    Args:
        spec: what to prepare.
        pipeline: the actor that deals out the steps.
    """

    def __init__(self, spec: LoaderSpec, pipeline: ActorHandle) -> None:
        self._spec = spec
        self._pipeline = pipeline

    def __call__(self, _: pa.Table) -> Iterator[pa.Table]:
        """Yield rows for the steps that are dealt out, until there are none left."""
        while steps := ray.get(self._pipeline.next_steps.options(concurrency_group=DEALING).remote()):
            rows, began = [], time.monotonic()
            for step in steps:
                rows.append(self._spec.pack_step(lambda: self._loader, step))
                if step == steps[-1] or time.monotonic() > began + SEND_SECONDS:
                    yield pa.table({"rows": pa.array([rows], ROW_TYPE)})
                    rows, began = [], time.monotonic()

    @cached_property
    def _loader(self) -> IndexedLoader:
        task, options = self._spec.build_task()
        return train_loader(task, options, self._spec.step_range.seed)
