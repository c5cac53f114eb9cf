"""Population based bandits: hyperparameters by the upper confidence bound of their effect."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from pydantic import Field
from threadpoolctl import threadpool_limits

from search.chooser import Configuration, perturbing
from search.pbt.explore import Explore
from search.pbt.population import Population
from search.pbt.time_varying_gp import Array, Encoder, Inputs, TimeVaryingGP
from search.scheduling.segments import SegmentReport
from search.space import Space

CANDIDATES = 128
KEPT_GENERATIONS = 8
REFINEMENTS = 3
LEAST = 4

Bound = Callable[[Sequence[Configuration]], Array]


class PB2(Explore):
    """Hyperparameters with the highest upper confidence bound of how much they improve the score in an interval.

    f(x, t), the improvement in interval t under hyperparameters x, has a Gaussian process prior that forgets:

        x_next = argmax_x mean(x, t) + sqrt(beta) deviation(x, t),    beta = 0.2 + max(0, log(0.4 n))

    after n observations. The score before the interval is one more input. The deviation counts the configurations that
    other members are training as observed, so members that are decided on together do not all take the same.

    Source: Parker-Holder et al. 2020, PB2 (arXiv 2002.02518), section 3 and algorithm 1; pending points: Desautels et
    al. 2014, GP-BUCB; the process: `search.pbt.time_varying_gp`.

    Attributes:
        window: earlier reports that are learned from.
        factor: what numbers are multiplied or divided by where the best candidates are refined.
    """

    window: int = Field(200, ge=LEAST, le=1000)
    factor: float = Field(1.1, gt=1, lt=2)

    @property
    def memory(self) -> int:
        """How many earlier reports the rule learns from."""
        return self.window

    def propose(self, member: SegmentReport, population: Population, rng: np.random.Generator) -> Configuration:  # noqa: ARG002
        """Return the configuration with the highest bound; with too few observations, a random one."""
        candidates = [population.space.sample(rng) for _ in range(CANDIDATES)]
        if sum(bool(report.segment.history) for report in population.observations) < LEAST:
            return candidates[0]
        with threadpool_limits(1):  # the matrices are small, and the members need the other cores
            return _maximum(_upper_bound(population), candidates, population.space, self.factor, rng)


def _upper_bound(population: Population) -> Bound:
    """Return the function that is maximised, after the population's observations."""
    observed = [report for report in population.observations if report.segment.history]
    before = np.array([report.segment.history[-1] for report in observed])
    gains = np.array([report.fitness for report in observed]) - before
    values = np.clip((gains - gains.mean()) / (gains.std() + 1e-8), -2, 2)
    low, high = min(*before, population.level), max(*before, population.level)
    levels = (before - low) / ((high - low) or 1.0)
    level = (population.level - low) / ((high - low) or 1.0)
    configurations = [report.segment.configuration for report in observed]
    encoder = Encoder.of([*configurations, *population.running])

    def coming(points: Sequence[Configuration]) -> Inputs:
        return encoder.inputs(points, [population.generation + 1] * len(points), [level] * len(points))

    times = [report.segment.generation for report in observed]
    process = TimeVaryingGP.fit(encoder.inputs(configurations, times, levels), values, coming(population.running))
    beta = 0.2 + max(0.0, math.log(0.4 * len(observed)))

    def bound(points: Sequence[Configuration]) -> Array:
        mean, deviation = process.predict(coming(points))
        return mean + math.sqrt(beta) * deviation

    return bound


def _maximum(
    bound: Bound, candidates: list[Configuration], space: Space, factor: float, rng: np.random.Generator
) -> Configuration:
    """Return the best candidate, after rounds in which the best ones are perturbed."""
    for _ in range(REFINEMENTS):
        order = np.argsort(-bound(candidates), kind="stable")
        best = [candidates[index] for index in order[:KEPT_GENERATIONS]]
        values = [one.genome.values() for one in best for _ in range(CANDIDATES // KEPT_GENERATIONS // 2)]
        candidates = [*best, *(space.run(perturbing(each, rng, factor)) for each in values)]
    return candidates[int(np.argmax(bound(candidates)))]
