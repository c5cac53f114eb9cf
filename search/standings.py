"""Where a search stands: its members, its best score and its pace, from the rows that it has written."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from search.pareto import pareto_front
from search.scheduling.segments import Objective

ENDS = {"end": "done", "stop": "stopped early", "pause": "paused", "fail": "failed", "retire": "failed"}
"""Action of a row that ends a member -> its state from then on."""


@dataclass(slots=True)
class Standing:
    """Where a member of a population, or a trial of a sweep, stands.

    Attributes:
        row: of the decision that began its segment.
        step: optimizer steps done.
        score: the last one.
        metrics: what was measured last, and statistics of the model.
        values: dotted field of the base recipe -> value that it trains with.
        parent: whose state it inherited at last, if that was another's.
        state: "training", or how it ended.
    """

    row: int = -1
    step: int = 0
    score: float | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    parent: int | None = None
    state: str = "training"


@dataclass(frozen=True, slots=True)
class BestScore:
    """The best score so far.

    Attributes:
        score: its value.
        member: whose.
        step: where.
    """

    score: float
    member: int
    step: int


class Standings:
    """All members, kept up to date row by row.

    Args:
        objective: the metric that decides.

    Attributes:
        members: number -> where it stands.
        best: the best score so far.
        generation: of the segment that began last.
        failures: attempts that failed for good.
        steps: optimizer steps of all members together.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.members: dict[int, Standing] = {}
        self.best: BestScore | None = None
        self.generation = 0
        self.failures = 0
        self.steps = 0
        self._begun_at: dict[int, int] = {}

    def decided(self, row: Mapping[str, Any]) -> None:
        """Learn a decision: a row of the lineage."""
        member = self.members.setdefault(row["member"], Standing())
        self.failures += "failure" in row
        if "new" not in row:
            member.state = ENDS.get(row["action"], row["action"])
            return
        self._begun_at[row["row"]] = row["step"]
        self.generation = max(self.generation, row["generation"])
        member.row, member.step, member.values, member.state = row["row"], row["step"], row["new"], "training"
        if row.get("parent") not in (None, row["member"]):
            member.parent = row["parent"]

    def reported(self, row: Mapping[str, Any]) -> None:
        """Learn the end of a segment: a row of the metrics, which follows the decision that began the segment."""
        member = self.members.setdefault(row["member"], Standing())
        score = row["valid"].get(self.objective.metric)
        self.steps += row["step"] - self._begun_at.get(row["row"], row["step"])
        member.score = score
        member.metrics = {**row.get("statistics", {}), **row["valid"]}
        if row["row"] >= member.row:
            member.step = row["step"]
        if score is None:
            return
        fitness = self.objective.fitness(score)
        if self.best is None or fitness > self.objective.fitness(self.best.score):
            self.best = BestScore(score, row["member"], row["step"])

    def median(self) -> float | None:
        """Return the median of the members' last scores."""
        scores = [member.score for member in self.members.values() if member.score is not None]
        return statistics.median(scores) if scores else None

    def moving(self) -> list[str]:
        """Return the fields whose values differ between members."""
        values = [member.values for member in self.members.values()]
        fields = dict.fromkeys(name for each in values for name in each)
        return [name for name in fields if len({repr(each.get(name)) for each in values}) > 1]

    def ahead(self, member: int, step: int) -> int:
        """Return how many steps of a segment that goes on are done, if its member is at `step`."""
        return max(0, step - self.members[member].step) if member in self.members else 0

    def front(self, objectives: Sequence[Objective]) -> dict[int, list[float]]:
        """Return the members that are on the Pareto front, number -> values, sorted by the first objective."""
        points = self.points(objectives)
        losses = [
            [-each.fitness(value) for each, value in zip(objectives, row, strict=True)] for row in points.values()
        ]
        on_front = pareto_front(np.array(losses).reshape(-1, len(objectives)))
        front = {number: row for (number, row), on in zip(points.items(), on_front.tolist(), strict=True) if on}
        return dict(sorted(front.items(), key=lambda item: (-objectives[0].fitness(item[1][0]), item[0])))

    def points(self, objectives: Sequence[Objective]) -> dict[int, list[float]]:
        """Return the objectives' last values of each member that has all of them, finite, number -> values."""
        rows = {
            number: [member.metrics.get(each.metric) for each in objectives] for number, member in self.members.items()
        }
        return {
            number: [float(value) for value in row if value is not None]
            for number, row in rows.items()
            if all(value is not None and math.isfinite(value) for value in row)
        }

    def ranked(self) -> list[tuple[int, Standing]]:
        """Return the members by number, the best scores first; those without one last."""

        def rank(item: tuple[int, Standing]) -> tuple[bool, float, int]:
            score = item[1].score
            return (score is None, 0.0 if score is None else -self.objective.fitness(score), item[0])

        return sorted(self.members.items(), key=rank)


def standings_of(
    objective: Objective, decisions: Iterable[Mapping[str, Any]], reports: Iterable[Mapping[str, Any]]
) -> Standings:
    """Return where a search stands after all its rows."""
    standings = Standings(objective)
    for row in decisions:
        standings.decided(row)
    for row in reports:
        standings.reported(row)
    return standings
