"""Extremely randomised trees, by scikit-learn."""

from collections.abc import Sequence

import numpy as np
from sklearn.ensemble import ExtraTreesRegressor

from search.chooser import Configuration
from search.predictor.features import Features
from search.predictor.predictor import Predictor
from search.surrogate.encoding import FloatArray

TREES = 60


class Trees(Predictor):
    """The mean of randomised trees, each on a bootstrap sample.

    Source: Geurts et al. 2006; the spread over trees: Hutter et al. 2011 (SMAC).
    """

    def fit(self, configurations: Sequence[Configuration], targets: FloatArray, rng: np.random.Generator) -> None:
        """Learn from results."""
        self._features = Features(configurations)
        seed = int(rng.integers(2**31))
        self._forest = ExtraTreesRegressor(TREES, bootstrap=True, oob_score=True, random_state=seed)
        self._forest.fit(self._features.rows(configurations), targets)

    def predict(self, configurations: Sequence[Configuration]) -> tuple[FloatArray, FloatArray]:
        """Return mean and standard deviation over the trees."""
        rows = self._features.rows(configurations)
        each = np.stack([tree.predict(rows) for tree in self._forest.estimators_])
        return each.mean(axis=0), each.std(axis=0) + 1e-9

    def leave_one_out(self) -> FloatArray:
        """Return what is predicted of each configuration by the trees that did not see it (out of bag)."""
        predicted: FloatArray = self._forest.oob_prediction_
        return predicted
