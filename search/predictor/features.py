"""Configurations as rows of numbers, for models that are linear or trees."""

from collections.abc import Sequence

import numpy as np

from search.chooser import Configuration
from search.domains import Domain
from search.surrogate.encoding import FloatArray


class Features:
    """One column for each path and listed value, and for each path with an order its position from 0 to 1.

    Args:
        configurations: whose decisions have columns; those of other paths are left out.
    """

    def __init__(self, configurations: Sequence[Configuration]) -> None:
        domains: dict[str, Domain] = {}
        for configuration in configurations:
            for decision in configuration.genome.decisions:
                domains.setdefault(decision.path, decision.domain)
        self._first: dict[str, int] = {}
        self.count = 0
        for path, domain in domains.items():
            self._first[path] = self.count
            self.count += 2 + (int(domain.count) if domain.is_listed else 0)

    def rows(self, configurations: Sequence[Configuration]) -> FloatArray:
        """Return the features of configurations, shape (n, columns)."""
        found = np.zeros((len(configurations), self.count))
        for row, configuration in zip(found, configurations, strict=True):
            for decision in configuration.genome.decisions:
                if (first := self._first.get(decision.path)) is None:
                    continue
                row[first] = 1.0  # the decision is active
                position = decision.domain.unit(decision.value)
                row[first + 1] = 0.0 if position is None else position
                if decision.domain.is_listed:
                    row[first + 2 + decision.domain.index(decision.value)] = 1.0
        return found
