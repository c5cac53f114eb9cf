"""Random search: independent draws, the baseline of every search."""

from collections.abc import Sequence

from search.rng import keyed_generator
from search.searcher import Candidate, Searcher


class RandomSearcher(Searcher):
    """Draws each candidate from the space, whatever came of the others."""

    def ask(self, numbers: Sequence[int]) -> list[Candidate]:
        """Return a draw for each number."""
        return [
            Candidate(number, self.space.sample(keyed_generator(self.seed, "candidate", number))) for number in numbers
        ]
