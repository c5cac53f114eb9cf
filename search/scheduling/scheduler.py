"""Schedulers: which segments a search trains, and from which states.

A scheduler is asked for work and told outcomes. It knows no clock, no process and no file: equal outcomes in the same
order give equal decisions, and `state_dict` holds all that later decisions depend on.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raytrain.errors import TrainingError
from search.scheduling.segments import (
    Objective,
    Segment,
    SegmentReport,
    report_from_plain,
    report_to_plain,
    segment_from_plain,
    segment_to_plain,
)
from search.scheduling.work import Done, Failed, Paused, Work, WorkOutcome, WorkQueue
from search.space import Space

LineageRow = dict[str, Any]
"""A decision, as a row of the lineage."""


class SearchError(TrainingError):
    """A search cannot go on."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What a search is about.

    Attributes:
        space: the hyperparameters.
        objective: the metric.
        steps: optimizer steps of a whole training.
        seed: of all draws of the search.
        base_seed: of the base recipe.
        rates: changes of the base recipe -> learning-rate factor of each step, shape (steps,); None: not known.
    """

    space: Space
    objective: Objective
    steps: int
    seed: int = 0
    base_seed: int = 0
    rates: Callable[[Mapping[str, Any]], Sequence[float]] | None = None


class Scheduler(ABC):
    """What all schedulers have in common: a queue, the segments under way, the rows of the lineage, the best report.

    Args:
        problem: what the search is about.
        max_failures: how often a failed segment is handed out again.
    """

    def __init__(self, problem: Problem, max_failures: int) -> None:
        self.problem = problem
        self.best: SegmentReport | None = None
        self._queue = WorkQueue(max_failures)
        self._segments: dict[int, Segment] = {}
        self._rows: list[LineageRow] = []
        self._next_row = 0
        self._order: deque[LineageRow] = deque()
        self._early: dict[int, WorkOutcome] = {}

    def follow(self, rows: Iterable[LineageRow]) -> None:
        """Make decisions in the order of a lineage, whatever the order of arrivals; what comes too early waits.

        Args:
            rows: of a search with the same recipe.
        """
        self._order = deque(rows)

    def ask(self, limit: int) -> list[Work]:
        """Return at most `limit` segments to train now; none if there is nothing to do until more outcomes come."""
        self._fill(limit)
        return self._queue.hand_out(limit)

    def tell(self, outcome: WorkOutcome) -> str:
        """Learn how an attempt ended.

        Returns:
            "", or why the outcome was refused: its attempt is not under way.

        Raises:
            SearchError: nothing is left that could be trained.
        """
        work = self._queue.under_way.get(outcome.attempt)
        if work is None or work.row in self._early:
            return (
                f"attempt {outcome.attempt} is not under way: it was reported before, or given up and handed out again"
            )
        self._early[work.row] = outcome
        while (row := self._turn(work.row)) in self._early:
            self._process(self._early.pop(row))
        return ""

    def expire(self) -> bool:
        """Give up what others have waited for long enough; return whether there was anything to give up."""
        return False

    @property
    def under_way(self) -> Mapping[str, Work]:
        """The attempts that are handed out and not ended."""
        return self._queue.under_way

    @property
    def waiting(self) -> int:
        """How many segments are decided on and not handed out."""
        return len(self._queue.waiting)

    @property
    def unfinished(self) -> set[int]:
        """The rows of the segments that have not ended."""
        return set(self._segments)

    def drain(self) -> list[LineageRow]:
        """Return the decisions since the last call."""
        rows, self._rows = self._rows, []
        return rows

    def digests(self) -> set[str]:
        """Return the states that a later decision, or a resume, can need."""
        best = {self.best.snapshot.digest} if self.best else set()
        early = {outcome.snapshot.digest for outcome in self._early.values() if not isinstance(outcome, Failed)}
        origins = [origin for segment in self._segments.values() for origin in (segment.origin, segment.fallback)]
        return (best | early | self._queue.digests() | {origin.snapshot.digest for origin in origins if origin}) - {""}

    def state_dict(self) -> dict[str, Any]:
        """Return all that decisions depend on, as plain data."""
        return {
            "next_row": self._next_row,
            "segments": [segment_to_plain(segment) for _, segment in sorted(self._segments.items())],
            "queue": self._queue.state_dict(),
            "best": self.best and report_to_plain(self.best),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of an earlier scheduler; what was under way there is handed out again."""
        segments = [segment_from_plain(plain, self.problem.space) for plain in state["segments"]]
        self._segments = {segment.row: segment for segment in segments}
        self._next_row = state["next_row"]
        self._queue.load_state_dict(state["queue"])
        self.best = state["best"] and self._read_report(state["best"])

    def _turn(self, arrived: int | None = None) -> int | None:
        """Return whose outcome is decided on next: the row of a segment, or None where a segment begins before.

        Args:
            arrived: the row to return where no order is followed.
        """
        while self._order and self._is_past(self._order[0]):
            self._order.popleft()
        return self._order[0].get("ended") if self._order else arrived

    def _is_past(self, row: LineageRow) -> bool:
        ended = row.get("ended")
        begun = row["row"] if ended is None else ended
        return begun < self._next_row and ended not in self._segments

    def _may_begin(self, limit: int) -> bool:
        """Return whether a segment can begin that no outcome asks for: one that `ask` hands out at once."""
        if self._turn() is not None:
            return False
        return bool(self._order) or len(self._queue.waiting) < limit

    def _process(self, outcome: WorkOutcome) -> None:
        work = self._queue.close(outcome.attempt)
        if isinstance(outcome, Paused):
            self._queue.add(replace(work, snapshot=outcome.snapshot, reset_optimizer=False))
        elif isinstance(outcome, Failed):
            self._fail(work, outcome)
        else:
            self._finish(work, outcome)

    @abstractmethod
    def _fill(self, limit: int) -> None:
        """Queue new segments, up to `limit` that wait."""

    @abstractmethod
    def _reported(self, report: SegmentReport) -> None:
        """Learn that a segment was trained to its end."""

    @abstractmethod
    def _given_up(self, segment: Segment, failure: Failed) -> None:
        """Learn that a segment failed for good."""

    def _finish(self, work: Work, done: Done) -> None:
        objective, step = self.problem.objective, done.snapshot.step
        fault = objective.fault(done)
        if step != work.until:
            fault = Failed(done.attempt, "error", f"expected training to step {work.until}; it ended at step {step}")
        if fault:
            self._fail(work, fault)
            return
        score = float(done.metrics[objective.metric])
        report = SegmentReport(self._segments.pop(work.row), done.snapshot, score, objective.fitness(score))
        self._queue.forget_failures(work.row)
        if self.best is None or (report.fitness, -report.segment.row) > (self.best.fitness, -self.best.segment.row):
            self.best = report
        self._reported(report)

    def _fail(self, work: Work, failure: Failed) -> None:
        if self._queue.repeat(work, failure.cause):
            return
        self._queue.forget_failures(work.row)
        segment = self._segments.pop(work.row)
        if failure.cause == "unreadable" and segment.fallback:
            earlier = replace(segment, row=self._next_row, origin=segment.fallback, history=segment.history[:-1])
            self._open(
                replace(earlier, fallback=None), action="fallback", ended=segment.row, failure=summary_of(failure)
            )
        else:
            self._given_up(segment, failure)

    def _open(self, segment: Segment, action: str, **about: Any) -> None:
        """Write the row that begins a segment, and queue it; a function's decisions are not its changes."""
        changes, genome = dict(segment.configuration.changes), segment.configuration.genome.values()
        if genome != changes:
            about["genome"] = genome
        self._note(
            action=action,
            member=segment.member,
            generation=segment.generation,
            step=segment.origin.snapshot.step,
            parent_row=segment.origin.row,
            state=segment.origin.snapshot.digest,
            new=changes,
            seed=segment.seed,
            **({"reset_optimizer": True} if segment.reset_optimizer else {}),
            **about,
        )
        self._segments[segment.row] = segment
        self._queue.add(segment.work())

    def _close(self, report: SegmentReport, action: str, **about: Any) -> None:
        """Write the row that ends a member, for good or until it is promoted."""
        self._note(
            action=action,
            ended=report.segment.row,
            member=report.member,
            step=report.snapshot.step,
            state=report.snapshot.digest,
            score=report.score,
            **about,
        )

    def _note(self, **row: Any) -> None:
        """Write a row."""
        self._rows.append({"row": self._next_row, **row})
        self._next_row += 1

    def _read_report(self, plain: Mapping[str, Any]) -> SegmentReport:
        return report_from_plain(plain, self.problem.space, self.problem.objective)


def summary_of(failure: Failed) -> dict[str, str]:
    """Return what a row says of a failure."""
    return {"cause": failure.cause, "message": failure.message}
