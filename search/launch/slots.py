"""Slots: long-lived processes that train segments side by side, and new ones where some have died.

A process trains whatever member is next, so that to change members none is started and nothing imported.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from typing import Any, Protocol

from raytrain.errors import RaytrainError, RecipeError, TrainingError
from raytrain.launch.resources import Node
from raytrain.run.directory import host_suffix
from search.scheduling.driver import SegmentEnd
from search.scheduling.work import Cause, Failed, Work

SLOT_POLL_SECONDS = 0.1
"""How long the pool waits for a segment to end before it looks at the clock."""
DIED = "its process died: killed, out of memory, or crashed"
MAX_FAILED_STARTS = 3
"""How many processes in a row may die before one has started."""

SlotEnd = SegmentEnd | Failed
"""How an attempt ended."""


@dataclass(frozen=True, slots=True)
class SlotResources:
    """What each slot takes of the cluster, or of this machine.

    Attributes:
        cpus: processors of each worker, which are also its threads.
        beside_cpus: GPUs and custom resources of each worker, by the cluster's names.
        labels: of the machines, as in a recipe's `resources.labels`.
        workers: processes that train a member together.
        placement: of several workers on the machines, as in a recipe's `resources.placement`.
    """

    cpus: float
    beside_cpus: Mapping[str, float]
    labels: Mapping[str, str]
    workers: int = 1
    placement: str = "PACK"

    @property
    def threads(self) -> int:
        """Threads of each process."""
        return max(1, int(self.cpus))

    def __str__(self) -> str:
        """Return what is said of a slot."""
        return f"{self.cpus:g} CPU each" if self.workers == 1 else f"{self.workers} workers with {self.cpus:g} CPU each"


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of progress.

    Attributes:
        count: of such signs; one that grows no more is a segment that hangs.
        step: optimizer steps done.
    """

    count: int = 0
    step: int = 0


class SlotDiedError(TrainingError):
    """A process of a slot is gone."""


class SlotWorkers(Protocol):
    """The processes of a slot, wherever they are. Futures have a `SlotDiedError` where one of them is gone."""

    def load(self) -> Future[Any]:
        """Begin to start them; the future has the machine's name."""
        ...

    def train(self, work: Work, state: bytes | None) -> Future[Any]:
        """Begin to train a segment; the future has its end."""
        ...

    def beat(self) -> Beat | None:
        """Return the last sign of progress, or None without an answer."""
        ...

    def stop(self) -> None:
        """Ask for the end of the segment after the step that it is at."""
        ...

    def kill(self) -> None:
        """End them, whatever they do, and free what they took."""
        ...


def slot_count(wanted: int, most: int, each: SlotResources, machines: Sequence[Node]) -> int:
    """Return how many slots to start.

    Args:
        wanted: by the recipe; 0: as many as fit.
        most: segments that can be trained side by side.
        each: what a slot takes.
        machines: those that have what a worker takes.

    Raises:
        RecipeError: they do not fit, and would wait for ever.
    """
    room = _room(each, [machine.fits(each.cpus) for machine in machines])
    if room < max(wanted, 1):
        way_out = f"slots={room}" if room else "a smaller base.resources.cpus"
        raise RecipeError(
            f"slots: {max(wanted, 1)} of {each} do not fit on {len(machines)} machine(s) with "
            f"{sum(machine.cpus for machine in machines):g} CPU; set {way_out}"
        )
    return min(wanted or room, most)


def _room(each: SlotResources, workers: Sequence[int]) -> int:
    """Return how many slots there is room for, from how many workers fit on each machine."""
    if each.placement == "STRICT_PACK":
        return sum(count // each.workers for count in workers)
    room = sum(workers) // each.workers
    if each.placement == "STRICT_SPREAD":
        while sum(min(count, room) for count in workers) < room * each.workers:
            room -= 1
    return room


class Slot:
    """Processes that train a member together, mostly one, and the segment that they train.

    Args:
        workers: the processes.

    Attributes:
        pending: what is waited for: that they start, or the end of their segment; None: the slot is idle.
        work: the segment, if it has one.
        beat: the last sign of progress.
    """

    def __init__(self, workers: SlotWorkers) -> None:
        self.work: Work | None = None
        self.beat = Beat()
        self._workers = workers
        self._stopping = False
        self._host = ""
        self._progressed = self._answered = time.monotonic()
        self.pending: Future[Any] | None = workers.load()

    def submit(self, work: Work, state: bytes | None) -> None:
        """Begin to train a segment."""
        self.work, self._progressed = work, time.monotonic()
        self._answered = self._progressed
        self.beat = Beat(self.beat.count, work.snapshot.step)  # its step was that of the segment before
        self.pending = self._workers.train(work, state)

    def stop(self) -> None:
        """Ask for the end of the segment after the step that it is at; there is no other segment after it."""
        if self.work is None or self._stopping:
            return
        self._stopping = True
        self._workers.stop()

    def kill(self) -> None:
        """End its processes, whatever they do."""
        self._workers.kill()

    def end(self) -> SlotEnd | None:
        """Return how the segment has ended, once `pending` is done; None: the processes have started.

        Raises:
            SlotDiedError: a process has died.
            RaytrainError: the processes cannot start.
        """
        work, pending, self.pending = self.work, self.pending, None
        if pending is None:
            raise ValueError("nothing was waited for")
        try:
            ended = pending.result()
        except SlotDiedError:
            raise
        except RaytrainError as error:
            if work is None:
                raise
            ended = self.failure("error", str(error))
        if work is None:
            self._host = ended
            return None
        self.work = None
        end: SlotEnd = ended
        return end

    def failure(self, cause: Cause, message: str) -> Failed:
        """Return the failure of the segment."""
        return Failed(self.work.attempt if self.work else "", cause, message + host_suffix(self._host))

    def silent_for(self, seconds: float) -> Failed | None:
        """Return what to make of a segment without a sign of progress for some time; None for one with such a sign."""
        if self.work is None:
            return None
        now, beat = time.monotonic(), self._workers.beat()
        if beat is not None:
            self._answered = now
            if beat != self.beat:
                self.beat, self._progressed = beat, now
        if now - self._progressed < seconds:
            return None
        if now - self._answered < seconds / 2:
            return self.failure("slow", f"it made no step in {seconds:g} s (search.timeout_seconds)")
        return self.failure(
            "slow",
            f"it did not answer for {seconds:g} s (search.timeout_seconds): stopped (SIGSTOP), swapped out, or its "
            "machine is too busy",
        )


class SlotPool:
    """Slots that train segments side by side.

    Args:
        start: starts the processes of a slot.
        count: how many slots there are.
        timeout_seconds: how long one may give no sign of progress in a segment.
        replace_failed: whether a slot whose segment failed gets new processes, as those of several workers do: what
            was in flight between them goes with them.

    Attributes:
        restarts: how often the processes of a slot had to be replaced.
    """

    def __init__(
        self, start: Callable[[], SlotWorkers], count: int, timeout_seconds: float, *, replace_failed: bool = False
    ) -> None:
        self.restarts = 0
        self._start = start
        self._replace_failed = replace_failed
        self._timeout_seconds = timeout_seconds
        self._failed_starts = 0
        self._slots = [Slot(start()) for _ in range(count)]

    @property
    def idle(self) -> int:
        """How many slots wait for work."""
        return sum(slot.pending is None for slot in self._slots)

    @property
    def steps(self) -> dict[int, int]:
        """How far the members are that train now; for another thread too."""
        found = [(slot.work, slot.beat.step) for slot in list(self._slots)]
        return {work.member: max(work.snapshot.step, step) for work, step in found if work is not None}

    def submit(self, work: Work, state: bytes | None) -> None:
        """Begin to train a segment in a slot that is idle."""
        next(slot for slot in self._slots if slot.pending is None).submit(work, state)

    def stop(self) -> None:
        """Ask all slots to end their segments after the step that they are at."""
        for slot in self._slots:
            slot.stop()

    def wait(self) -> list[tuple[Work, SlotEnd]]:
        """Return the segments that have ended, waiting for one a little.

        Raises:
            RaytrainError: the processes cannot start.
        """
        pending = [slot.pending for slot in self._slots if slot.pending is not None]
        if not pending:
            return []
        ready, _ = wait_for(pending, SLOT_POLL_SECONDS, FIRST_COMPLETED)
        ends = [(slot.work, self._end(slot)) for slot in list(self._slots) if slot.pending in ready]
        for slot in list(self._slots):
            if failure := slot.silent_for(self._timeout_seconds):
                ends.append((slot.work, failure))
                self._replace(slot)
        return [(work, end) for work, end in ends if work is not None and end is not None]

    def close(self) -> None:
        """End all processes."""
        for slot in self._slots:
            slot.kill()

    def _end(self, slot: Slot) -> SlotEnd | None:
        """Return how a segment has ended; if its processes have died, start others.

        Raises:
            RaytrainError: the processes cannot start.
        """
        starting = slot.work is None
        try:
            end = slot.end()
        except SlotDiedError as error:
            self._failed_starts += starting
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise TrainingError(f"{MAX_FAILED_STARTS} slots in a row died when they started: {error}") from error
            self._replace(slot)
            return None if starting else slot.failure("dead", DIED)
        self._failed_starts = 0
        if isinstance(end, Failed) and self._replace_failed:
            self._replace(slot)
        return end

    def _replace(self, slot: Slot) -> None:
        """Put new processes in the place of those that have died or are to end."""
        slot.kill()
        self.restarts += 1
        self._slots[self._slots.index(slot)] = Slot(self._start())
