"""Quasi-random search: a scrambled Sobol sequence over the decisions."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import qmc

from search.chooser import Configuration
from search.domains import Domain
from search.rng import keyed_generator, keyed_seed
from search.searchers.proposals import NonRepeatingSearcher, key_of, new_draw
from search.space import Space

MAX_DIMENSIONS = 256
"""Decisions of a configuration that have a dimension of the sequence; later ones are drawn."""

MAX_SKIPPED = 200
"""Points in a row that were asked already or are over the limits of the space."""


class SobolSearcher(NonRepeatingSearcher):
    """Proposes the points of a Sobol sequence, which fill the space more evenly than draws.

    The i-th decision of a configuration takes the i-th coordinate, so a decision that only some configurations take
    shares its coordinate with what others take in its place.

    Source: Sobol 1967; scrambled as in Owen 1998.
    """

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(space, seed)
        self._points = 0
        self._sequence = self._sequence_after(0)

    def state_dict(self) -> dict[str, Any]:
        """Return how many points of the sequence are used up, and what was proposed."""
        return {"points": self._points, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after these points."""
        super().load_state_dict(state)
        self._points = state["points"]
        self._sequence = self._sequence_after(self._points)

    def _sequence_after(self, points: int) -> qmc.Sobol:
        sequence = qmc.Sobol(MAX_DIMENSIONS, rng=np.random.default_rng(keyed_seed(self.seed, "sobol")))
        return sequence.fast_forward(points) if points else sequence

    def _propose(self, number: int) -> Configuration | None:
        """Return the next new point within the limits of the space; after too many others, a new draw within."""
        for _ in range(MAX_SKIPPED):
            self._points += 1
            configuration = self._at(number, self._sequence.random()[0])
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
