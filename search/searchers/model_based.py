"""Searchers that model all results so far: their book-keeping."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from search.chooser import Configuration, replaying, sampling
from search.rng import keyed_generator
from search.searcher import Candidate, CandidateResult
from search.searchers.proposals import SequentialSearcher, key_of, new_draw, unasked
from search.space import Space
from search.surrogate.encoding import FloatArray
from search.surrogate.targets import standardised


class ModelBasedSearcher(SequentialSearcher):
    """Keeps all candidates and results, and proposes what was not asked yet.

    Args:
        space: what is searched.
        seed: of all draws.
    """

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(space, seed)
        self._configurations: dict[int, Configuration] = {}
        self._fitness: dict[int, float | None] = {}

    def tell(self, results: Sequence[CandidateResult]) -> None:
        """Learn from results."""
        for result in results:
            self._configurations[result.candidate.number] = result.candidate.configuration
            self._fitness[result.candidate.number] = result.fitness

    def state_dict(self) -> dict[str, Any]:
        """Return all candidates and results, in the order of the model's rows."""
        return {
            "candidates": [[number, each.genome.values()] for number, each in self._configurations.items()],
            "fitness": list(self._fitness.items()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from all candidates and results."""
        self._configurations = {number: self.space.replay(values) for number, values in state["candidates"]}
        self._fitness = dict(state["fitness"])

    def _propose(self, number: int) -> Configuration | None:
        """Return a configuration that was not asked yet, or None where the space is spent."""
        return self._choose(keyed_generator(self.seed, "candidate", number))

    @abstractmethod
    def _choose(self, rng: np.random.Generator) -> Configuration | None:
        """Return a configuration that was not asked yet, or None where the space is spent."""

    def _record(self, candidate: Candidate) -> None:
        """Keep it."""
        self._configurations[candidate.number] = candidate.configuration

    @property
    def _measured(self) -> int:
        """Number of candidates that did not fail."""
        return sum(value is not None for value in self._fitness.values())

    def _targets(self) -> FloatArray:
        """Return the standardised losses of all candidates, failures and outstanding ones included."""
        losses = [self._fitness.get(number, np.nan) for number in self._configurations]
        return standardised(-np.array([-np.inf if loss is None else loss for loss in losses]))

    def _best(self, count: int) -> list[dict[str, Any]]:
        """Return the decisions of the best candidates."""
        told = [(value, number) for number, value in self._fitness.items() if value is not None]
        return [self._configurations[number].genome.values() for _, number in sorted(told, reverse=True)[:count]]

    def _asked(self) -> set[str]:
        return {key_of(configuration) for configuration in self._configurations.values()}

    def _draw(self, rng: np.random.Generator) -> Configuration | None:
        """Return a random configuration that was not asked yet; None where the space is spent."""
        return new_draw(self.space, self._asked(), rng)

    def _unasked(self, drawn: Iterable[Configuration]) -> Iterator[Configuration]:
        """Yield those of `drawn` that were not asked yet, each once."""
        return unasked(self.space, self._asked(), drawn)

    def _first_allowed(self, pool: Sequence[Configuration], values: FloatArray) -> Configuration | None:
        """Return the configuration of the highest value, among those within the limits of the space."""
        return next((pool[place] for place in np.argsort(-values) if self.space.allows(pool[place])), None)

    def _mutants(
        self, parents: Sequence[Mapping[str, Any]], count: int, rng: np.random.Generator
    ) -> Iterator[Configuration]:
        """Yield children of each parent in turn, with two decisions drawn anew on average."""
        for place in range(count if parents else 0):
            parent = parents[place % len(parents)]
            kept = {name: value for name, value in parent.items() if rng.random() >= 2 / len(parent)}
            yield self.space.run(replaying(kept, sampling(rng)))
