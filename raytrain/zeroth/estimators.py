"""Finite-difference and forward-mode estimates of the directional derivative of a loss.

Sources: Spall 1992, SPSA; Malladi et al. 2023, MeZO; Baydin et al. 2022.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median_low

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from raytrain.zeroth.perturbed import Closure, PerturbedModel

HISTORY = 64
"""Projected gradients per block that the scale of an outlier is estimated from."""
MEDIAN_MAGNITUDE = NormalDist().inv_cdf(0.75)
"""Median magnitude of a normal variate, in standard deviations."""


@dataclass(frozen=True, slots=True)
class ProjectedGradient:
    """The derivative of a loss along one direction, and the loss.

    Attributes:
        value: estimate of z . grad L(theta); nan or infinite if a loss is.
        loss: L(theta) if it was evaluated, else the mean of both perturbed losses.
    """

    value: float
    loss: float


def projected_gradient(
    closure: Closure, model: PerturbedModel, seed: int, eps: float, *, base_loss: float | None = None
) -> ProjectedGradient:
    """Estimate the derivative of a loss along z(seed) by finite differences.

    central: g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)
    forward: g = (L(theta + eps z) - L(theta)) / eps

    Args:
        closure: evaluates the loss; called twice, or once for a forward difference.
        model: whose parameters are perturbed.
        seed: of the direction.
        eps: length of the perturbation.
        base_loss: L(theta), for a forward difference; None: central difference.

    Source: Malladi et al. 2023, MeZO, Definition 1 (central).
    """
    ahead = float(model.loss_at(seed, eps, closure))
    if base_loss is not None:
        return ProjectedGradient((ahead - base_loss) / eps, base_loss)
    behind = float(model.loss_at(seed, -eps, closure))
    return ProjectedGradient((ahead - behind) / (2 * eps), (ahead + behind) / 2)


def directional_derivative(closure: Closure, model: PerturbedModel, seed: int) -> ProjectedGradient:
    """Compute the derivative of a loss along z(seed) exactly, by a Jacobian-vector product.

    Source: Baydin et al. 2022, "Gradients without backpropagation", Algorithm 1.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # no fused attention, here and below, has a forward-mode derivative
    try:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            value, tangent = forward_ad.unpack_dual(model.jvp(seed, closure))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return ProjectedGradient(0.0 if tangent is None else float(tangent), float(value))


def reject_outliers(
    projected_gradients: Sequence[tuple[int, float]], history: Sequence[Sequence[float]], threshold: float
) -> tuple[Mapping[int, float], list[list[float]]]:
    """Drop projected gradients that are not finite, or larger than a number of robust standard deviations.

    The standard deviation is the median magnitude of the block's last `HISTORY` projected gradients, those of this step
    included, over `MEDIAN_MAGNITUDE`. A single outlier does not change it, even in the first step. If most magnitudes
    grow, it grows with them.

    Args:
        projected_gradients: (seed, projected gradient) of each direction of a step.
        history: recent magnitudes, one list for each block of the directions; empty before the first step.
        threshold: in standard deviations; 0: only drop what is not finite.

    Returns:
        Seed -> projected gradient of those that are kept, and `history` for the next step.
    """
    blocks = len(history)
    finite = {seed: value for seed, value in projected_gradients if math.isfinite(value)}
    updated = []
    for block, before in enumerate(history):
        new = [abs(value) for seed, value in finite.items() if value and seed % blocks == block]
        updated.append([*before, *new][-max(HISTORY, len(new)) :])
    limits = [threshold * median_low(one) / MEDIAN_MAGNITUDE if threshold and one else math.inf for one in updated]
    return {seed: value for seed, value in finite.items() if abs(value) <= limits[seed % blocks]}, updated
