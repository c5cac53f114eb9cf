"""Limits of a search space: candidates over them are never asked."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field

from raytrain.recipe import Section

Measure = Callable[[Mapping[str, Any]], float]
"""Changes of the base recipe -> a statistic of its model, known without training."""


class LimitOptions(Section):
    """What candidates have to keep to; 0: any.

    Attributes:
        parameters: most parameters of the model.
        flops: most floating-point operations of a forward pass of one example.
        memory_mb: most memory of training in MiB, as estimated from weights and activations of a batch.
        latency_ms: longest forward pass of one example on a thread of this machine's processor, in milliseconds. It is
            measured, so that candidates near the bound can be refused on another day.
    """

    parameters: int = Field(0, ge=0)
    flops: float = Field(0, ge=0)
    memory_mb: float = Field(0, ge=0)
    latency_ms: float = Field(0, ge=0)

    def bounds(self) -> dict[str, float]:
        """Return statistic -> its bound, of those that have one, the cheapest to measure first."""
        return {name: bound for name in STATISTICS if (bound := getattr(self, name))}


STATISTICS = tuple(LimitOptions.model_fields)
"""Names of the statistics of a model that are known without training; lower is better."""


class Limit:
    """At most `bound` of a statistic.

    Args:
        field: of the recipe that sets the bound.
        bound: the bound.
        measure: the statistic.

    Attributes:
        met: whether a candidate has kept to it.
    """

    def __init__(self, field: str, bound: float, measure: Measure) -> None:
        self.field = field
        self.bound = bound
        self.met = False
        self._measure = measure
        self._smallest: float | None = None

    def allows(self, changes: Mapping[str, Any]) -> bool:
        """Return whether a candidate keeps to the limit."""
        measured = self._measure(changes)
        self._smallest = measured if self._smallest is None else min(measured, self._smallest)
        self.met |= measured <= self.bound
        return measured <= self.bound

    def refusal(self, draws: int) -> str:
        """Return what to say if no draw keeps to it and to the limits before it."""
        smallest = "" if self._smallest is None else f"; the smallest has {self._smallest:,.10g}"
        return f"{self.field}: none of {draws:,} draws has at most {self.bound:,.10g}{smallest}"
