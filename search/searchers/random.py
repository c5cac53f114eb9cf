"""Random search: independent draws, the baseline of every search."""

from search.chooser import Configuration
from search.rng import keyed_generator
from search.searchers.proposals import NonRepeatingSearcher, key_of, new_draw

REDRAWS = 100
"""Draws in a row that were asked already, before what is left of the space is gone through."""


class RandomSearcher(NonRepeatingSearcher):
    """Draws each candidate from the space, whatever came of the others; none twice."""

    def _propose(self, number: int) -> Configuration | None:
        rng = keyed_generator(self.seed, "candidate", number)
        for _ in range(REDRAWS):
            drawn = self.space.sample(rng)
            if key_of(drawn) not in self._asked:
                return drawn
        return new_draw(self.space, self._asked, rng)
