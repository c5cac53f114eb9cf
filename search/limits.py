"""Limits of a search space: candidates over them are never asked."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field

from raytrain.recipe import Section

Measure = Callable[[Mapping[str, Any]], int]
"""Changes of the base recipe -> a statistic of its model, known without training."""


class LimitOptions(Section):
    """What candidates have to keep to.

    Attributes:
        parameters: most parameters of the model; 0: any number.
    """

    parameters: int = Field(0, ge=0)


class Limit:
    """At most `bound` of a statistic.

    Args:
        field: of the recipe that sets the bound.
        bound: the bound.
        measure: the statistic.
    """

    def __init__(self, field: str, bound: int, measure: Measure) -> None:
        self.field = field
        self.bound = bound
        self._measure = measure
        self._smallest: int | None = None

    def allows(self, changes: Mapping[str, Any]) -> bool:
        """Return whether a candidate keeps to the limit."""
        measured = self._measure(changes)
        self._smallest = measured if self._smallest is None else min(measured, self._smallest)
        return measured <= self.bound

    def refusal(self, draws: int) -> str:
        """Return what to say if no draw keeps to it."""
        smallest = "" if self._smallest is None else f"; the smallest has {self._smallest:,}"
        return f"{self.field}: none of {draws:,} draws has at most {self.bound:,}{smallest}"
