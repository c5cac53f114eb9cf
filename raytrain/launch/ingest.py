"""Batches that are prepared beside the training, in actors of Ray: a Ray Data pipeline, or a user's generators.

Either way an actor makes whole batches for the steps of a `Walk` and sends them as bytes, and the worker pulls them in
the order of its steps. The actors belong to the worker: they end with it, however it ends.
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
from raytrain.training.loader import Batches, Feed, Generated, Indexed, Walk, indexed

MOST_STEPS = 64  # that are sent together; more would spare nothing
SEND_SECONDS = 0.05
PULLED_BLOCKS = 2
HELD_BLOCKS = PULLED_BLOCKS + 1  # that the worker may hold: the calls that wait, and the rows it is taking
DEALING = "dealing"  # the threads that answer the actors of a pipeline

Row = tuple[int, str, bytes]
"""A position, and the packet of its batches; with "" for the containers, the trace of an error."""

ROWS = pa.list_(pa.struct([("position", pa.int64()), ("shape", pa.string()), ("content", pa.large_binary())]))

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Brief:
    """What an actor has to know, as plain data.

    Attributes:
        task: the options of the task.
        paths: where modules are imported from.
        walk: what to prepare.
        life: how many actors have died in this one's place.
    """

    task: dict[str, Any]
    paths: list[str]
    walk: Walk
    life: int

    def made(self) -> tuple[Task, TaskOptions]:
        """Return the task and its options, in the process of the actor."""
        sys.path.extend(path for path in self.paths if path not in sys.path)
        torch.set_num_threads(1)
        factory = resolve(TASKS, self.task["name"], "task.name")
        options = task_options(factory).model_validate(self.task)
        return make_task(factory, options), options

    def row(self, feed: Callable[[], Feed], step: int) -> Row:
        """Return the batches of a step of the walk, or the trace of the error that making them or the feed raised."""
        position = self.walk.position(step)
        try:
            return position, *pack_batch(feed().take(position, self.walk.count, self.walk.parts))
        except Exception:  # in the user's code: the worker that takes this row raises it, in the place of the batches
            return position, "", traceback.format_exc().encode()


@contextmanager
def ray_feed(
    task: Task,  # noqa: ARG001 - the actors make their own
    options: TaskOptions,
    walk: Walk,
    *,
    actors: int,
    cpus: float,
    lives: int,
) -> Iterator[Feed]:
    """Yield the feed of a worker on a Ray cluster whose source is not local, when its first batches are there.

    Args:
        task: what is trained.
        options: its options.
        walk: what the worker will take.
        actors: how many prepare its batches.
        cpus: processors of each.
        lives: how often an actor that dies is replaced.

    Raises:
        TrainingError: more of them died.
    """
    source, plain = options.source, options.model_dump(mode="json")

    def start(part: Walk, life: int) -> ActorHandle:
        brief = Brief(plain, list(sys.path), part, life)
        if isinstance(source, RayDataSource):
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            remote = ray.remote(num_cpus=0, scheduling_strategy=here, concurrency_groups={DEALING: actors})
            return remote(Pipeline).remote(brief, actors, cpus, source.ahead_bytes)
        return ray.remote(Generator).options(num_cpus=cpus).remote(brief)

    what, count, ahead = (
        ("actor", actors, source.ahead) if isinstance(source, GeneratorSource) else ("pipeline", 1, PULLED_BLOCKS)
    )
    count = min(count, walk.steps)
    lanes = [
        Lane(f"{what} {place} of task.source = {source.name!r}", start, walk.lane(place, count), ahead)
        for place in range(count)
    ]
    try:
        yield Pulled(lanes, lives)
    finally:
        for lane in lanes:
            lane.end()


class Lane:
    """An actor that prepares a part of a walk, and the calls that wait at it.

    Args:
        name: of the actor, for messages.
        start: (part of a walk, how many actors have died in its place) -> an actor whose `more` returns its next rows.
        walk: what to prepare, a step at least.
        ahead: how many calls wait, which bounds how far the actor runs ahead.
    """

    def __init__(self, name: str, start: Callable[[Walk, int], ActorHandle], walk: Walk, ahead: int) -> None:
        self.name = name
        self._start = start
        self._walk = walk
        self._ahead = ahead
        self._life = 0
        self._begin()

    def _begin(self) -> None:
        self._actor = self._start(self._walk, self._life)
        self._calls = deque(self._actor.more.remote() for _ in range(self._ahead))

    def wait(self) -> None:
        """Wait until the first rows are there, or an error."""
        ray.wait([self._calls[0]])

    def pull(self) -> list[Row]:
        """Return the next rows, one at least.

        Raises:
            RayError: the actor died.
        """
        rows: list[Row] = ray.get(self._calls[0])
        if not rows:
            raise RuntimeError(f"{self.name} has nothing left, and the training takes more than it said")
        self._calls.popleft()
        self._calls.append(self._actor.more.remote())
        self._walk = self._walk.after(rows[-1][0])
        return rows

    def end(self) -> None:
        """End the actor."""
        ray.kill(self._actor)

    def replace(self) -> None:
        """Start another actor in place of one that died."""
        self.end()
        self._life += 1
        self._begin()


class Pulled:
    """Batches that are pulled from actors, from each of them in turn, some time before they are needed: a `Feed`.

    Args:
        lanes: the actors; if there are several, each of them returns one row at a time.
        lives: how often one that dies is replaced.
    """

    def __init__(self, lanes: Sequence[Lane], lives: int) -> None:
        self._lanes = deque(lanes)
        self._lives = lives
        self._rows: deque[Row] = deque()
        for lane in lanes:
            lane.wait()

    def take(self, position: int, count: int, parts: int) -> Batches:  # noqa: ARG002 - it is part of the walk
        """Return the next batches.

        Raises:
            TrainingError: making them failed.
        """
        if not self._rows:
            self._rows.extend(self._pull())
        found, shape, content = self._rows.popleft()
        if found != position:
            raise RuntimeError(f"the source is at position {found} and the loop at {position}")
        if not shape:
            raise TrainingError(f"{content.decode()}{self._lanes[-1].name} failed on {self.named(position, count)}")
        batches: Batches = unpack_batch((shape, content))
        return batches

    def named(self, position: int, count: int) -> str:
        """Return the positions."""
        return f"the examples at positions {position} to {position + count - 1}"

    def _pull(self) -> list[Row]:
        """Return the next rows of the actor whose turn it is."""
        lane = self._lanes[0]
        self._lanes.rotate(-1)
        while True:
            try:
                return lane.pull()
            except RayError as error:
                if self._lives == 0:
                    raise TrainingError(f"{lane.name} died more often than max_failures allows: {error}") from error
                self._lives -= 1
                logger.warning("%s died; starting another in its place", lane.name)
                lane.replace()


class Generator:
    """Makes batches of the examples of a user's function."""

    def __init__(self, brief: Brief) -> None:
        self._brief = brief
        self._step = 0

    def more(self) -> list[Row]:
        """Return the batches of the next step."""
        if self._step == self._brief.walk.steps:
            return []
        self._step += 1
        return [self._brief.row(lambda: self._feed, self._step - 1)]

    @cached_property
    def _feed(self) -> Generated:
        task, options = self._brief.made()
        make = resolve({}, options.source.name, "task.source.name")
        walk = self._brief.walk
        return Generated(task, options.source, make, [walk.seed, walk.first, self._brief.life])


class Pipeline:
    """Runs a Ray Data pipeline, in a process of its own so that it does not hold up the training.

    Each actor of the pipeline asks for steps, prepares them and asks for more, so the quick ones do more of the work.
    What is dealt out and not yet taken is bounded here, and put in order here.

    Args:
        brief: what to prepare.
        actors: how many prepare it.
        cpus: processors of each.
        ahead_bytes: how much they may prepare ahead.
    """

    def __init__(self, brief: Brief, actors: int, cpus: float, ahead_bytes: int) -> None:
        self._walk = brief.walk
        self._actors = actors
        self._ahead_bytes = ahead_bytes
        self._step_bytes = ahead_bytes  # of the largest step so far; as long as there is none, few are dealt out
        self._dealt = 0
        self._taken = 0
        self._room = threading.Condition()
        self._early: dict[int, Row] = {}
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # so that what an actor yields is sent at once
        # A row for each actor, from here: `ray.data.range` has tasks of its own, for which no processor may be left.
        rows = ray.data.from_blocks([pa.table({"actor": [place]}) for place in range(actors)]).map_batches(
            Preparer,
            fn_constructor_args=(brief, ray.get_runtime_context().current_actor),
            batch_format="pyarrow",
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
            num_cpus=cpus,
            max_restarts=0,  # the worker starts the pipeline again, counts how often, and says so
        )
        # Nothing prefetched: the iterator would keep back a row until there is another, which may wait for this one.
        self._blocks = iter(rows.iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=0))

    def deal(self) -> range:
        """Return the next steps to prepare, when there is room for them; none at the end."""
        with self._room:
            self._room.wait_for(lambda: self._dealt < min(self._taken + self._window(), self._walk.steps + 1))
            steps = max(1, min(MOST_STEPS, self._window() // (2 * self._actors)))
            dealt = range(self._dealt, min(self._dealt + steps, self._walk.steps))
            self._dealt = dealt.stop
        return dealt

    def more(self) -> list[Row]:
        """Return the rows of the next steps that are there, not too many; none at the end."""
        while self._walk.position(self._taken) not in self._early:
            block = next(self._blocks, None)
            if block is None:
                return []
            (rows,) = block["rows"].to_pylist()
            self._early.update((row["position"], tuple(row.values())) for row in rows)
        ready: list[Row] = []
        while len(ready) < self._most() and (
            row := self._early.pop(self._walk.position(self._taken + len(ready)), None)
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
        return max(2 * self._actors, self._ahead_bytes // self._step_bytes - HELD_BLOCKS * self._most())

    def _most(self) -> int:
        """Return how many steps may be sent together: what the worker holds takes up at most half of the room."""
        return max(1, self._ahead_bytes // self._step_bytes // (2 * HELD_BLOCKS))


class Preparer:
    """Prepares batches of the task's own examples, in an actor of Ray Data.

    Args:
        brief: what to prepare.
        pipeline: the actor that deals out the steps.
    """

    def __init__(self, brief: Brief, pipeline: ActorHandle) -> None:
        self._brief = brief
        self._pipeline = pipeline

    def __call__(self, _: pa.Table) -> Iterator[pa.Table]:
        """Yield rows for the steps that are dealt out, until there are none left."""
        while steps := ray.get(self._pipeline.deal.options(concurrency_group=DEALING).remote()):
            rows, began = [], time.monotonic()
            for step in steps:
                rows.append(self._brief.row(lambda: self._feed, step))
                if step == steps[-1] or time.monotonic() > began + SEND_SECONDS:
                    yield pa.table({"rows": pa.array([rows], ROWS)})
                    rows, began = [], time.monotonic()

    @cached_property
    def _feed(self) -> Indexed:
        task, options = self._brief.made()
        return indexed(task, options, self._brief.walk.seed)
