"""Bayesian optimisation with a Gaussian process."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from search.chooser import replaying, sampling
from search.genome import Configuration
from search.rng import keyed_generator
from search.searcher import Candidate, CandidateResult, Searcher
from search.searchers.grid import grid_points
from search.space import Space
from search.surrogate.encoding import GRID, Encoded, FloatArray
from search.surrogate.gaussian_process import Hyperparameters, walk

INITIAL = 6
"""Candidates that are drawn at random before the first model."""
ACQUISITION_SAMPLES = 1000
MUTANTS = 300
PARENTS = 5
DRAWS = 4
"""Draws of the hyperparameters, whose expected improvements are averaged."""
ACQUISITION_STEPS = 6
"""Metropolis steps of each draw for a candidate; it goes on where it was for the last one."""
MAX_ENUMERATED = 100_000


class GaussianProcessSearcher(Searcher):
    """Proposes what a Gaussian process over the decisions expects to improve most.

    The process models standardised losses: the logarithm where all are positive, and no worse than as far above the
    median as the best is below, since how bad a bad one is says nothing of the good ones. Failures count as the worst,
    and outstanding candidates as the mean (constant liar, Ginsbourger et al. 2010). The improvement is maximised over
    random configurations and mutants of the best.

    Source: Mockus 1978; Snoek et al. 2012.
    """

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(space, seed)
        self._configurations: dict[int, Configuration] = {}
        self._fitness: dict[int, float | None] = {}
        self._draws: list[dict[str, Any]] = [{} for _ in range(DRAWS)]

    def ask(self, numbers: Sequence[int]) -> list[Candidate]:
        """Return a proposal for each number, or fewer where the space is spent."""
        candidates = []
        for number in numbers:
            configuration = self._propose(keyed_generator(self.seed, "candidate", number))
            if configuration is None:
                break
            self._configurations[number] = configuration
            candidates.append(Candidate(number, configuration))
        return candidates

    def tell(self, results: Sequence[CandidateResult]) -> None:
        """Learn from results."""
        for result in results:
            self._configurations[result.candidate.number] = result.candidate.configuration
            self._fitness[result.candidate.number] = result.fitness

    def state_dict(self) -> dict[str, Any]:
        """Return all candidates, results and draws of hyperparameters."""
        return {
            "candidates": [[number, each.genome.values()] for number, each in sorted(self._configurations.items())],
            "fitness": sorted(self._fitness.items()),
            "draws": self._draws,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from all candidates, results and draws of hyperparameters."""
        self._configurations = {number: self.space.replay(values) for number, values in state["candidates"]}
        self._fitness = dict(state["fitness"])
        self._draws = list(state["draws"])

    def _propose(self, rng: np.random.Generator) -> Configuration | None:
        asked = {_key(configuration) for configuration in self._configurations.values()}
        if len(self._configurations) < INITIAL or not any(value is not None for value in self._fitness.values()):
            return next(self._new(asked, rng, 1), None)
        pool = list(self._new(asked, rng, ACQUISITION_SAMPLES))
        if not pool:
            return None
        known = list(self._configurations.values())
        encoded = Encoded.of([*known, *pool])
        improvement = self._improvement(encoded, slice(len(known), None), rng)
        return pool[int(improvement.argmax())]

    def _improvement(self, encoded: Encoded, rows: slice, rng: np.random.Generator) -> FloatArray:
        """Return the expected improvement of some rows, averaged over draws of the hyperparameters."""
        targets = self._targets()
        total = np.zeros(len(encoded.codes[rows]))
        for place, draw in enumerate(self._draws):
            process = walk(encoded, targets, _hyperparameters(draw, encoded), ACQUISITION_STEPS, rng)
            self._draws[place] = _plain(process.hyperparameters, encoded)
            total += process.expected_improvement(rows)
        return total

    def _targets(self) -> FloatArray:
        """Return what the process models of each candidate, lower being better."""
        measured = -np.array([value for value in self._fitness.values() if value is not None])
        losses = {number: -value for number, value in self._fitness.items() if value is not None}
        logarithmic = bool((measured > 0).all())
        scores = np.log(measured) if logarithmic else measured
        median = float(np.median(scores))
        ceiling = 2 * median - float(scores.min())
        mean = float(np.minimum(scores, ceiling).mean())
        values = []
        for number in self._configurations:
            if number in losses:
                loss = losses[number]
                values.append(min(float(np.log(loss)) if logarithmic else loss, ceiling))
            else:
                values.append(ceiling if number in self._fitness else mean)
        targets = np.array(values)
        standardised: FloatArray = (targets - targets.mean()) / (targets.std() or 1.0)
        return standardised

    def _new(self, asked: set[str], rng: np.random.Generator, count: int) -> Iterator[Configuration]:
        """Yield configurations that were not asked yet: random ones, then mutants of the best.

        Where all of these were asked, the space is gone through; it is spent where that yields nothing.
        """
        seen = set(asked)
        for configuration in self._drawn(rng, count):
            if (key := _key(configuration)) not in seen:
                seen.add(key)
                yield configuration
        if seen == asked:
            every = islice(grid_points(self.space, GRID), MAX_ENUMERATED)
            yield from islice((point for point in every if _key(point) not in asked), 1)

    def _drawn(self, rng: np.random.Generator, count: int) -> Iterator[Configuration]:
        yield from (self.space.sample(rng) for _ in range(count))
        if count == 1:
            return
        fitness = [(value, number) for number, value in self._fitness.items() if value is not None]
        best = [self._configurations[number].genome.values() for _, number in sorted(fitness, reverse=True)[:PARENTS]]
        for place in range(MUTANTS):
            parent = best[place % len(best)]
            kept = {name: value for name, value in parent.items() if rng.random() >= 2 / len(parent)}
            yield self.space.run(replaying(kept, sampling(rng)))


def _key(configuration: Configuration) -> str:
    return json.dumps(configuration.genome.values(), sort_keys=True)


def _hyperparameters(draw: Mapping[str, Any], encoded: Encoded) -> Hyperparameters:
    """Return hyperparameters as an earlier proposal left them; decisions that are new have those of the prior."""
    prior = Hyperparameters.prior(encoded.ordered)
    lengths = draw.get("lengths", {})
    known = [lengths.get(path, median) for path, median in zip(encoded.paths, prior.lengths.tolist(), strict=True)]
    return Hyperparameters(np.array(known), draw.get("additive", prior.additive), draw.get("noise", prior.noise))


def _plain(hyperparameters: Hyperparameters, encoded: Encoded) -> dict[str, Any]:
    lengths = dict(zip(encoded.paths, hyperparameters.lengths.tolist(), strict=True))
    return {"lengths": lengths, "additive": hyperparameters.additive, "noise": hyperparameters.noise}
