"""What an earlier search says of configurations that were not evaluated yet."""

from collections.abc import Sequence

import numpy as np

from search.chooser import Configuration
from search.surrogate.encoding import Encoded, FloatArray
from search.surrogate.gaussian_process import GaussianProcess, Hyperparameters, walk

RESULTS = 300
"""Results of an earlier search that are used, evenly spread over its ranks."""
TUNED = 100
"""Of these, how many the hyperparameters are tuned on."""
TUNING_STEPS = 40
LEAST_RELIABILITY = 0.25


class PriorMean:
    """The posterior mean of a Gaussian process on the results of an earlier search.

    It is multiplied by `reliability`, the correlation of what the process predicts of each result from the others with
    what the result is, and 0 below `LEAST_RELIABILITY`: results that are mere noise have no say.

    Args:
        configurations: of the earlier search.
        targets: shape (n,), what those scored: mean about 0, deviation about 1; lower is better.
        rng: of the draw of the hyperparameters.
    """

    def __init__(self, configurations: Sequence[Configuration], targets: FloatArray, rng: np.random.Generator) -> None:
        ranked = np.argsort(targets)
        chosen = ranked[np.unique(np.linspace(0, len(ranked) - 1, RESULTS).astype(int))]
        self._configurations = [configurations[place] for place in chosen]
        self._targets = targets[chosen]
        encoded = Encoded.of(self._configurations)
        some = np.sort(rng.permutation(len(chosen))[:TUNED])
        start = Hyperparameters.prior(encoded.ordered)
        self._tuned = walk(encoded.rows(some), self._targets[some], start, TUNING_STEPS, rng).hyperparameters
        left_out = self._process([]).leave_one_out()
        spread = left_out.std() * self._targets.std()
        centred = (left_out - left_out.mean()) * (self._targets - self._targets.mean())
        correlation = float(centred.mean()) / float(spread) if spread else 0.0
        self.reliability = correlation if correlation >= LEAST_RELIABILITY else 0.0

    def predict(self, configurations: Sequence[Configuration]) -> FloatArray:
        """Return the mean of each configuration, shape (n,), times the reliability."""
        if not self.reliability:
            return np.zeros(len(configurations))
        mean, _ = self._process(configurations).predict(slice(len(self._configurations), None))
        return self.reliability * mean

    def _process(self, configurations: Sequence[Configuration]) -> GaussianProcess:
        encoded = Encoded.of([*self._configurations, *configurations])
        return GaussianProcess(encoded, self._targets, self._tuned.extended(encoded.ordered))
