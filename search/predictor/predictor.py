"""The interface of predictors, and how one of them is chosen."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from raytrain.registry import resolve
from search.chooser import Configuration
from search.surrogate.encoding import FloatArray
from search.tables import PREDICTORS


class Predictor(ABC):
    """Predicts what configurations score, from those that were evaluated."""

    @abstractmethod
    def fit(self, configurations: Sequence[Configuration], targets: FloatArray, rng: np.random.Generator) -> None:
        """Learn from results.

        Args:
            configurations: n of them.
            targets: shape (n,), what they scored: mean about 0, deviation about 1; lower is better.
            rng: of all draws.
        """

    @abstractmethod
    def predict(self, configurations: Sequence[Configuration]) -> tuple[FloatArray, FloatArray]:
        """Return the mean and the spread, a standard deviation, of each configuration, shape (m,) each."""

    @abstractmethod
    def leave_one_out(self) -> FloatArray:
        """Return what is predicted of each configuration that it was fitted on from others, shape (n,)."""


def rank_correlation(one: FloatArray, other: FloatArray) -> float:
    """Return Spearman's rank correlation; 0 where all values of one are equal."""
    first, second = (rankdata(values) - (len(values) + 1) / 2 for values in (one, other))
    scale = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / scale if scale else 0.0


def rank_correlations(
    configurations: Sequence[Configuration], targets: FloatArray, rng: np.random.Generator
) -> Mapping[str, float]:
    """Return, for each predictor, the rank correlation of its leave-one-out predictions with the targets."""
    found: dict[str, float] = {}
    for name in PREDICTORS:
        predictor: Any = resolve(PREDICTORS, name, "search.predictor")()
        predictor.fit(configurations, targets, rng)
        found[name] = rank_correlation(predictor.leave_one_out(), targets)
    return found
