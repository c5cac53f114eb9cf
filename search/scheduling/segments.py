"""Segments: the stretches of training that a search is made of, and how they ended.

A segment begins with a decision, which is a row of the lineage, and continues the end of an earlier segment or starts
anew. Segments and their parents are the lineage's graph: a parent's row always has the lower number.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from raytrain.registry import suggest
from search.chooser import Configuration
from search.scheduling.work import Done, Failed, Snapshot, Work
from search.space import Space

WINDOW = 10
"""Scores of a model that are kept: Jaderberg et al. 2017 test the last 10."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a segment comes from.

    Attributes:
        row: of the segment whose end it continues; None: it starts anew.
        snapshot: the state there.
    """

    row: int | None = None
    snapshot: Snapshot = Snapshot()


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of training.

    Attributes:
        row: of the decision that began it.
        member: of the population, or trial of a sweep.
        generation: how many segments this member had before.
        origin: where it comes from.
        fallback: where it can start from if the state of the origin is unreadable.
        until: step to train to.
        configuration: its hyperparameters.
        seed: of the recipe.
        history: fitness of the model that it continues, at most `WINDOW` values, the newest last.
        reset_optimizer: whether it takes the weights of its origin without the optimizer's state.
    """

    row: int
    member: int
    generation: int
    origin: Origin
    fallback: Origin | None
    until: int
    configuration: Configuration
    seed: int
    history: tuple[float, ...] = ()
    reset_optimizer: bool = False

    def work(self) -> Work:
        """Return the work to queue."""
        return Work(
            attempt="",
            row=self.row,
            member=self.member,
            snapshot=self.origin.snapshot,
            until=self.until,
            changes=self.configuration.changes,
            seed=self.seed,
            reset_optimizer=self.reset_optimizer,
        )


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """How a segment ended.

    Attributes:
        segment: the segment.
        snapshot: the state at its end.
        score: the metric.
        fitness: the score, with its sign changed where lower is better.
    """

    segment: Segment
    snapshot: Snapshot
    score: float
    fitness: float

    @property
    def member(self) -> int:
        """The member."""
        return self.segment.member

    @property
    def values(self) -> Mapping[str, Any]:
        """The hyperparameters: path -> value."""
        return self.segment.configuration.genome.values()

    @property
    def history(self) -> tuple[float, ...]:
        """The fitness of this model, at most `WINDOW` values, the newest last."""
        return (*self.segment.history, self.fitness)[-WINDOW:]

    @property
    def rank(self) -> tuple[float, int]:
        """What a population is sorted by: of equals, the higher member counts as better."""
        return (self.fitness, self.member)


def next_segment(before: Segment, row: int, source: SegmentReport, until: int, configuration: Configuration) -> Segment:
    """Return the next segment of a member.

    Args:
        before: its last one.
        row: of the decision.
        source: whose end it continues: its own, or another member's.
        until: step to train to.
        configuration: its hyperparameters.
    """
    return Segment(
        row=row,
        member=before.member,
        generation=before.generation + 1,
        origin=Origin(source.segment.row, source.snapshot),
        fallback=source.segment.origin,
        until=until,
        configuration=configuration,
        seed=before.seed,
        history=source.history,
    )


@dataclass(frozen=True, slots=True)
class Objective:
    """What a search improves.

    Attributes:
        metric: its name among the metrics.
        better: whether lower or higher values are better.
    """

    metric: str
    better: Literal["lower", "higher"]

    def fitness(self, score: float) -> float:
        """Return the score with the sign that makes higher better."""
        return score if self.better == "higher" else -score

    def fault(self, done: Done) -> Failed | None:
        """Return the failure that an outcome without a finite score is; None for one with a score."""
        if self.metric not in done.metrics:
            known = suggest(self.metric, done.metrics)
            return Failed(done.attempt, "error", f"the metric {self.metric!r} was not measured; {known}")
        value = done.metrics[self.metric]
        if isinstance(value, bool) or not isinstance(value, int | float):
            return Failed(done.attempt, "error", f"the metric {self.metric} is no number: {value!r}")
        if not math.isfinite(value):
            return Failed(done.attempt, "diverged", f"the metric {self.metric} is {value}")
        return None


def segment_to_plain(segment: Segment) -> dict[str, Any]:
    """Return a segment as plain data; its configuration is kept as path -> value."""
    return {
        "row": segment.row,
        "member": segment.member,
        "generation": segment.generation,
        "origin": _origin_to_plain(segment.origin),
        "fallback": segment.fallback and _origin_to_plain(segment.fallback),
        "until": segment.until,
        "values": segment.configuration.genome.values(),
        "seed": segment.seed,
        "history": list(segment.history),
        "reset_optimizer": segment.reset_optimizer,
    }


def segment_from_plain(plain: Mapping[str, Any], space: Space) -> Segment:
    """Return the segment that `segment_to_plain` wrote."""
    return Segment(
        row=plain["row"],
        member=plain["member"],
        generation=plain["generation"],
        origin=_origin_from_plain(plain["origin"]),
        fallback=plain["fallback"] and _origin_from_plain(plain["fallback"]),
        until=plain["until"],
        configuration=space.replay(plain["values"]),
        seed=plain["seed"],
        history=tuple(plain["history"]),
        reset_optimizer=plain["reset_optimizer"],
    )


def report_to_plain(report: SegmentReport) -> dict[str, Any]:
    """Return a report as plain data."""
    return {
        "segment": segment_to_plain(report.segment),
        "snapshot": [report.snapshot.digest, report.snapshot.step],
        "score": report.score,
    }


def report_from_plain(plain: Mapping[str, Any], space: Space, objective: Objective) -> SegmentReport:
    """Return the report that `report_to_plain` wrote."""
    segment = segment_from_plain(plain["segment"], space)
    return SegmentReport(segment, Snapshot(*plain["snapshot"]), plain["score"], objective.fitness(plain["score"]))


def _origin_to_plain(origin: Origin) -> list[Any]:
    return [origin.row, origin.snapshot.digest, origin.snapshot.step]


def _origin_from_plain(plain: list[Any]) -> Origin:
    return Origin(plain[0], Snapshot(*plain[1:]))
