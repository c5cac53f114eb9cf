"""Neural architecture-recipe search (NARS): evolution guided by a predictor of the score."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from raytrain.registry import resolve
from search.chooser import Configuration, crossing, sampling
from search.predictor.predictor import Predictor, rank_correlations
from search.searchers.model_based import ModelBasedSearcher
from search.space import Space
from search.surrogate.acquisition import expected_improvement
from search.tables import PREDICTORS

NARS_INITIAL = 8
"""Candidates that are drawn at random before the first prediction."""
NARS_PARENTS = 20
"""Evaluated candidates that evolution begins with, the best ones."""
DRAWN = 200
"""Random ones that it begins with."""
CHILDREN = 60
"""Of a generation: half mutants, half of two parents."""
SURVIVORS = 30
MAX_GENERATIONS = 30
TOLERANCE = 1e-6
"""Improvement of the best score of a generation below which evolution has converged."""
GROWTH = 1.25
"""Factor by which results have to grow in number until the predictor is chosen again."""


class NARSSearcher(ModelBasedSearcher):
    """Proposes what a predictor expects to improve most, found by evolution that the predictor scores.

    The predictor is the one of the table whose leave-one-out predictions rank the results best, chosen again as they
    grow in number; `remark` says which. What is over the limits of the space is never a candidate.

    Args:
        space: what is searched.
        seed: of all draws.
        predictor: name of a predictor; "": the best.

    Source: Dai et al. 2021, FBNetV3: Joint Architecture-Recipe Search; there the predictor is a network.
    """

    def __init__(self, space: Space, seed: int, predictor: str = "") -> None:
        super().__init__(space, seed)
        self._forced = predictor
        self._correlations: dict[str, float] = {}
        self._compared = 0

    def remark(self) -> dict[str, Any]:
        """Return which predictor the last proposal went by, and the leave-one-out rank correlation of each."""
        correlations = {name: round(value, 3) for name, value in self._correlations.items()}
        return {"predictor": self._predictor_name, "rank_correlations": correlations} if correlations else {}

    def state_dict(self) -> dict[str, Any]:
        """Return all candidates, results and the last comparison of predictors."""
        return {**super().state_dict(), "correlations": self._correlations, "compared": self._compared}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from all candidates, results and the last comparison of predictors."""
        super().load_state_dict(state)
        self._correlations, self._compared = dict(state["correlations"]), state["compared"]

    @property
    def _predictor_name(self) -> str:
        return self._forced or max(PREDICTORS, key=lambda name: self._correlations.get(name, 0.0))

    def _choose(self, rng: np.random.Generator) -> Configuration | None:
        if len(self._configurations) < NARS_INITIAL or not self._measured:
            return self._draw(rng)
        known, targets = list(self._configurations.values()), self._targets()
        if len(self._fitness) >= GROWTH * self._compared:
            self._correlations = dict(rank_correlations(known, targets, rng))
            self._compared = len(self._fitness)
        predictor: Predictor = resolve(PREDICTORS, self._predictor_name, "search.predictor")()
        predictor.fit(known, targets, rng)
        best = float(predictor.predict(known)[0].min())
        return self._evolve(predictor, best, rng) or self._draw(rng)

    def _evolve(self, predictor: Predictor, best: float, rng: np.random.Generator) -> Configuration | None:
        """Return the candidate of the highest score when evolution has converged; None if all were asked."""
        population = self._scored(self._first_generation(rng), predictor, best)
        for _ in range(MAX_GENERATIONS):
            if not population:
                return None
            before = population[0][0]
            children = self._scored(self._children([each for _, each in population], rng), predictor, best)
            population = sorted([*population, *children], key=lambda pair: -pair[0])[:SURVIVORS]
            if population[0][0] - before < TOLERANCE:
                break
        return population[0][1]

    def _first_generation(self, rng: np.random.Generator) -> Iterator[Configuration]:
        draws = (self.space.run(sampling(rng)) for _ in range(DRAWN))
        return chain(draws, self._mutants(self._best(NARS_PARENTS), CHILDREN, rng))

    def _children(self, population: Sequence[Configuration], rng: np.random.Generator) -> Iterator[Configuration]:
        parents = [each.genome.values() for each in population]
        yield from self._mutants(parents, CHILDREN // 2, rng)
        for _ in range(CHILDREN // 2):
            first, second = (parents[place] for place in rng.integers(len(parents), size=2))
            yield self.space.run(crossing(first, second, rng))

    def _scored(
        self, drawn: Iterator[Configuration], predictor: Predictor, best: float
    ) -> list[tuple[float, Configuration]]:
        """Return (expected improvement, configuration) of those that may be asked, the best first."""
        pool = [each for each in self._unasked(drawn) if self.space.allows(each)]
        if not pool:
            return []
        scores = expected_improvement(*predictor.predict(pool), best)
        return [(float(scores[place]), pool[place]) for place in np.argsort(-scores)]
