"""How much a configuration is expected to improve on the best."""

import numpy as np
from scipy.special import ndtr

from search.surrogate.encoding import FloatArray


def expected_improvement(mean: FloatArray, deviation: FloatArray, best: float) -> FloatArray:
    """Return E[max(best - f, 0)] for f normal with a mean and a standard deviation, shape (n,).

    Source: Mockus 1978.
    """
    z = (best - mean) / deviation
    improvement: FloatArray = (best - mean) * ndtr(z) + deviation * np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    return improvement
