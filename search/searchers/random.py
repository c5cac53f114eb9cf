"""Random search: independent draws, the baseline of every search."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from search.chooser import Configuration
from search.rng import keyed_generator
from search.searcher import Candidate, Searcher
from search.searchers.proposals import key_of, new_draw
from search.space import Space

REDRAWS = 100
"""Draws in a row that were asked already, before what is left of the space is gone through."""


class RandomSearcher(Searcher):
    """Draws each candidate from the space, whatever came of the others; none twice."""

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(space, seed)
        self._asked: dict[str, None] = {}

    def ask(self, numbers: Sequence[int]) -> list[Candidate]:
        """Return a draw for each number, or fewer where the space is spent."""
        candidates = []
        for number in numbers:
            drawn = self._draw(keyed_generator(self.seed, "candidate", number))
            if drawn is None:
                break
            self._asked[key_of(drawn)] = None
            candidates.append(Candidate(number, drawn))
        return candidates

    def state_dict(self) -> dict[str, Any]:
        """Return what was asked."""
        return {"asked": list(self._asked)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was asked."""
        self._asked = dict.fromkeys(state["asked"])

    def _draw(self, rng: np.random.Generator) -> Configuration | None:
        for _ in range(REDRAWS):
            drawn = self.space.sample(rng)
            if key_of(drawn) not in self._asked:
                return drawn
        return new_draw(self.space, self._asked, rng)
