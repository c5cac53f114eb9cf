"""Ridge regression on the decisions."""

from collections.abc import Sequence

import numpy as np

from search.chooser import Configuration
from search.predictor.features import Features
from search.predictor.predictor import Predictor
from search.surrogate.encoding import FloatArray

RIDGE_PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0)


class Ridge(Predictor):
    """Linear in the features of a configuration; the penalty has the least error in leave-one-out.

    Source: Hoerl and Kennard 1970; the leave-one-out error: Allen 1974 (PRESS).
    """

    def fit(self, configurations: Sequence[Configuration], targets: FloatArray, rng: np.random.Generator) -> None:  # noqa: ARG002
        """Learn from results."""
        self._features = Features(configurations)
        rows = self._features.rows(configurations)
        fits = {penalty: _Fit(rows, targets, penalty) for penalty in RIDGE_PENALTIES}
        self.penalty = min(RIDGE_PENALTIES, key=lambda penalty: fits[penalty].error)
        self._fit = fits[self.penalty]

    def predict(self, configurations: Sequence[Configuration]) -> tuple[FloatArray, FloatArray]:
        """Return mean and spread: of the weights' posterior and of the noise."""
        return self._fit.predict(self._features.rows(configurations))

    def leave_one_out(self) -> FloatArray:
        """Return what is predicted of each configuration from all the others."""
        return self._fit.left_out


class _Fit:
    """One ridge regression: weights w = (X'X + penalty I)^-1 X'y, the mean of y apart."""

    def __init__(self, rows: FloatArray, targets: FloatArray, penalty: float) -> None:
        self._centre, self._mean = rows.mean(axis=0), float(targets.mean())
        centred = rows - self._centre
        self._inverse = np.linalg.inv(centred.T @ centred + penalty * np.eye(rows.shape[1]))
        self._weights = self._inverse @ centred.T @ (targets - self._mean)
        leverage = np.einsum("ij,jk,ik->i", centred, self._inverse, centred) + 1 / len(rows)
        residual = (targets - self._mean - centred @ self._weights) / np.maximum(1 - leverage, 1e-3)
        self.left_out: FloatArray = targets - residual
        self.error = float(residual @ residual) / len(rows)

    def predict(self, rows: FloatArray) -> tuple[FloatArray, FloatArray]:
        centred = rows - self._centre
        variance = self.error * (1 + np.einsum("ij,jk,ik->i", centred, self._inverse, centred))
        return self._mean + centred @ self._weights, np.sqrt(variance)
