"""How steep a loss is along a direction, from forward passes alone (Malladi et al. 2023, MeZO)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median_low

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from raytrain.zeroth.perturbed import Closure, PerturbedModel

HISTORY = 64
"""Slopes that say what is ordinary."""
MEDIAN_MAGNITUDE = NormalDist().inv_cdf(0.75)
"""Of normal numbers, in standard deviations."""


@dataclass(frozen=True, slots=True)
class ProjectedGradient:
    """What probing a direction found.

    Attributes:
        value: how fast the loss rises along it; nan or infinite where the loss is.
        loss: without a move, if that was looked at; else the mean of the two probes'.
    """

    value: float
    loss: float


def projected_gradient(
    closure: Closure, model: PerturbedModel, seed: int, eps: float, *, base_loss: float | None = None
) -> ProjectedGradient:
    """Return how fast the loss rises along a direction, from differences.

    Args:
        closure: called twice, or once.
        model: of the module.
        seed: of the direction.
        eps: how far to go.
        base_loss: the loss without a move, for a one-sided difference (L(theta + eps z) - L(theta)) / eps; None: take
            (L(theta + eps z) - L(theta - eps z)) / (2 eps).
    """
    ahead = float(model.loss_at(seed, eps, closure))
    if base_loss is not None:
        return ProjectedGradient((ahead - base_loss) / eps, base_loss)
    behind = float(model.loss_at(seed, -eps, closure))
    return ProjectedGradient((ahead - behind) / (2 * eps), (ahead + behind) / 2)


def directional_derivative(closure: Closure, model: PerturbedModel, seed: int) -> ProjectedGradient:
    """Return how fast the loss rises along a direction, exactly, from one pass that carries derivatives along."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention has no such derivative, neither this nor the next
    try:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            value, tangent = forward_ad.unpack_dual(model.jvp(seed, closure))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return ProjectedGradient(0.0 if tangent is None else float(tangent), float(value))


def reject_outliers(
    projected_gradients: Sequence[tuple[int, float]], history: Sequence[Sequence[float]], threshold: float
) -> tuple[Mapping[int, float], list[list[float]]]:
    """Leave out the slopes that are not finite, or larger than a number of robust standard deviations.

    A standard deviation is estimated from the median of recent magnitudes, which does not mind an outlier, not even in
    the first step; and if most slopes have grown, it follows. Each block of directions has its own.

    Args:
        projected_gradients: (seed, slope) of each direction of a step.
        history: magnitudes of the last slopes, in a list for each block of the directions; the first step has none.
        threshold: in standard deviations; 0: all that are finite are used.

    Returns:
        Seed -> slope of those that are used; and what is `recent` for the next step.
    """
    blocks = len(history)
    finite = {seed: value for seed, value in projected_gradients if math.isfinite(value)}
    sizes = []
    for block, before in enumerate(history):
        new = [abs(value) for seed, value in finite.items() if value and seed % blocks == block]
        sizes.append([*before, *new][-max(HISTORY, len(new)) :])
    limits = [threshold * median_low(one) / MEDIAN_MAGNITUDE if threshold and one else math.inf for one in sizes]
    return {seed: value for seed, value in finite.items() if abs(value) <= limits[seed % blocks]}, sizes
