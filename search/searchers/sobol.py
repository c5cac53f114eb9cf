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

MAX_SKIPPED = 1000
"""Points in a row that are over the limits of the space."""


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
        return [self._next(number, engine) for number in numbers]

    def state_dict(self) -> dict[str, Any]:
        """Return how many points of the sequence are used up."""
        return {"asked": self._asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after these points."""
        self._asked = state["asked"]

    def _next(self, number: int, engine: qmc.Sobol) -> Candidate:
        """Return the next point within the limits of the space; after too many outside, a random draw within."""
        for _ in range(MAX_SKIPPED):
            self._asked += 1
            candidate = self._at(number, engine.random()[0])
            if self.space.allows(candidate.configuration):
                return candidate
        return Candidate(number, self.space.sample(keyed_generator(self.seed, "candidate", number)))

    def _at(self, number: int, point: np.ndarray[Any, Any]) -> Candidate:
        coordinates = iter(point.tolist())
        rest = keyed_generator(self.seed, "candidate", number)

        def decide(_: str, domain: Domain) -> Any:
            coordinate = next(coordinates, None)
            return domain.sample(rest) if coordinate is None else domain.at(coordinate)

        return Candidate(number, self.space.run(decide))
