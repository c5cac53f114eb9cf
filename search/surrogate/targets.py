"""Losses as what a surrogate models."""

import numpy as np

from search.surrogate.encoding import FloatArray


def standardised(losses: FloatArray) -> FloatArray:
    """Return losses with mean 0 and deviation 1, in which good ones are told apart and bad ones are not.

    The logarithm is taken where all measured losses are positive. None counts as worse than as far above the median as
    the best is below it, since how bad a bad one is says nothing of the good ones.

    Args:
        losses: shape (n,); infinite: failed, which counts as the worst; NaN: outstanding, which counts as the mean.
    """
    measured = losses[np.isfinite(losses)]
    if not len(measured):
        return np.zeros(len(losses))
    logarithmic = bool((measured > 0).all())
    scores = np.log(measured) if logarithmic else measured
    ceiling = 2 * float(np.median(scores)) - float(scores.min())
    targets = np.full(len(losses), ceiling)
    targets[np.isfinite(losses)] = np.minimum(scores, ceiling)
    targets[np.isnan(losses)] = np.minimum(scores, ceiling).mean()
    result: FloatArray = (targets - targets.mean()) / (targets.std() or 1.0)
    return result
