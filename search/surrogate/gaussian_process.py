"""A Gaussian process over the decisions of a space.

The covariance of two configurations has an additive part, in which decisions count one by one, a part in which pairs of
them interact, and a product, in which all do:

    k(x, x') = w / (2 d) * sum_i m_i + 1 / (d (d - 1)) * sum_(i < j) m_i m_j + (1 - w) / 2 * prod_i m_i
    m_i = m(r_i / l_i)
    m(r) = (1 + sqrt(5) r + 5/3 r^2) exp(-sqrt(5) r)      (Matern, nu = 5/2)

with r_i the distance in decision i. The length scales l_i, the weight w and the noise are drawn from their posterior by
Metropolis steps; predictions are averages over some draws, as a maximum of the likelihood is too sure of itself with
twenty results.

Source: Rasmussen and Williams 2006, Algorithm 2.1; Snoek et al. 2012 (integrated acquisition); Duvenaud et al. 2011
(additive kernels; the sum over pairs by Newton's identity).
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular

from search.surrogate.acquisition import expected_improvement
from search.surrogate.encoding import Encoded, FloatArray

LENGTH = {True: 0.6, False: 1.0}
"""Median of the prior of a length scale, with and without an order of the values; log-normal."""
LENGTH_SPREAD = 0.7
NOISE = 0.03
KERNEL_JITTER = 1e-8


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Hyperparameters of the covariance.

    Attributes:
        lengths: shape (d,), the length scale of each decision.
        additive: weight w of the additive part.
        noise: variance of the noise, in units of the signal's.
    """

    lengths: FloatArray
    additive: float
    noise: float

    @classmethod
    def prior(cls, ordered: NDArray[np.bool_]) -> Self:
        """Return the medians of the prior."""
        return cls(np.where(ordered, LENGTH[True], LENGTH[False]), 0.5, NOISE)

    def extended(self, ordered: NDArray[np.bool_]) -> "Hyperparameters":
        """Return these for more decisions, which come after the others and have the medians of the prior."""
        medians = np.where(ordered, LENGTH[True], LENGTH[False])
        return Hyperparameters(np.concatenate([self.lengths, medians[len(self.lengths) :]]), self.additive, self.noise)

    def log_prior(self, ordered: NDArray[np.bool_]) -> float:
        """Return the logarithm of the prior density, up to a constant."""
        medians = np.where(ordered, LENGTH[True], LENGTH[False])
        lengths = np.log(self.lengths / medians) / LENGTH_SPREAD
        return float(-0.5 * lengths @ lengths - 0.5 * np.log(self.noise / NOISE) ** 2)

    def proposal(self, rng: np.random.Generator) -> "Hyperparameters":
        """Return a random neighbour: some length scales, and sometimes the weight and the noise, change."""
        changed = rng.random(len(self.lengths)) < 0.35
        lengths = self.lengths * np.exp(0.6 * rng.normal(size=len(self.lengths)) * changed)
        additive = self.additive + 0.2 * rng.normal() * (rng.random() < 0.4)
        noise = self.noise * np.exp(0.6 * rng.normal() * (rng.random() < 0.4))
        return Hyperparameters(lengths, float(np.clip(additive, 0, 1)), float(np.clip(noise, 1e-4, 1)))


@dataclass(frozen=True, slots=True)
class Trend:
    """A linear model of the scores beside the process, its coefficients normal around a guess.

    Attributes:
        columns: shape (m, s), what each configuration has, the evaluated ones first.
        guess: shape (s,), the mean of the coefficients.
        spread: their standard deviation, in units of the signal's.

    Source: Rasmussen and Williams 2006, section 2.7.
    """

    columns: FloatArray
    guess: FloatArray
    spread: float

    @property
    def mean(self) -> FloatArray:
        """The scores that are guessed, shape (m,)."""
        return self.columns @ self.guess

    def covariance(self, rows: slice, known: slice) -> FloatArray:
        """Return the covariance that uncertain coefficients add."""
        added: FloatArray = self.spread**2 * self.columns[rows] @ self.columns[known].T
        return added

    def variance(self, rows: slice) -> FloatArray:
        """Return the variance that they add to each configuration, shape (m,)."""
        added: FloatArray = self.spread**2 * (self.columns[rows] ** 2).sum(axis=1)
        return added


class GaussianProcess:
    """The posterior of scores, given some of them.

    Args:
        encoded: configurations, the evaluated ones first.
        targets: shape (n,), what those scored: mean about 0, deviation about 1; lower is better.
        hyperparameters: of the covariance.
        trend: what is known of the scores beforehand; None: nothing.
    """

    def __init__(
        self,
        encoded: Encoded,
        targets: FloatArray,
        hyperparameters: Hyperparameters,
        trend: Trend | None = None,
    ) -> None:
        self._encoded = encoded
        self._trend = trend
        self._targets = targets - trend.mean[: len(targets)] if trend else targets
        self._known = slice(0, len(targets))
        self.hyperparameters = hyperparameters
        self._correlations = _matern(encoded.distances() / hyperparameters.lengths[:, None, None])
        covariance = self.covariance(self._known)
        covariance[np.diag_indices_from(covariance)] += hyperparameters.noise + KERNEL_JITTER
        self._factor = np.linalg.cholesky(covariance)
        self._weights = cho_solve((self._factor, True), self._targets)
        self.scale = max(float(self._targets @ self._weights) / len(targets), 1e-9)

    def log_posterior(self) -> float:
        """Return the logarithm of the hyperparameters' density, the signal's variance at its most likely."""
        likelihood = -0.5 * len(self._targets) * np.log(self.scale) - np.log(np.diag(self._factor)).sum()
        return float(likelihood) + self.hyperparameters.log_prior(self._encoded.ordered)

    def predict(self, rows: slice) -> tuple[FloatArray, FloatArray]:
        """Return mean and standard deviation of the scores of configurations, shape (m,) each."""
        cross = self.covariance(rows)
        solved = solve_triangular(self._factor, cross.T, lower=True)
        variance = np.maximum(self._prior_variance(rows) - (solved * solved).sum(axis=0), 1e-12)
        mean = cross @ self._weights + (self._trend.mean[rows] if self._trend else 0.0)
        return mean, np.sqrt(self.scale * variance)

    def leave_one_out(self) -> FloatArray:
        """Return what is predicted of each evaluated configuration from all the others, shape (n,).

        Source: Rasmussen and Williams 2006, equation 5.12.
        """
        inverse = cho_solve((self._factor, True), np.eye(len(self._targets)))
        predicted: FloatArray = self._targets - self._weights / np.diag(inverse)
        return predicted

    def expected_improvement(self, rows: slice) -> FloatArray:
        """Return the expected improvement over the best predicted mean of the evaluated ones, shape (m,).

        Source: the noisy incumbent of Wang and de Freitas 2014.
        """
        best = float(self.predict(self._known)[0].min())
        return expected_improvement(*self.predict(rows), best)

    def covariance(self, rows: slice) -> FloatArray:
        """Return the covariance of configurations with the evaluated ones, without noise, shape (m, n)."""
        codes, weight, count = self._encoded.codes, self.hyperparameters.additive, len(self._correlations)
        total: Any = 0.0
        squares: Any = 0.0
        product: Any = 1.0
        for column, table in enumerate(self._correlations):
            correlation = table[codes[rows, column]].take(codes[self._known, column], axis=1)
            total = total + correlation
            squares = squares + correlation * correlation
            product = product * correlation
        pairs = (total * total - squares) / (count * (count - 1)) if count > 1 else product
        covariance: FloatArray = 0.5 * (weight * total / count + pairs + (1 - weight) * product)
        if self._trend:
            covariance = covariance + self._trend.covariance(rows, self._known)
        return covariance

    def _prior_variance(self, rows: slice) -> FloatArray | float:
        return 1.0 + self._trend.variance(rows) if self._trend else 1.0


def _matern(distance: FloatArray) -> FloatArray:
    scaled = np.sqrt(5) * distance
    correlation: FloatArray = (1 + scaled + scaled * scaled / 3) * np.exp(-scaled)
    return correlation


def walk(
    encoded: Encoded,
    targets: FloatArray,
    start: Hyperparameters,
    steps: int,
    rng: np.random.Generator,
    trend: Trend | None = None,
) -> GaussianProcess:
    """Return the process after some Metropolis steps of its hyperparameters."""
    here = GaussianProcess(encoded, targets, start, trend)
    density = here.log_posterior()
    for _ in range(steps):
        there = GaussianProcess(encoded, targets, here.hyperparameters.proposal(rng), trend)
        proposed = there.log_posterior()
        if np.log(rng.random()) < proposed - density:
            here, density = there, proposed
    return here
