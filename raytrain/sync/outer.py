"""Outer optimizer: updates the anchor, which all replicas share, by the averaged pseudo-gradient."""

from typing import Any, Protocol

import torch
from torch import Tensor

from raytrain.serialization import state_to_device

KAPPA = 3.0
CURVATURE_DECAY = 0.7


class OuterOptimizer:
    """SGD with momentum on pseudo-gradients, which are averaged over the replicas.

    With the pseudo-gradient d (round start minus round end, shape (n,)), staleness penalty L and momentum factor beta:

        v <- clip(beta v + d / L)
        X <- X - lr v                    or with Nesterov momentum  X <- X - lr (d / L + beta v)

    lr = 1 without momentum is local SGD, Nesterov momentum is DiLoCo (Douillard et al. 2023). SlowMo (Wang et al. 2020,
    Alg. 1) divides d by the inner learning rate gamma at the end of the round: u <- beta u + d / gamma,
    X <- X - lr gamma u. Here v is gamma u, so v <- beta (gamma / gamma') v + d, with the gamma' of the previous round;
    while gamma is constant, that is plain momentum.

    Args:
        lr: outer learning rate.
        momentum_factor: beta.
        nesterov: whether momentum is Nesterov's.
        lr_scaled: whether momentum scales with the inner learning rate, as SlowMo's.
        clip: largest absolute value in v; 0: no clipping.
        penalty: L, equal on all replicas; None: 1.

    Attributes:
        anchor: X, equal on all replicas.
        momentum_buffer: v, or None without momentum.
    """

    def __init__(
        self,
        *,
        lr: float = 1.0,
        momentum_factor: float = 0.0,
        nesterov: bool = False,
        lr_scaled: bool = False,
        clip: float = 0.0,
        penalty: "Penalty | None" = None,
    ) -> None:
        self.lr = lr
        self.nesterov = nesterov
        self.lr_scaled = lr_scaled
        self.clip = clip
        self.momentum_factor = momentum_factor
        self.penalty: Penalty = penalty or NoPenalty()
        self.anchor = torch.zeros(0)
        self.momentum_buffer: Tensor | None = None
        self._lr = 0.0  # inner learning rate of the previous round; 0: there was none

    @property
    def last_step(self) -> Tensor:
        """The last outer step over lr, for penalties that need it."""
        return torch.zeros_like(self.anchor) if self.momentum_buffer is None else self.momentum_buffer

    def reset(self, anchor: Tensor, state: Any) -> None:
        """Set the anchor, and restore what `state_dict` returned if a run resumes."""
        self.anchor = anchor
        if self.momentum_factor or self.penalty.needs_last_step:
            self.momentum_buffer = torch.zeros_like(anchor)
        if state is not None:
            if self.momentum_buffer is not None and state["momentum"] is not None:
                self.momentum_buffer.copy_(state["momentum"])
            self.penalty.load_state_dict(state_to_device(state["penalty"], anchor.device))
            self._lr = state["lr"]

    def __call__(self, difference: Tensor, lr: float) -> None:
        """Update the anchor.

        Args:
            difference: the pseudo-gradient, overwritten.
            lr: inner learning rate of the last local step, or anything proportional to it.
        """
        divisor = self.penalty(self, difference)
        if divisor != 1.0:
            difference.div_(divisor)
        step = difference
        if self.momentum_buffer is not None:
            self.momentum_buffer.mul_(self.momentum_factor * self._growth(lr)).add_(difference)
            step = self.momentum_buffer
        if self.clip:
            step.clamp_(-self.clip, self.clip)
        if self.nesterov and self.momentum_buffer is not None:
            step = difference.add_(self.momentum_buffer, alpha=self.momentum_factor)
        self.anchor.add_(step, alpha=-self.lr)

    def state_dict(self) -> dict[str, Any]:
        """Return all state but the anchor."""
        return {"momentum": self.momentum_buffer, "penalty": self.penalty.state_dict(), "lr": self._lr}

    def _growth(self, lr: float) -> float:
        """Return the inner learning rate over that of the previous round; 0 changes nothing."""
        before, self._lr = self._lr, lr or self._lr
        return self._lr / before if self.lr_scaled and before else 1.0


def max_stable_lr(outer: OuterOptimizer, *, late: bool) -> float:
    """Return the upper bound of lr / L for a stable outer step on a quadratic that a round of local steps solves.

    Where a round goes a share c of the way to the minimum, the bound holds for lr c / L. The characteristic polynomials
    are z^2 - (1 + beta) z + beta + lr c / L with a delay of one round, z^2 - (1 + beta - lr c / L) z + beta without,
    and with Nesterov momentum z^2 - (1 + beta - (1 + beta) lr c / L) z + beta (1 - lr c / L).

    Args:
        outer: the outer optimizer.
        late: whether pseudo-gradients arrive a round late.
    """
    beta = outer.momentum_factor
    if late:
        return 1.0 - beta
    return 2.0 * (1.0 + beta) / (1.0 + 2.0 * beta if outer.nesterov else 1.0)


class Penalty(Protocol):
    """Staleness penalty: divides a pseudo-gradient that was computed at an older anchor.

    Attributes:
        needs_last_step: whether it uses the last outer step, which then is kept even without momentum.
    """

    needs_last_step: bool

    def __call__(self, outer: OuterOptimizer, difference: Tensor) -> float:
        """Return the divisor for a pseudo-gradient."""
        ...

    def minimum(self, outer: OuterOptimizer) -> float:
        """Return the smallest divisor where a round of local steps reaches the minimum."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


class NoPenalty:
    """Divide by 1."""

    needs_last_step = False

    def __call__(self, outer: OuterOptimizer, difference: Tensor) -> float:  # noqa: ARG002
        """Return 1."""
        return 1.0

    def minimum(self, outer: OuterOptimizer) -> float:  # noqa: ARG002
        """Return 1."""
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


class ConstantPenalty(NoPenalty):
    """Divide by 2 lr / (1 - beta), twice what is stable where a round of local steps reaches the minimum."""

    def __call__(self, outer: OuterOptimizer, difference: Tensor) -> float:  # noqa: ARG002
        """Return the divisor."""
        return self.minimum(outer)

    def minimum(self, outer: OuterOptimizer) -> float:
        """Return the divisor."""
        return 2.0 * outer.lr / (1 - outer.momentum_factor)


class GapAwarePenalty(NoPenalty):
    """Divide by 1 + |last outer step| / |pseudo-gradient| (after Barkai et al. 2020)."""

    needs_last_step = True

    def __call__(self, outer: OuterOptimizer, difference: Tensor) -> float:
        """Return the divisor."""
        length = float(difference.norm())
        return 1.0 + outer.lr * float(outer.last_step.norm()) / length if length else 1.0


class SecantPenalty:
    """Divide by kappa lr c / (1 - beta), at least 1, with the measured curvature c of the pseudo-gradient.

    With a delay of one round and momentum, outer steps are unstable where lr c / L reaches 1 - beta (then
    z^2 - (1 + beta) z + beta + lr c / L has a root outside the unit circle). With the anchor x at which a
    pseudo-gradient d was computed, c = <x' - x, d' - d> / |x' - x|^2, clipped to [0, 1] and averaged over rounds; 1
    before the first estimate. It keeps the outer step before the last one, a buffer as large as the model.
    """

    needs_last_step = True

    def __init__(self) -> None:
        self.curvature: float | None = None
        self._older: Tensor | None = None  # the step before the last one
        self._along = 0.0  # the difference before this one, along it

    def __call__(self, outer: OuterOptimizer, difference: Tensor) -> float:
        """Return the divisor."""
        if self._older is None:
            self._older = torch.zeros_like(difference)
        length = float(self._older.dot(self._older))
        if length:
            turn = -(float(self._older.dot(difference)) - self._along) / (outer.lr * length)
            found = min(max(turn, 0.0), 1.0)
            self.curvature = (
                found if self.curvature is None else CURVATURE_DECAY * self.curvature + (1 - CURVATURE_DECAY) * found
            )
        self._older.copy_(outer.last_step)
        self._along = float(self._older.dot(difference))
        return max(
            1.0, KAPPA * outer.lr * (1.0 if self.curvature is None else self.curvature) / (1 - outer.momentum_factor)
        )

    def minimum(self, outer: OuterOptimizer) -> float:
        """Return the divisor for c = 1."""
        return max(1.0, KAPPA * outer.lr / (1 - outer.momentum_factor))

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""
        return {"curvature": self.curvature, "older": self._older, "along": self._along}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.curvature, self._older, self._along = state["curvature"], state["older"], state["along"]
