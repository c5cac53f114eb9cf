"""How many candidates a space has."""

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from search.chooser import Policy
from search.domains import Domain, Int
from search.rng import keyed_generator
from search.searchers.grid import grid_points
from search.space import Space

ENUMERATED = 20_000
COUNT_LIMIT = 10**12
SIZE_PROBES = 400


@dataclass(frozen=True, slots=True)
class SpaceSize:
    """The number of candidates of a space.

    Attributes:
        count: of values that are listed or whole numbers; infinite if some are real.
        exact: whether all were enumerated; else the count is estimated.
    """

    count: float
    exact: bool

    def __str__(self) -> str:
        """Return the number in words."""
        if self.count == 1:
            return "1 candidate"
        if math.isinf(self.count):
            return "more than 10^12 candidates, some real-valued"
        if self.count > COUNT_LIMIT:
            return "more than 10^12 candidates"
        return f"{self.count:,.0f} candidates" if self.exact else f"about {self.count:.2g} candidates"


def space_size(space: Space) -> SpaceSize:
    """Return how many candidates a space has: enumerated up to 20,000, else estimated.

    The estimate is the mean, over paths of uniform choices, of the product of the numbers of values on the path.

    Source: Knuth 1975, Estimating the Efficiency of Backtrack Programs, section 2.
    """
    products = []
    for number in range(SIZE_PROBES):
        decisions = space.run(_uniform(keyed_generator(0, "probe", number))).genome.decisions
        products.append(math.prod(decision.domain.count for decision in decisions))
    if math.isinf(max(products)):
        return SpaceSize(math.inf, exact=False)
    if max(products) <= ENUMERATED:
        count = sum(1 for _ in islice(grid_points(space, ENUMERATED + 1), ENUMERATED + 1))
        if count <= ENUMERATED:
            return SpaceSize(count, exact=True)
    return SpaceSize(float(np.mean(products)), exact=False)


def _uniform(rng: np.random.Generator) -> Policy:
    """Return the policy that draws each value of a finite domain with equal probability, whatever its scale."""

    def decide(_: str, domain: Domain) -> Any:
        if math.isinf(domain.count):
            return domain.sample(rng)
        index = int(rng.integers(int(domain.count)))
        return domain.low + index if isinstance(domain, Int) else domain.extremes()[index]

    return decide
