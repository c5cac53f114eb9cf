"""Quasi-random search: a scrambled Sobol sequence over the decisions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import qmc

from search.chooser import Configuration
from search.domains import Domain
from search.rng import keyed_generator, keyed_seed
from search.searcher import Candidate, Searcher
from search.searchers.proposals import key_of, new_draw
from search.space import Space

MAX_DIMENSIONS = 256
"""Decisions of a configuration that have a dimension of the sequence; later ones are drawn."""

MAX_SKIPPED = 200
"""Points in a row that were asked already or are over the limits of the space."""


class SobolSearcher(Searcher):
    """Proposes the points of a Sobol sequence, which fill the space more evenly than draws.

    The i-th decision of a configuration takes the i-th coordinate, so a decision that only some configurations take
    shares its coordinate with what others take in its place.

    Source: Sobol 1967; scrambled as in Owen 1998.
    """

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(space, seed)
        self._points = 0
        self._asked: dict[str, None] = {}

    def ask(self, numbers: Sequence[int]) -> list[Candidate]:
        """Return the next points of the sequence that are new, or fewer where the space is spent."""
        engine = qmc.Sobol(MAX_DIMENSIONS, rng=np.random.default_rng(keyed_seed(self.seed, "sobol")))
        if self._points:
            engine.fast_forward(self._points)
        candidates = []
        for number in numbers:
            configuration = self._next(number, engine)
            if configuration is None:
                break
            self._asked[key_of(configuration)] = None
            candidates.append(Candidate(number, configuration))
        return candidates

    def state_dict(self) -> dict[str, Any]:
        """Return how many points of the sequence are used up, and what was asked."""
        return {"points": self._points, "asked": list(self._asked)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after these points."""
        self._points, self._asked = state["points"], dict.fromkeys(state["asked"])

    def _next(self, number: int, engine: qmc.Sobol) -> Configuration | None:
        """Return the next new point within the limits of the space; after too many others, a new draw within."""
        for _ in range(MAX_SKIPPED):
            self._points += 1
            configuration = self._at(number, engine.random()[0])
            if key_of(configuration) not in self._asked and self.space.allows(configuration):
                return configuration
        return new_draw(self.space, self._asked, keyed_generator(self.seed, "candidate", number))

    def _at(self, number: int, point: np.ndarray[Any, Any]) -> Configuration:
        coordinates = iter(point.tolist())
        rest = keyed_generator(self.seed, "candidate", number)

        def decide(_: str, domain: Domain) -> Any:
            coordinate = next(coordinates, None)
            return domain.sample(rest) if coordinate is None else domain.at(coordinate)

        return self.space.run(decide)
