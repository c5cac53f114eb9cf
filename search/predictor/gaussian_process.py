"""The Gaussian process over the decisions as a predictor."""

from collections.abc import Sequence

import numpy as np

from search.chooser import Configuration
from search.predictor.predictor import Predictor
from search.surrogate.encoding import Encoded, FloatArray
from search.surrogate.gaussian_process import GaussianProcess, Hyperparameters, walk

WALK_STEPS = 40
"""Metropolis steps of the hyperparameters."""


class GaussianProcessPredictor(Predictor):
    """The posterior of `search.surrogate.gaussian_process`, with one draw of the hyperparameters."""

    def fit(self, configurations: Sequence[Configuration], targets: FloatArray, rng: np.random.Generator) -> None:
        """Learn from results."""
        self._configurations, self._targets = list(configurations), targets
        encoded = Encoded.of(self._configurations)
        self._process = walk(encoded, targets, Hyperparameters.prior(encoded.ordered), WALK_STEPS, rng)
        self.hyperparameters = self._process.hyperparameters

    def predict(self, configurations: Sequence[Configuration]) -> tuple[FloatArray, FloatArray]:
        """Return mean and standard deviation of the posterior."""
        encoded = Encoded.of([*self._configurations, *configurations])
        tuned = self.hyperparameters.extended(encoded.ordered)
        return GaussianProcess(encoded, self._targets, tuned).predict(slice(len(self._targets), None))

    def leave_one_out(self) -> FloatArray:
        """Return what is predicted of each configuration from all the others."""
        return self._process.leave_one_out()
