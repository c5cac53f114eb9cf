"""A Gaussian process over hyperparameters and time, which forgets.

    k((x, t), (x', t')) = variance * similarity(x, x') * (1 - epsilon)^(|t - t'| / 2)
    similarity = exp(-|u - u'|^2 / (2 length^2))                    with u, the positions of values that have an order
    similarity = (1 - m) (similarity + equal) / 2 + m similarity * equal    with equal, the share of equal other values

Source: Bogunovic et al. 2016, Time-Varying Gaussian Process Bandit Optimization; for values without an order Ru et al.
2020, CoCaBO, equation 3.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.optimize import minimize

from search.chooser import Configuration, Decision

Array = NDArray[np.float64]

START = np.array([0.0, math.log(0.3), math.log(0.1), math.log(0.05 / 0.45), 0.0])
"""log variance, log length, log noise variance, logit of epsilon / 0.5, logit of m: the centre of their prior."""

PRIOR_WIDTH = np.array([1.0, 1.0, 2.0, 1.5, 1.0])
EPSILON_LIMIT = 0.5
JITTER = 1e-6


@dataclass(frozen=True, slots=True)
class Inputs:
    """Points of the process.

    Attributes:
        times: intervals, shape (n,).
        numbers: positions of values that have an order, from 0 to 1, shape (n, d); NaN: inactive.
        classes: indices of values without an order, shape (n, c); -1: inactive.
    """

    times: Array
    numbers: Array
    classes: NDArray[np.int64]

    def joined(self, other: "Inputs") -> "Inputs":
        """Return these points and others."""
        return Inputs(
            np.concatenate([self.times, other.times]),
            np.concatenate([self.numbers, other.numbers]),
            np.concatenate([self.classes, other.classes]),
        )


@dataclass(frozen=True, slots=True)
class Encoder:
    """Turns configurations into points.

    Attributes:
        ordered: paths of dimensions with an order.
        listed: path of a dimension without one -> value, as JSON -> its index.
    """

    ordered: tuple[str, ...]
    listed: dict[str, dict[str, int]]

    @classmethod
    def of(cls, configurations: Sequence[Configuration]) -> "Encoder":
        """Return the encoder of all dimensions that some configuration has."""
        decisions = {one.path: one for each in configurations for one in each.genome.decisions}
        listed = {
            path: {json.dumps(value): index for index, value in enumerate(one.domain.extremes())}
            for path, one in decisions.items()
            if one.domain.unit(one.value) is None
        }
        return cls(tuple(path for path in decisions if path not in listed), listed)

    def inputs(
        self, configurations: Sequence[Configuration], times: Sequence[float], levels: Sequence[float]
    ) -> Inputs:
        """Return the points of configurations.

        Args:
            configurations: n of them.
            times: of each.
            levels: one more number of each, from 0 to 1.
        """
        rows = [{one.path: one for one in each.genome.decisions} for each in configurations]
        units = [[_unit(row.get(path)) for path in self.ordered] for row in rows]
        classes = [[_class(row.get(path), indices) for path, indices in self.listed.items()] for row in rows]
        count = len(rows)
        numbers = np.column_stack([np.array(units, float).reshape(count, len(self.ordered)), np.array(levels, float)])
        return Inputs(np.array(times, float), numbers, np.array(classes, np.int64).reshape(count, len(self.listed)))


@dataclass(frozen=True, slots=True)
class TimeVaryingGP:
    """The process after observations.

    Attributes:
        theta: parameters of the kernel, as in `START`.
        observed: points with values.
        known: these, and points whose values are still to come.
        weights: of the observations in the mean.
        factor: of the covariance of `known`.
    """

    theta: Array
    observed: Inputs
    known: Inputs
    weights: Array
    factor: tuple[Array, bool]

    @classmethod
    def fit(cls, observed: Inputs, values: Array, pending: Inputs) -> "TimeVaryingGP":
        """Return the process with the most probable kernel.

        Args:
            observed: n points.
            values: of these, with mean 0 and variance 1, shape (n,).
            pending: points whose values are still to come; they count in the deviation.
        """
        theta = _most_probable(observed, values)
        known = observed.joined(pending)
        weights = cho_solve(_factor(theta, observed), values)
        return cls(theta, observed, known, weights, _factor(theta, known))

    def predict(self, points: Inputs) -> tuple[Array, Array]:
        """Return the mean and the standard deviation at points, each of shape (n,)."""
        mean = kernel(self.theta, points, self.observed) @ self.weights
        cross = kernel(self.theta, points, self.known)
        explained = np.einsum("ij,ji->i", cross, cho_solve(self.factor, cross.T))
        return mean, np.sqrt(np.maximum(np.exp(self.theta[0]) - explained, 0))


def kernel(theta: Array, one: Inputs, other: Inputs) -> Array:
    """Return the covariances of two sets of points, shape (n, m)."""
    variance, length = np.exp(theta[:2])
    epsilon, mixture = EPSILON_LIMIT * _sigmoid(theta[3]), _sigmoid(theta[4])
    difference = one.numbers[:, None] - other.numbers[None]
    inactive = np.isnan(one.numbers[:, None]) & np.isnan(other.numbers[None])
    square = np.where(inactive, 0.0, np.where(np.isnan(difference), 1.0, difference**2)).sum(axis=-1)
    similarity = np.exp(-square / (2 * length**2))
    if one.classes.shape[1]:
        equal = (one.classes[:, None] == other.classes[None]).mean(axis=-1)
        similarity = (1 - mixture) * (similarity + equal) / 2 + mixture * similarity * equal
    forgetting = (1 - epsilon) ** (np.abs(one.times[:, None] - other.times[None]) / 2)
    covariance: Array = variance * similarity * forgetting
    return covariance


def _most_probable(points: Inputs, values: Array) -> Array:
    """Return the parameters with the highest posterior probability: marginal likelihood times a normal prior."""

    def loss(theta: Array) -> float:
        prior = float((((theta - START) / PRIOR_WIDTH) ** 2).sum() / 2)
        try:
            factor = _factor(theta, points)
        except LinAlgError:
            return 1e10
        return prior + float(values @ cho_solve(factor, values)) / 2 + float(np.log(np.diag(factor[0])).sum())

    bounds = [(centre - 4 * width, centre + 4 * width) for centre, width in zip(START, PRIOR_WIDTH, strict=True)]
    found: Array = minimize(loss, START, method="L-BFGS-B", bounds=bounds, options={"maxiter": 15}).x
    return found


def _factor(theta: Array, points: Inputs) -> tuple[Array, bool]:
    covariance = kernel(theta, points, points)
    covariance[np.diag_indices_from(covariance)] += np.exp(theta[2]) + JITTER
    factor: tuple[Array, bool] = cho_factor(covariance, lower=True)
    return factor


def _unit(decision: Decision | None) -> float:
    unit = decision.domain.unit(decision.value) if decision else None
    return math.nan if unit is None else unit


def _class(decision: Decision | None, indices: dict[str, int]) -> int:
    """Return the index of a value; -1 if it is inactive, or was taken off the list since."""
    return indices.get(json.dumps(decision.value), -1) if decision else -1


def _sigmoid(value: Any) -> float:
    return float(1 / (1 + np.exp(-value)))
