"""Loss curves: where one ends, predicted from its beginning.

The law is that of Tissue et al. 2024 (Scaling Law with Learning Rate Annealing):

    L(s) = L0 + A S1(s)^-alpha - C S2(s)

S1 is the sum of the learning rates up to step s, and S2 the area by which they fell, with a momentum. With a constant
rate, S1 is proportional to s and S2 is 0, which leaves a power law of the steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from search.surrogate.encoding import FloatArray

ALPHAS = np.geomspace(0.1, 2.0, 10)
"""Exponents of the law."""
NOISES = (0.002, 0.006, 0.02, 0.06)
"""Standard deviations of a measured loss, as shares of what the curve has fallen."""
DRIFTS = (0.003, 0.02, 0.1)
"""How far the curve wanders from the law while the steps grow by a factor of e, as shares of the same."""
ANNEALED = 0.15
"""What the annealing of the whole schedule is expected to gain, as a share of the same; its deviation is as large."""
SMALLEST_FALL = 1e-9
"""Taken for a curve that does not fall, or a rate that does not."""
MOST_POINTS = 40
"""Points of a curve that are looked at, evenly spread over the logarithm of the steps."""
MOMENTUM = 0.999
"""Lambda of S2: as in Tissue et al. 2024."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A mixture of normal distributions.

    Attributes:
        weights: of the components, shape (n,); their sum is 1.
        means, deviations: of each, shape (n,).
    """

    weights: FloatArray
    means: FloatArray
    deviations: FloatArray

    @property
    def mean(self) -> float:
        """The expected value."""
        return float(self.weights @ self.means)

    def chance_below(self, bound: float) -> float:
        """Return the probability of a value below a bound."""
        return float(self.weights @ ndtr((bound - self.means) / self.deviations))

    def quantile(self, share: float) -> float:
        """Return the value below which a share of the probability lies, by bisection."""
        low = float((self.means - 10 * self.deviations).min())
        high = float((self.means + 10 * self.deviations).max())
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.chance_below(middle) < share else (low, middle)
        return (low + high) / 2


@dataclass(frozen=True, slots=True)
class Annealing:
    """What a learning-rate schedule gives the law, after each step.

    Attributes:
        areas: S1, shape (steps,).
        annealed: S2, shape (steps,).
    """

    areas: FloatArray
    annealed: FloatArray

    @classmethod
    def of(cls, rates: Sequence[float]) -> "Annealing":
        """Return the areas of a schedule; a rate that rises, as in a warm-up, anneals nothing.

        S1(s) = sum of r_i, S2(s) = sum of m_i with m_i = 0.999 m_(i-1) + max(r_(i-1) - r_i, 0), over i up to s.

        >>> Annealing.of([0.5, 1.0, 1.0, 0.5]).areas.tolist(), Annealing.of([0.5, 1.0, 1.0, 0.5]).annealed.tolist()
        ([0.5, 1.5, 2.5, 3.0], [0.0, 0.0, 0.0, 0.5])
        """
        heights, momentum, momenta = np.asarray(rates, float), 0.0, []
        for fall in np.maximum(-np.diff(heights, prepend=heights[0]), 0.0).tolist():
            momentum = MOMENTUM * momentum + fall
            momenta.append(momentum)
        return cls(np.cumsum(heights), np.cumsum(momenta))


def predict_end(schedule: Annealing, steps: Sequence[int], losses: Sequence[float]) -> Prediction:
    """Predict the loss that is measured at the end of a schedule.

    The curve is the law, a random walk over the logarithm of the steps, and noise. Given alpha and the sizes of the
    last two, all is normal: L0, A and C are integrated out, and the loss at the end is conditioned on those so far.
    Over a grid of alpha and the sizes, the predictions are weighted by the likelihood of the curve.

    Args:
        schedule: of the whole training.
        steps: after which a loss was measured, rising, at least two.
        losses: the losses, or other scores of which lower is better.
    """
    chosen = _thinned(steps)
    places = np.array([*(steps[place] for place in chosen), len(schedule.areas)])
    seen = np.array([losses[place] for place in chosen])
    fallen = max(float(np.ptp(seen)), SMALLEST_FALL)
    areas = np.maximum(schedule.areas[places - 1], SMALLEST_FALL)  # where the rate begins at 0
    mean, covariance = _prior(areas, schedule.annealed[places - 1], np.log(places / places[0]))
    likelihoods, means, variances = _conditioned(mean, covariance, (seen - seen[-1]) / fallen)
    weights = np.exp(likelihoods - likelihoods.max())
    return Prediction(weights / weights.sum(), seen[-1] + fallen * means, fallen * np.sqrt(variances))


def _prior(areas: FloatArray, annealed: FloatArray, walk: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return mean and covariance of a curve of n points before it is seen, in units of its fall, around its last point.

    Args:
        areas: S1 at each point, shape (n,).
        annealed: S2, shape (n,).
        walk: logarithms of the steps, from 0, shape (n,).

    Returns:
        Shapes (grid, n) and (grid, n, n).
    """
    points = len(areas)
    alphas, noises, drifts = (each.ravel() for each in np.meshgrid(ALPHAS, NOISES, DRIFTS, indexing="ij"))
    powers = (areas / areas[0]) ** -alphas[:, None]
    gains = np.broadcast_to(annealed / max(float(annealed[-1]), SMALLEST_FALL), powers.shape)
    features = np.stack([np.ones_like(powers), powers, -gains], axis=2)
    means, deviations = np.array([0.0, 1.0, ANNEALED]), np.array([3.0, 2.0, ANNEALED])
    covariance = (features * deviations**2) @ features.mT
    covariance = covariance + drifts[:, None, None] ** 2 * np.minimum.outer(walk, walk)
    return features @ means, covariance + noises[:, None, None] ** 2 * np.eye(points)


def _conditioned(
    mean: FloatArray, covariance: FloatArray, seen: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the log likelihood of all values but the last, and its mean and variance, shape (grid,) each.

    Source: Rasmussen and Williams 2006, algorithm 2.1.
    """
    known = len(seen)
    factor = np.linalg.cholesky(covariance[:, :known, :known])
    scaled = np.linalg.solve(factor, np.stack([seen - mean[:, :known], covariance[:, :known, known]], axis=2))
    residual, cross = scaled[:, :, 0], scaled[:, :, 1]
    diagonal = np.diagonal(factor, axis1=1, axis2=2)
    likelihood = -0.5 * (residual**2).sum(axis=1) - np.log(diagonal).sum(axis=1)
    expected = mean[:, known] + (cross * residual).sum(axis=1)
    return likelihood, expected, covariance[:, known, known] - (cross**2).sum(axis=1)


def _thinned(steps: Sequence[int]) -> list[int]:
    """Return the places of at most 40 steps, the last one among them."""
    if len(steps) <= MOST_POINTS:
        return list(range(len(steps)))
    wanted = np.geomspace(steps[0], steps[-1], MOST_POINTS)
    return sorted({int(np.abs(np.asarray(steps) - step).argmin()) for step in wanted})
