"""The Pareto front: what nothing else is better than in all objectives."""

import numpy as np
from numpy.typing import NDArray


def pareto_front(losses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which points no other point dominates: is at most equal in every objective, and lower in one.

    Args:
        losses: shape (n, objectives), lower is better, finite.

    Returns:
        Shape (n,). Equal points are all on the front, or none is.

    >>> import numpy as np
    >>> pareto_front(np.array([[1.0, 5.0], [2.0, 2.0], [2.0, 3.0]])).tolist()
    [True, True, False]
    """
    no_worse = (losses[:, None] <= losses[None, :]).all(axis=-1)
    better = (losses[:, None] < losses[None, :]).any(axis=-1)
    return np.logical_not((no_worse & better).any(axis=0))
