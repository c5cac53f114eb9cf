"""Quasi-random search: a scrambled Sobol sequence over the decisions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import qmc

from search.domains import Domain
from search.rng import keyed_generator, keyed_seed
from search.searcher import Candidate, Searcher
from search.space import Space

MAX_DIMENSIONS = 256
"""Decisions of a configuration that have a dimension of the sequence; later ones are drawn."""


class SobolSearcher(Searcher):
    """Proposes the points of a Sobol sequence, which fill the space more evenly than draws.

    The i-th decision of a configuration takes the i-th coordinate, so a decision that only some configurations take
    shares its coordinate with what others take in its place.

    Source: Sobol 1967; scrambled as in Owen 1998.
    """

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(space, seed)
        self._asked = 0

    def ask(self, numbers: Sequence[int]) -> list[Candidate]:
        """Return the next points of the sequence."""
        engine = qmc.Sobol(MAX_DIMENSIONS, rng=np.random.default_rng(keyed_seed(self.seed, "sobol")))
        if self._asked:
            engine.fast_forward(self._asked)
        points = [engine.random()[0] for _ in numbers]
        self._asked += len(numbers)
        return [self._at(number, point) for number, point in zip(numbers, points, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return how many points were proposed."""
        return {"asked": self._asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the points that were proposed."""
        self._asked = state["asked"]

    def _at(self, number: int, point: np.ndarray[Any, Any]) -> Candidate:
        coordinates = iter(point.tolist())
        rest = keyed_generator(self.seed, "candidate", number)

        def decide(_: str, domain: Domain) -> Any:
            coordinate = next(coordinates, None)
            return domain.sample(rest) if coordinate is None else domain.at(coordinate)

        return Candidate(number, self.space.run(decide))
