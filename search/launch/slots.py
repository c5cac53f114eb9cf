"""Slots: long-lived actors that train segments side by side, and a new one where one has died.

An actor trains whatever member is next, so that to change members neither a process is started nor anything imported.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ray
from ray.exceptions import RayError, RayTaskError

from raytrain.errors import RaytrainError, RecipeError, TrainingError
from raytrain.launch.resources import Node
from raytrain.launch.version import fingerprint
from raytrain.recipe import Recipe
from raytrain.run.directory import host_suffix
from search.launch.actors import SlotActors, SlotResources
from search.launch.trial_actor import Beat, TrialOptions
from search.scheduling.driver import SegmentEnd
from search.scheduling.work import Cause, Failed, Work

SLOT_POLL_SECONDS = 0.1
"""How long the pool waits for a segment to end before it looks at the clock."""
ASK_SECONDS = 0.5
"""How often a slot is asked for a sign of progress."""
DIED = "its process died: killed, out of memory, or crashed"
MAX_FAILED_STARTS = 3
"""How many actors in a row may die before one has started."""

End = SegmentEnd | Failed
"""How an attempt ended."""


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
    """Actors that train a member together, mostly one, and the segment that they train.

    Args:
        options: of its trials.
        each: what it takes of the cluster.

    Attributes:
        pending: what is waited for: that the actor starts, or the end of its segment; None: it is idle.
        work: the segment, if it has one.
        beat: the last sign of progress.
    """

    def __init__(self, options: TrialOptions, each: SlotResources) -> None:
        self.work: Work | None = None
        self.beat = Beat()
        self._stopping = False
        self._host = ""
        self._question: ray.ObjectRef | None = None
        self._heard = self._asked = time.monotonic()
        self._actors = SlotActors(options, each)
        self.pending: ray.ObjectRef | None = self._actors.load()

    def submit(self, work: Work, state: bytes | None) -> None:
        """Begin to train a segment."""
        self.work, self._heard = work, time.monotonic()
        self.pending = self._actors.first.train.remote(work, state)

    def stop(self) -> None:
        """Ask for the end of the segment after the step that it is at; there is no other segment after it."""
        if self.work is None or self._stopping:
            return
        self._stopping = True
        self._actors.first.stop.options(concurrency_group="control").remote()

    def kill(self) -> None:
        """End its processes, whatever they do."""
        self._actors.kill()

    def end(self) -> End | None:
        """Return how the segment has ended, once `pending` is ready; None: the actor has started.

        Raises:
            RaytrainError: the actor cannot start.
            RayError: the actor has died.
        """
        work, pending, self.pending = self.work, self.pending, None
        try:
            ended = ray.get(pending)
        except RayTaskError as error:
            if isinstance(error.cause, RayError):  # of another worker of this slot
                raise error.cause from error
            if work is None:
                known = isinstance(error.cause, RaytrainError)
                raise error.cause if known else TrainingError(f"a slot cannot start: {error.cause}") from error
            ended = self.failure("error", str(error.cause))
        if work is None:
            self._host = ended
            return None
        self.work = None
        end: End = ended
        return end

    def failure(self, cause: Cause, message: str) -> Failed:
        """Return the failure of the segment."""
        return Failed(self.work.attempt if self.work else "", cause, message + host_suffix(self._host))

    def silent_for(self, seconds: float) -> Failed | None:
        """Return what to make of a segment without a sign of progress for some time; None for one with such a sign."""
        if self.work is None:
            return None
        now = time.monotonic()
        if self._question is None and now - self._asked > ASK_SECONDS:
            self._question, self._asked = self._actors.first.beat.options(concurrency_group="control").remote(), now
        if self._question is not None and ray.wait([self._question], timeout=0)[0]:
            self._hear(now)
        if now - self._heard < seconds:
            return None
        if self._question is None or now - self._asked < seconds / 2:
            return self.failure("slow", f"it made no step in {seconds:g} s (search.timeout_seconds)")
        return self.failure(
            "slow",
            f"it did not answer for {seconds:g} s (search.timeout_seconds): stopped (SIGSTOP), swapped out, or its "
            "machine is too busy",
        )

    def _hear(self, now: float) -> None:
        """Take the answer to the last question."""
        question, self._question = self._question, None
        try:
            beat = ray.get(question)
        except RayError:
            return  # it has died, which `end` tells
        if beat != self.beat:
            self.beat, self._heard = beat, now


class SlotPool:
    """Slots that train segments side by side.

    Args:
        base: the recipe whose fields are searched.
        each: what a slot takes of the cluster.
        count: how many there are.
        timeout_seconds: how long one may give no sign of progress in a segment.
        whole_runs_in: the search's folder, if each trial is a whole run.

    Attributes:
        restarts: how often a slot's actor had to be replaced.
    """

    def __init__(
        self,
        base: Recipe,
        each: SlotResources,
        count: int,
        timeout_seconds: float,
        whole_runs_in: Path | None = None,
    ) -> None:
        self.restarts = 0
        path = [os.getcwd(), *(os.path.abspath(folder) for folder in sys.path)]
        self._options = TrialOptions(base.to_dict(), each.threads, path, fingerprint(), whole_runs_in)
        self._each = each
        self._timeout_seconds = timeout_seconds
        self._failed_starts = 0
        self._slots = [Slot(self._options, each) for _ in range(count)]

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

    def wait(self) -> list[tuple[Work, End]]:
        """Return the segments that have ended, waiting for one a little.

        Raises:
            RaytrainError: the actors cannot start.
        """
        pending = {slot.pending: slot for slot in self._slots if slot.pending is not None}
        if not pending:
            return []
        ready, _ = ray.wait(list(pending), timeout=SLOT_POLL_SECONDS)
        ends = [(slot.work, self._end(slot)) for slot in map(pending.__getitem__, ready)]
        for slot in list(self._slots):
            if failure := slot.silent_for(self._timeout_seconds):
                ends.append((slot.work, failure))
                self._replace(slot)
        return [(work, end) for work, end in ends if work is not None and end is not None]

    def close(self) -> None:
        """End the actors."""
        if ray.is_initialized():
            for slot in self._slots:
                slot.kill()

    def _end(self, slot: Slot) -> End | None:
        """Return how a segment has ended; if its actor has died, start another.

        Raises:
            RaytrainError: the actors cannot start.
        """
        starting = slot.work is None
        try:
            end = slot.end()
        except RayError as error:
            self._failed_starts += starting
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise TrainingError(f"{MAX_FAILED_STARTS} slots in a row died when they started: {error}") from error
            self._replace(slot)
            return None if starting else slot.failure("dead", DIED)
        self._failed_starts = 0
        if isinstance(end, Failed) and self._each.workers > 1:
            self._replace(slot)  # what was in flight between its workers goes with them
        return end

    def _replace(self, slot: Slot) -> None:
        """Put a new actor in the place of one that has died or is to end."""
        slot.kill()
        self.restarts += 1
        self._slots[self._slots.index(slot)] = Slot(self._options, self._each)
