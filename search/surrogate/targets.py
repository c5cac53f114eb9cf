"""Losses as what a surrogate models."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from search.surrogate.encoding import FloatArray


@dataclass(frozen=True, slots=True)
class TargetScale:
    """The scale on which a surrogate models losses: mean 0, deviation 1, good ones told apart and bad ones not.

    target = (min(score, ceiling) - mean) / deviation, with score the loss, or its logarithm

    Attributes:
        logarithmic: whether the logarithm is taken, as it is where all measured losses are positive.
        ceiling: as far above the median score as the best is below it: how bad a bad one is says nothing of good ones.
        mean: of the targets.
        deviation: of the targets.
    """

    logarithmic: bool
    ceiling: float
    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def of(cls, losses: FloatArray) -> Self:
        """Return the scale of losses; see `standardised`."""
        measured = losses[np.isfinite(losses)]
        logarithmic = bool((measured > 0).all())
        scores = np.log(measured) if logarithmic else measured
        raw = cls(logarithmic, 2 * float(np.median(scores)) - float(scores.min()) if len(scores) else 0.0)
        targets = raw.targets(losses)
        return cls(logarithmic, raw.ceiling, float(targets.mean()), float(targets.std()) or 1.0)

    def targets(self, losses: FloatArray) -> FloatArray:
        """Return the targets of losses, shape (n,)."""
        finite = np.isfinite(losses)
        scores = np.log(losses, where=finite, out=losses.copy()) if self.logarithmic else losses
        targets = np.where(finite, np.minimum(scores, self.ceiling), self.ceiling)
        if finite.any():
            targets[np.isnan(losses)] = targets[finite].mean()
        result: FloatArray = (targets - self.mean) / self.deviation
        return result

    def losses(self, targets: FloatArray) -> FloatArray:
        """Return the losses that have these targets, shape (n,)."""
        scores = self.mean + self.deviation * targets
        return np.exp(scores) if self.logarithmic else scores


def standardised(losses: FloatArray) -> FloatArray:
    """Return losses with mean 0 and deviation 1, in which good ones are told apart and bad ones are not.

    Args:
        losses: shape (n,); infinite: failed, which counts as the worst; NaN: outstanding, which counts as the mean.
    """
    if not np.isfinite(losses).any():
        return np.zeros(len(losses))
    return TargetScale.of(losses).targets(losses)
