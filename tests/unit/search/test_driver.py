"""The in-process driver: what becomes of a segment."""

from typing import Any

import pytest

from raytrain.errors import CheckpointError, TrainingError
from search.scheduling.driver import SegmentEnd, drive, run_attempt
from search.scheduling.work import Done, Failed, Paused, Work
from search.testing import MemoryStates, toy_search, train_toy


def attempted(train: Any, states: MemoryStates | None = None) -> Any:
    [work] = toy_search().ask(1)
    return run_attempt(work, states or MemoryStates(), train)


RAISED = " (test_driver.py, line 24)"
"""Where `failing` raises."""


def failing(error: BaseException) -> Any:
    def train(work: Work, state: bytes | None) -> SegmentEnd:
        raise error

    return train


@pytest.mark.parametrize(
    ("error", "cause", "message"),
    [
        (TrainingError("the loss is nan in step 3"), "stopped", "the loss is nan in step 3"),
        (CheckpointError("another model"), "stopped", "another model"),
        (MemoryError("no memory"), "error", f"MemoryError: no memory{RAISED}"),
        (OSError(28, "No space left on device"), "error", f"OSError: [Errno 28] No space left on device{RAISED}"),
        (ZeroDivisionError("mine"), "error", f"ZeroDivisionError: mine{RAISED}"),
    ],
)
def test_an_error_fails_the_attempt(error: Exception, cause: Any, message: str) -> None:
    assert attempted(failing(error)) == Failed("0.0.0", cause, message)


def test_an_interrupt_passes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        attempted(failing(KeyboardInterrupt()))


def test_a_segment_is_done_at_its_end_and_paused_before() -> None:
    states = MemoryStates()
    done = attempted(train_toy, states)
    assert isinstance(done, Done)
    assert states.get(done.snapshot.digest)
    paused = attempted(lambda work, state: SegmentEnd(b"half", 3, {}), states)
    assert isinstance(paused, Paused)
    assert (states.get(paused.snapshot.digest), paused.snapshot.step) == (b"half", 3)


def test_a_search_that_is_stopped_in_a_segment_goes_on_from_there() -> None:
    """With equal decisions: a pause changes nothing."""
    whole, engine = toy_search(steps=30), toy_search(steps=30)
    drive(whole, MemoryStates(), train_toy)
    states, stopped, calls = MemoryStates(), [], []

    def train(work: Work, state: bytes | None) -> SegmentEnd:
        calls.append(work)
        if len(calls) % 3:
            return train_toy(work, state)
        stopped.append(True)
        half = Work(**{**{name: getattr(work, name) for name in Work.__slots__}, "until": work.snapshot.step + 2})
        return train_toy(half, state)

    for _ in range(20):
        drive(engine, states, train, stop=lambda: bool(stopped and stopped.pop()))
    assert len(calls) > 14
    assert engine.drain() == whole.drain()


def test_training_that_does_no_step_is_a_failure_unless_it_was_asked_to_stop() -> None:
    engine = toy_search()
    asked: list[bool] = []

    def idle(work: Work, state: bytes | None) -> SegmentEnd:
        asked.append(True)
        return SegmentEnd(b"", work.snapshot.step, {})

    drive(engine, MemoryStates(), idle, stop=lambda: bool(asked))
    assert len(asked) == 1
    assert engine.under_way.keys() == {"0.0.0"}, "nothing was told: a resume hands it out again"
    with pytest.raises(Exception, match=r"training ended at step 0, without a step$"):
        drive(toy_search(), MemoryStates(), idle)
