"""Asynchronous Hyperband: successive halving that begins early, late and not at all, side by side."""

import math
from collections.abc import Mapping
from typing import Any

from search.sweep.asha import SuccessiveHalving
from search.sweep.pruner import Pruner


class HyperbandBrackets(Pruner):
    """Gives each trial to one of several brackets, each a successive halving with another lowest rung.

    A halving that begins early drops trials whose curve begins slowly; one that begins late tries few. Each bracket
    gets as many trials as spend about the same number of steps, so that neither choice costs more than a factor.

    Source: Li et al. 2018, Hyperband, algorithm 1; Li et al. 2020, section 3.2 (asynchronous).

    Args:
        steps: of a whole training.
        interval: steps to the lowest rung of the first bracket.
        eta: of the trials that reach a rung, one in eta goes on, to eta times the steps.
        trials: that can begin.
    """

    def __init__(self, steps: int, interval: int, eta: int, trials: int) -> None:
        super().__init__(steps)
        lowest = [interval]
        while lowest[-1] < steps:
            lowest.append(min(lowest[-1] * eta, steps))
        highest = len(lowest) - 1
        shares = [math.ceil((highest + 1) / (s + 1) * eta**s) for s in range(highest, -1, -1)]
        self._turns = [bracket for bracket, share in enumerate(shares) for _ in range(share)]
        rounds, rest = divmod(trials, len(self._turns))
        counts = [rounds * share + self._turns[:rest].count(bracket) for bracket, share in enumerate(shares)]
        self._brackets = [
            SuccessiveHalving(steps, first, eta, count) for first, count in zip(lowest, counts, strict=True)
        ]

    def first_step(self, trial: int) -> int:
        """Return the lowest rung of the trial's bracket."""
        return self._bracket(trial).first_step(trial)

    def judge(self, trial: int, step: int, fitness: float, changes: Mapping[str, Any]) -> int | None:
        """Note a score on its rung; the trial pauses."""
        return self._bracket(trial).judge(trial, step, fitness, changes)

    def promote(self) -> tuple[int, int] | None:
        """Return the best trial that can go on, of the first bracket where there is one."""
        return next(filter(None, (bracket.promote() for bracket in self._brackets)), None)

    def promotable(self) -> set[int]:
        """Return the trials that can still be promoted in their brackets."""
        return set().union(*(bracket.promotable() for bracket in self._brackets))

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all brackets."""
        return {"brackets": [bracket.state_dict() for bracket in self._brackets]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the states of all brackets."""
        for bracket, its_state in zip(self._brackets, state["brackets"], strict=True):
            bracket.load_state_dict(its_state)

    def _bracket(self, trial: int) -> SuccessiveHalving:
        return self._brackets[self._turns[trial % len(self._turns)]]
