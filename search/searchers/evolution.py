"""Regularised evolution."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from search.chooser import Configuration, replaying, sampling
from search.rng import keyed_generator
from search.searcher import CandidateResult
from search.searchers.proposals import NonRepeatingSearcher, key_of, new_draw
from search.space import Space

POPULATION = 20
TOURNAMENT = 5
MUTATION_ATTEMPTS = 100
"""Mutations that were asked already or are over the limits of the space, before a candidate is drawn instead."""


class EvolutionSearcher(NonRepeatingSearcher):
    """Mutates the best of a few of the newest candidates; the oldest leave, however good they are.

    A mutation draws one decision anew, and those that become active by it.

    Source: Real et al. 2019, Algorithm 1.
    """

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(space, seed)
        self._results: dict[int, tuple[Configuration, float]] = {}

    def tell(self, results: Sequence[CandidateResult]) -> None:
        """Learn from results; failures never become parents."""
        for result in results:
            number = result.candidate.number
            self._results.pop(number, None)
            if result.fitness is not None:
                self._results[number] = (result.candidate.configuration, result.fitness)
        self._results = dict(list(self._results.items())[-POPULATION:])

    def state_dict(self) -> dict[str, Any]:
        """Return the population, the oldest first, and what was proposed."""
        rows = [[number, each.genome.values(), fitness] for number, (each, fitness) in self._results.items()]
        return {"population": rows, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a population and what was proposed."""
        super().load_state_dict(state)
        self._results = {
            number: (self.space.replay(values), fitness) for number, values, fitness in state["population"]
        }

    def _propose(self, number: int) -> Configuration:
        """Return a child of the population; the first ones are drawn, and what is drawn repeats in a spent space."""
        rng = keyed_generator(self.seed, "candidate", number)
        if len(self._results) < TOURNAMENT or self.space.is_single():
            return self._draw(rng)
        members = list(self._results.values())
        chosen = [members[place] for place in rng.choice(len(members), TOURNAMENT, replace=False)]
        parent = max(chosen, key=lambda member: member[1])[0].genome.values()
        for _ in range(MUTATION_ATTEMPTS):
            mutated = str(rng.choice(list(parent)))
            kept = {path: value for path, value in parent.items() if path != mutated}
            child = self.space.run(replaying(kept, sampling(rng)))
            if key_of(child) not in self._asked and child.genome.values() != parent and self.space.allows(child):
                return child
        return self._draw(rng)

    def _draw(self, rng: np.random.Generator) -> Configuration:
        return new_draw(self.space, self._asked, rng) or self.space.sample(rng)
