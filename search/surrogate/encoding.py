"""Configurations as arrays of codes: one column for each decision."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from search.chooser import Configuration
from search.domains import Domain

FloatArray = NDArray[np.float64]

GRID = 64
"""Intervals that a scale of numbers is cut into: far finer than the length scales of a surrogate."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The decisions of n configurations.

    Attributes:
        paths: the d decisions that any of them takes.
        ordered: shape (d,), whether the values of a decision have an order.
        codes: shape (n, d): 0 where a decision is not active; else 1 + the position on the scale, in units of 1 / GRID,
            or 1 + the index of the value among those without an order.
    """

    paths: tuple[str, ...]
    ordered: NDArray[np.bool_]
    codes: NDArray[np.intp]

    @classmethod
    def of(cls, configurations: Sequence[Configuration]) -> Self:
        """Encode configurations.

        >>> from search.space import Space
        >>> space = Space(lambda choose: {"lr": choose.float("lr", 1e-4, 1e-2, log=True)})
        >>> Encoded.of([space.replay({"lr": 1e-3})]).codes.tolist()
        [[33]]
        """
        domains: dict[str, Domain] = {}
        for configuration in configurations:
            for decision in configuration.genome.decisions:
                domains.setdefault(decision.path, decision.domain)
        columns = {path: column for column, path in enumerate(domains)}
        codes = np.zeros((len(configurations), len(columns)), np.intp)
        for row, configuration in enumerate(configurations):
            for decision in configuration.genome.decisions:
                codes[row, columns[decision.path]] = 1 + _code(decision.domain, decision.value)
        ordered = np.array([domain.unit(domain.extremes()[0]) is not None for domain in domains.values()], bool)
        return cls(tuple(columns), ordered, codes)

    def rows(self, places: NDArray[np.intp]) -> "Encoded":
        """Return some of the configurations, with the same decisions."""
        return Encoded(self.paths, self.ordered, self.codes[places])

    def distances(self) -> FloatArray:
        """Return how far two codes of a decision are apart, shape (d, c, c) for c codes.

        That is the difference of positions, or 0 and 1 for equal and unequal values without an order. A decision that
        only one of two configurations takes counts 1.
        """
        count = int(self.codes.max(initial=0)) + 1
        codes = np.arange(count)
        apart = np.abs(codes[:, None] - codes) / GRID
        unequal = 1.0 - np.eye(count)
        tables: FloatArray = np.where(self.ordered[:, None, None], apart, unequal)
        tables[:, 0, 1:] = tables[:, 1:, 0] = 1.0
        return tables


def _code(domain: Domain, value: Any) -> int:
    position = domain.unit(value)
    return domain.index(value) if position is None else round(position * GRID)
