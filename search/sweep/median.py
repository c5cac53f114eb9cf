"""The median stopping rule."""

from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from search.sweep.pruner import Pruner


class MedianStopping(Pruner):
    """Stops a trial whose best score is worse than the median of the others' mean scores up to the same step.

    Source: Golovin et al. 2017, Google Vizier, section 3.2.2 (median automated stopping rule).

    Args:
        steps: of a whole training.
        interval: steps between two judgements.
        least: trials that have to have come as far before one is stopped.
    """

    def __init__(self, steps: int, interval: int, least: int) -> None:
        super().__init__(steps)
        self._interval = interval
        self._least = least
        self._scores: dict[int, list[float]] = {}

    def first_step(self, trial: int) -> int:  # noqa: ARG002
        """Return the first judgement."""
        return min(self._interval, self.steps)

    def judge(self, trial: int, step: int, fitness: float, changes: Mapping[str, Any]) -> int | None:  # noqa: ARG002
        """Return the next judgement, unless the trial is stopped or at its end."""
        own = self._scores.setdefault(trial, [])
        own.append(fitness)
        others = [scores for other, scores in self._scores.items() if other != trial and len(scores) >= len(own)]
        means = [fmean(scores[: len(own)]) for scores in others]
        stopped = len(means) >= self._least and max(own) < median(means)
        return None if stopped or step >= self.steps else min(step + self._interval, self.steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the scores of all trials."""
        return {"scores": sorted(self._scores.items())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the scores of all trials."""
        self._scores = {trial: list(scores) for trial, scores in state["scores"]}
