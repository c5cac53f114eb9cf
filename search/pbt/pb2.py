"""Population based bandits: explore by a Gaussian process that forgets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from search.chooser import perturbing
from search.genome import Configuration
from search.pbt.explore import Explore
from search.pbt.population import Population
from search.scheduling.segments import Report
from search.space import Space

Array = NDArray[np.float64]

CANDIDATES = 128
ROUNDS = 3
"""Each perturbs the best candidates of the round before."""

# log variance, log length scale, log noise, logit of the forgetting epsilon, logit of the mixture of kernels
START = np.array([0.0, math.log(0.3), math.log(0.1), math.log(0.05 / 0.45), 0.0])
PRIOR_WIDTH = np.array([1.0, 1.0, 2.0, 1.5, 1.0])
EPSILON_LIMIT = 0.5


class PB2(Explore):
    """Hyperparameters with the highest upper confidence bound of how much they improve the score in an interval.

    f(x, t), the improvement in interval t under hyperparameters x, has a Gaussian process prior that forgets:

        k((x, t), (x', t')) = k(x, x') (1 - epsilon)^(|t - t'| / 2)
        x_next = argmax mean(x) + sqrt(beta) deviation(x),    beta = 0.2 + max(0, log(0.4 n))

    The deviation counts the configurations that other members are training as observed, so that members decided on
    together do not all take the same. The score before the interval is one more input. Dimensions with an order have a
    squared-exponential kernel on their scale; those without one a kernel of equality, mixed as in CoCaBO.

    Source: Parker-Holder et al. 2020, PB2 (arXiv 2002.02518), section 3 and algorithm 1; the kernel of time: Bogunovic
    et al. 2016; pending points: Desautels et al. 2014 (GP-BUCB); categories: Ru et al. 2020 (CoCaBO), equation 3.

    Attributes:
        window: earlier reports that are learned from.
        factor: what numbers are multiplied or divided by where the best candidates are refined.
    """

    window: int = Field(200, ge=4, le=1000)
    factor: float = Field(1.1, gt=1, lt=2)

    @property
    def memory(self) -> int:
        """How many earlier reports the rule learns from."""
        return self.window

    def propose(self, member: Report, population: Population, rng: np.random.Generator) -> Configuration:
        """Return the configuration with the highest upper confidence bound; with too few observations, a random one."""
        space = population.space
        observed = [report for report in population.observations if report.segment.history]
        candidates = [space.sample(rng) for _ in range(CANDIDATES)]
        if len(observed) < 4:
            return candidates[0]
        with threadpool_limits(1):  # small matrices: more threads only wait for cores that the members use
            acquisition = _Acquisition.fit(observed, population.running, member.fitness, population.generation + 1)
            return _maximize(acquisition, candidates, population.space, self.factor, rng)


def _maximize(
    acquisition: "_Acquisition", candidates: list[Configuration], space: Space, factor: float, rng: np.random.Generator
) -> Configuration:
    """Return the best candidate, after some rounds in which the best ones are perturbed."""
    for _ in range(ROUNDS):
        bounds = acquisition(candidates)
        best = [candidates[index] for index in np.argsort(-bounds, kind="stable")[:8]]
        values = [one.genome.values() for one in best for _ in range(CANDIDATES // 16)]
        candidates = [*best, *(space.run(perturbing(each, rng, factor)) for each in values)]
    return candidates[int(np.argmax(acquisition(candidates)))]


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Points of the Gaussian process.

    Attributes:
        times: intervals, shape (n,).
        numbers: positions of ordered dimensions in their domains and the score before, shape (n, d); NaN: inactive.
        classes: indices of values without an order, shape (n, c); -1: inactive.
    """

    times: Array
    numbers: Array
    classes: NDArray[np.int64]

    def joined(self, other: "_Inputs") -> "_Inputs":
        """Return these points and others."""
        return _Inputs(
            np.concatenate([self.times, other.times]),
            np.concatenate([self.numbers, other.numbers]),
            np.concatenate([self.classes, other.classes]),
        )


@dataclass(frozen=True, slots=True)
class _Encoder:
    """Turns configurations into inputs: the dimensions that were seen, and the range of scores.

    Attributes:
        ordered: paths of dimensions with an order.
        listed: path of a dimension without one -> its values, as text.
        low, high: the scores before an interval.
    """

    ordered: tuple[str, ...]
    listed: dict[str, list[str]]
    low: float
    high: float

    @classmethod
    def of(cls, configurations: Sequence[Configuration], scores: Sequence[float]) -> "_Encoder":
        """Return the encoder of all dimensions that some configuration has."""
        decisions = {one.path: one for each in configurations for one in each.genome.decisions}
        listed = {
            path: [repr(value) for value in one.domain.grid(0)]
            for path, one in decisions.items()
            if one.domain.unit(one.value) is None
        }
        return cls(tuple(path for path in decisions if path not in listed), listed, min(scores), max(scores))

    def inputs(self, configurations: Sequence[Configuration], times: Array, scores: Array) -> _Inputs:
        """Return the points of configurations at times, with the scores before."""
        rows = [{one.path: one for one in each.genome.decisions} for each in configurations]
        units = [
            [rows[i][path].domain.unit(rows[i][path].value) if path in rows[i] else math.nan for path in self.ordered]
            for i in range(len(rows))
        ]
        classes = [
            [values.index(repr(row[path].value)) if path in row else -1 for path, values in self.listed.items()]
            for row in rows
        ]
        level = (scores - self.low) / ((self.high - self.low) or 1.0)
        numbers = np.column_stack([np.array(units, float).reshape(len(rows), len(self.ordered)), level])
        return _Inputs(times, numbers, np.array(classes, np.int64).reshape(len(rows), len(self.listed)))


@dataclass(frozen=True, slots=True)
class _Acquisition:
    """The upper confidence bound of configurations in the coming interval."""

    encoder: _Encoder
    theta: Array
    observed: _Inputs
    known: _Inputs
    factor: tuple[Array, bool]
    weights: Array
    score: float
    time: int

    @classmethod
    def fit(
        cls, reports: Sequence[Report], running: Sequence[Configuration], score: float, time: int
    ) -> "_Acquisition":
        """Return the bound after fitting the kernel to reports by its marginal likelihood."""
        before = np.array([report.segment.history[-1] for report in reports])
        gains = np.array([report.fitness for report in reports]) - before
        y = np.clip((gains - gains.mean()) / (gains.std() + 1e-8), -2, 2)
        configurations = [report.segment.configuration for report in reports]
        encoder = _Encoder.of([*configurations, *running], [*before, score])
        times = np.array([report.segment.generation for report in reports], float)
        observed = encoder.inputs(configurations, times, before)
        theta = _fit(observed, y)
        now, here = np.full(len(running), float(time)), np.full(len(running), score)
        known = observed.joined(encoder.inputs(running, now, here))
        weights = cho_solve(_factor(theta, observed), y)
        return cls(encoder, theta, observed, known, _factor(theta, known), weights, score, time)

    def __call__(self, configurations: Sequence[Configuration]) -> Array:
        """Return the bound of each configuration, shape (n,)."""
        count = len(configurations)
        points = self.encoder.inputs(configurations, np.full(count, float(self.time)), np.full(count, self.score))
        mean = _kernel(self.theta, points, self.observed) @ self.weights
        cross = _kernel(self.theta, points, self.known)
        explained = np.einsum("ij,ji->i", cross, cho_solve(self.factor, cross.T))
        deviation = np.sqrt(np.maximum(np.exp(self.theta[0]) - explained, 0))
        beta = 0.2 + max(0.0, math.log(0.4 * len(self.weights)))
        bounds: Array = mean + math.sqrt(beta) * deviation
        return bounds


def _kernel(theta: Array, one: _Inputs, other: _Inputs) -> Array:
    """Return the covariances of two sets of points, shape (n, m)."""
    variance, length = np.exp(theta[:2])
    epsilon, mixture = EPSILON_LIMIT * _sigmoid(theta[3]), _sigmoid(theta[4])
    difference = one.numbers[:, None] - other.numbers[None]
    inactive = np.isnan(one.numbers[:, None]) & np.isnan(other.numbers[None])
    square = np.where(inactive, 0.0, np.where(np.isnan(difference), 1.0, difference**2)).sum(axis=-1)
    similar = np.exp(-square / (2 * length**2))
    if one.classes.shape[1]:
        equal = (one.classes[:, None] == other.classes[None]).mean(axis=-1)
        similar = (1 - mixture) * (similar + equal) / 2 + mixture * similar * equal
    forgetting = (1 - epsilon) ** (np.abs(one.times[:, None] - other.times[None]) / 2)
    covariance: Array = variance * similar * forgetting
    return covariance


def _factor(theta: Array, points: _Inputs) -> tuple[Array, bool]:
    covariance = _kernel(theta, points, points)
    covariance[np.diag_indices_from(covariance)] += np.exp(theta[2]) + 1e-6
    factor: tuple[Array, bool] = cho_factor(covariance, lower=True)
    return factor


def _fit(points: _Inputs, y: Array) -> Array:
    """Return the kernel's parameters with the highest posterior probability."""

    def loss(theta: Array) -> float:
        prior = float((((theta - START) / PRIOR_WIDTH) ** 2).sum() / 2)
        try:
            factor = _factor(theta, points)
        except LinAlgError:
            return 1e10
        return prior + float(y @ cho_solve(factor, y)) / 2 + float(np.log(np.diag(factor[0])).sum())

    bounds = [(centre - 4 * width, centre + 4 * width) for centre, width in zip(START, PRIOR_WIDTH, strict=True)]
    found: Array = minimize(loss, START, method="L-BFGS-B", bounds=bounds, options={"maxiter": 15}).x
    return found


def _sigmoid(value: float) -> float:
    return float(1 / (1 + np.exp(-value)))
