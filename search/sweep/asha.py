"""Asynchronous successive halving, with promotion: trials pause, and go on from where they paused."""

from collections.abc import Mapping
from typing import Any

from search.sweep.pruner import Pruner


class SuccessiveHalving(Pruner):
    """Of the trials that reach a rung, the best 1 / eta are trained to the next one, with eta times the steps.

    A trial pauses at every rung. Whenever there is room, the best paused trial among the best 1 / eta of its rung goes
    on, from the highest rung that has one; where none has, a new trial begins. Nothing waits for a rung to be full,
    and a paused trial is kept until it cannot be promoted any more.

    Source: Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning, algorithm 2 (ASHA).

    Args:
        steps: of a whole training.
        interval: steps to the lowest rung.
        eta: see above.
        trials: that can begin.
    """

    def __init__(self, steps: int, interval: int, eta: int, trials: int) -> None:
        super().__init__(steps)
        self._eta = eta
        self._rungs: list[int] = []
        while interval < steps:
            self._rungs.append(interval)
            interval *= eta
        self._rungs.append(steps)
        self._trials = trials
        self._scores: list[dict[int, float]] = [{} for _ in self._rungs]
        self._promoted: list[set[int]] = [set() for _ in self._rungs]

    def first_step(self, trial: int) -> int:  # noqa: ARG002
        """Return the lowest rung."""
        return self._rungs[0]

    def judge(self, trial: int, step: int, fitness: float, changes: Mapping[str, Any]) -> int | None:  # noqa: ARG002
        """Note a score on its rung; the trial pauses."""
        self._scores[self._rungs.index(step)][trial] = fitness
        return None

    def promote(self) -> tuple[int, int] | None:
        """Return the best trial that can go on, from the highest rung where there is one."""
        for level in reversed(range(len(self._rungs) - 1)):
            best = self._ranked(level)[: len(self._scores[level]) // self._eta]
            for trial in best:
                if trial not in self._promoted[level]:
                    self._promoted[level].add(trial)
                    return trial, self._rungs[level + 1]
        return None

    def promotable(self) -> set[int]:
        """Return the trials that would be among the best 1 / eta of their rung if all others came as far."""
        return {
            trial
            for level in range(len(self._rungs) - 1)
            for trial in self._ranked(level)[: self._trials // self._eta]
            if trial not in self._promoted[level]
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the scores and promotions of all rungs."""
        return {
            "scores": [sorted(scores.items()) for scores in self._scores],
            "promoted": [sorted(promoted) for promoted in self._promoted],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the scores and promotions of all rungs."""
        self._scores = [dict(scores) for scores in state["scores"]]
        self._promoted = [set(promoted) for promoted in state["promoted"]]

    def _ranked(self, level: int) -> list[int]:
        """Return the trials of a rung, the best first; of equals, the earlier one counts as better."""
        scores = self._scores[level]
        return sorted(scores, key=lambda trial: (-scores[trial], trial))
