"""Pruners: how far each trial of a sweep is trained."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


class Pruner(ABC):
    """Decides, from the scores of all trials, which go on and how far.

    Args:
        steps: of a whole training.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def first_step(self, trial: int) -> int:  # noqa: ARG002
        """Return the step that a new trial is trained to."""
        return self.steps

    @abstractmethod
    def judge(self, trial: int, step: int, fitness: float, changes: Mapping[str, Any]) -> int | None:
        """Learn a trial's score at a step; return the step to train it to at once, or None.

        Args:
            trial: its number.
            step: optimizer steps done.
            fitness: higher is better.
            changes: of the base recipe.
        """

    def promote(self) -> tuple[int, int] | None:
        """Return a trial that paused and should go on now, and the step to train it to; None if there is none."""
        return None

    def promotable(self) -> set[int]:
        """Return the trials that paused and can still be promoted, now or later."""
        return set()

    def remark(self) -> dict[str, Any]:
        """Return what the lineage says of the last judgement beside the score, as plain data."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return all that decisions depend on, as plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - not all have a state
        """Go on from the state of an earlier pruner."""


class NoPruner(Pruner):
    """Trains every trial to the end."""

    def judge(self, trial: int, step: int, fitness: float, changes: Mapping[str, Any]) -> int | None:  # noqa: ARG002
        """Return None: the trial has come to its end."""
        return None
