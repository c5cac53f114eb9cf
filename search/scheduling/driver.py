"""The in-process driver: a search without Ray, one segment after the other."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from raytrain.errors import CheckpointError, TrainingError
from raytrain.registry import error_location
from search.scheduling.work import Done, Failed, Paused, Snapshot, Work, WorkOutcome

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SegmentEnd:
    """What the training of a segment gives.

    Attributes:
        state: the packed state at the end.
        step: optimizer steps done; below the segment's end if training was asked to stop.
        metrics: as measured at the end.
    """

    state: bytes
    step: int
    metrics: Mapping[str, Any]


Train = Callable[[Work, bytes | None], SegmentEnd]
"""(work, packed state to start from, or None) -> what came of it."""


class AsksAndTells(Protocol):
    """A scheduler, or a journal around one."""

    def ask(self, limit: int) -> list[Work]:
        """Return at most `limit` segments to train now."""
        ...

    def tell(self, outcome: WorkOutcome) -> str:
        """Learn how an attempt ended."""
        ...


class States(Protocol):
    """Packed states by name."""

    def put(self, state: bytes) -> str:
        """Store a state and return its name."""
        ...

    def get(self, digest: str) -> bytes:
        """Return a state."""
        ...


def drive(search: AsksAndTells, states: States, train: Train, stop: Callable[[], bool] = lambda: False) -> None:
    """Train segments until none is left, or until asked to stop.

    Args:
        search: decides what is end.
        states: where the states are.
        train: trains a segment; an error of it fails the attempt, not the search.
        stop: asked before each segment.
    """
    while not stop() and (works := search.ask(1)):
        [work] = works
        outcome = run_attempt(work, states, train)
        if isinstance(outcome, Paused) and outcome.snapshot.step <= work.snapshot.step:
            if stop():
                return  # the segment is as it was
            outcome = Failed(work.attempt, "stopped", f"training ended at step {outcome.snapshot.step}, without a step")
        search.tell(outcome)


def run_attempt(work: Work, states: States, train: Train) -> WorkOutcome:
    """Train a segment and return what became of it."""
    state = read_state(work, states)
    return outcome_of(work, states, state if isinstance(state, Failed) else attempt(work, state, train))


def read_state(work: Work, states: States) -> bytes | None | Failed:
    """Return the state that a segment starts from, or None if it starts anew; a failure if it cannot be read."""
    try:
        return states.get(work.snapshot.digest) if work.snapshot.digest else None
    except CheckpointError as error:
        return Failed(work.attempt, "unreadable", str(error))


def attempt(work: Work, state: bytes | None, train: Train) -> SegmentEnd | Failed:
    """Train a segment; what goes wrong ends this attempt and not the search."""
    try:
        return train(work, state)
    except TrainingError as error:
        return Failed(work.attempt, "stopped", str(error))
    except Exception as error:  # the user's code, or no memory
        return Failed(work.attempt, "error", f"{type(error).__name__}: {error}{error_location(error)}")


def outcome_of(work: Work, states: States, end: SegmentEnd | Failed) -> WorkOutcome:
    """Store the state at the end of a segment, and return what the scheduler is told."""
    if isinstance(end, Failed):
        return _logged(end, work)
    try:
        snapshot = Snapshot(states.put(end.state), end.step)
    except OSError as error:  # a full disk
        return _logged(Failed(work.attempt, "error", f"its state cannot be stored: {error}"), work)
    if snapshot.step < work.until:
        return Paused(work.attempt, snapshot)
    return Done(work.attempt, snapshot, end.metrics)


def _logged(failure: Failed, work: Work) -> Failed:
    logger.warning("member %d, step %d: %s: %s", work.member, work.snapshot.step, failure.cause, failure.message)
    return failure
