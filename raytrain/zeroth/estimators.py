"""How steep a loss is along a direction, from forward passes alone (Malladi et al. 2023, MeZO)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median_low

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from raytrain.zeroth.perturbed import Loss, Probe

RECENT = 64
"""Slopes that say what is ordinary."""
MEDIAN_SIZE = NormalDist().inv_cdf(0.75)
"""Of normal numbers, in standard deviations."""


@dataclass(frozen=True, slots=True)
class Slope:
    """What probing a direction found.

    Attributes:
        value: how fast the loss rises along it; nan or infinite where the loss is.
        loss: without a move, if that was looked at; else the mean of the two probes'.
    """

    value: float
    loss: float


def slope(loss: Loss, probe: Probe, seed: int, eps: float, *, at_rest: float | None = None) -> Slope:
    """Return how fast the loss rises along a direction, from differences.

    Args:
        loss: called twice, or once.
        probe: of the module.
        seed: of the direction.
        eps: how far to go.
        at_rest: the loss without a move, for a one-sided difference (L(theta + eps z) - L(theta)) / eps; None: take
            (L(theta + eps z) - L(theta - eps z)) / (2 eps).
    """
    ahead = float(probe.at(seed, eps, loss))
    if at_rest is not None:
        return Slope((ahead - at_rest) / eps, at_rest)
    behind = float(probe.at(seed, -eps, loss))
    return Slope((ahead - behind) / (2 * eps), (ahead + behind) / 2)


def derivative(loss: Loss, probe: Probe, seed: int) -> Slope:
    """Return how fast the loss rises along a direction, exactly, from one pass that carries derivatives along."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention has no such derivative, neither this nor the next
    try:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            value, tangent = forward_ad.unpack_dual(probe.along(seed, loss))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return Slope(0.0 if tangent is None else float(tangent), float(value))


def without_outliers(
    slopes: Sequence[tuple[int, float]], recent: Sequence[Sequence[float]], threshold: float
) -> tuple[Mapping[int, float], list[list[float]]]:
    """Leave out the slopes that are not finite, or larger than a number of robust standard deviations.

    A standard deviation is estimated from the median of recent magnitudes, which does not mind an outlier, not even in
    the first step; and if most slopes have grown, it follows. Each block of directions has its own.

    Args:
        slopes: (seed, slope) of each direction of a step.
        recent: magnitudes of the last slopes, in a list for each block of the directions; the first step has none.
        threshold: in standard deviations; 0: all that are finite are used.

    Returns:
        Seed -> slope of those that are used; and what is `recent` for the next step.
    """
    blocks = len(recent)
    finite = {seed: value for seed, value in slopes if math.isfinite(value)}
    sizes = []
    for block, before in enumerate(recent):
        new = [abs(value) for seed, value in finite.items() if value and seed % blocks == block]
        sizes.append([*before, *new][-max(RECENT, len(new)) :])
    limits = [threshold * median_low(one) / MEDIAN_SIZE if threshold and one else math.inf for one in sizes]
    return {seed: value for seed, value in finite.items() if abs(value) <= limits[seed % blocks]}, sizes
