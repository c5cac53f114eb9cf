"""The outer step: how the point that all replicas share moves by the mean of what each of them did on its own."""

from typing import Any, Protocol

import torch
from torch import Tensor

from raytrain.serialization import state_to_device

KAPPA = 3.0
MEMORY = 0.7


class OuterStep:
    """SGD with momentum on differences: shape (n,), the start of a round minus its end, averaged over the replicas.

    With difference d and penalty L, momentum v <- beta v + d / L, clipped by element, and the point X <- X - rate v, or
    by Nesterov X <- X - rate (d / L + beta v). With rate 1 and no momentum that is the mean of the replicas (local
    SGD), with Nesterov's it is DiLoCo (Douillard et al. 2023).

    SlowMo (Wang et al. 2020, algorithm 1) divides d by the learning rate gamma of the replicas' own steps, as it is at
    the round's end: u <- beta u + d / gamma, X <- X - rate gamma u. Here v is gamma u, so v <- beta (gamma / gamma') v
    + d with the gamma' of the round before: while gamma stays the same, that is the plain momentum.

    Args:
        rate: of the step.
        beta: how much of the momentum stays.
        nesterov: which of the two.
        scaled: whether the momentum scales with the learning rate of the replicas' own steps, as SlowMo's.
        clip: the largest element of the momentum; 0: any.
        penalty: finds L from what every replica holds, so that they do not part; None: 1.

    Attributes:
        point: X, equal on all replicas.
        momentum: v, or None where there is none.
    """

    def __init__(
        self,
        *,
        rate: float = 1.0,
        beta: float = 0.0,
        nesterov: bool = False,
        scaled: bool = False,
        clip: float = 0.0,
        penalty: "Penalty | None" = None,
    ) -> None:
        self.rate = rate
        self.nesterov = nesterov
        self.scaled = scaled
        self.clip = clip
        self.beta = beta
        self.penalty: Penalty = penalty or NoPenalty()
        self.point = torch.zeros(0)
        self.momentum: Tensor | None = None
        self._lr = 0.0  # of the round before; 0: there was none

    @property
    def last(self) -> Tensor:
        """The last step over the rate, if a penalty looks back at it."""
        return torch.zeros_like(self.point) if self.momentum is None else self.momentum

    def begin(self, point: Tensor, state: Any) -> None:
        """Take the point that all replicas begin with, and what `state_dict` returned if a run goes on."""
        self.point = point
        if self.beta or self.penalty.looks_back:
            self.momentum = torch.zeros_like(point)
        if state is not None:
            if self.momentum is not None and state["momentum"] is not None:
                self.momentum.copy_(state["momentum"])
            self.penalty.load_state_dict(state_to_device(state["penalty"], point.device))
            self._lr = state["lr"]

    def __call__(self, difference: Tensor, lr: float) -> None:
        """Move the point.

        Args:
            difference: used up.
            lr: the learning rate of the replicas' last step, or anything in proportion to it.
        """
        divisor = self.penalty(self, difference)
        if divisor != 1.0:
            difference.div_(divisor)
        step = difference
        if self.momentum is not None:
            self.momentum.mul_(self.beta * self._growth(lr)).add_(difference)
            step = self.momentum
        if self.clip:
            step.clamp_(-self.clip, self.clip)
        if self.nesterov and self.momentum is not None:
            step = difference.add_(self.momentum, alpha=self.beta)
        self.point.add_(step, alpha=-self.rate)

    def state_dict(self) -> dict[str, Any]:
        """Return all but the point."""
        return {"momentum": self.momentum, "penalty": self.penalty.state_dict(), "lr": self._lr}

    def _growth(self, lr: float) -> float:
        """Return the learning rate over that of the round before; one of 0, which cannot divide, changes nothing."""
        before, self._lr = self._lr, lr or self._lr
        return self._lr / before if self.scaled and before else 1.0


def stable_below(outer: OuterStep, *, late: bool) -> float:
    """Return what rate / L must stay below on a quadratic where local steps go all the way to the minimum in a round.

    Where they go a share c of it, rate * c / L must. The characteristic polynomials are z^2 - (1 + beta) z + beta +
    rate c / L a round late, z^2 - (1 + beta - rate c / L) z + beta at once, and by Nesterov
    z^2 - (1 + beta - (1 + beta) rate c / L) z + beta (1 - rate c / L).

    Args:
        outer: the outer step.
        late: whether differences come a round late.
    """
    beta = outer.beta
    if late:
        return 1.0 - beta
    return 2.0 * (1.0 + beta) / (1.0 + 2.0 * beta if outer.nesterov else 1.0)


class Penalty(Protocol):
    """What a late difference is divided by: it was made from a point that has moved since.

    Attributes:
        looks_back: whether it needs the last outer step, which is the momentum even if beta is 0.
    """

    looks_back: bool

    def __call__(self, outer: OuterStep, difference: Tensor) -> float:
        """Return the divisor for the difference that has just arrived."""
        ...

    def least(self, outer: OuterStep) -> float:
        """Return the smallest divisor where local steps go all the way to the minimum in a round."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what it remembers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        ...


class NoPenalty:
    """Divide by 1."""

    looks_back = False

    def __call__(self, outer: OuterStep, difference: Tensor) -> float:  # noqa: ARG002
        """Return 1."""
        return 1.0

    def least(self, outer: OuterStep) -> float:  # noqa: ARG002
        """Return 1."""
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""


class Constant(NoPenalty):
    """Divide by 2 * rate / (1 - beta), whatever is measured: twice what is stable for the fastest local steps."""

    def __call__(self, outer: OuterStep, difference: Tensor) -> float:  # noqa: ARG002
        """Return it."""
        return self.least(outer)

    def least(self, outer: OuterStep) -> float:
        """Return it."""
        return 2.0 * outer.rate / (1 - outer.beta)


class GapAware(NoPenalty):
    """Divide by 1 + the length of the last outer step over that of the difference (after Barkai et al. 2020)."""

    looks_back = True

    def __call__(self, outer: OuterStep, difference: Tensor) -> float:
        """Return the divisor."""
        length = float(difference.norm())
        return 1.0 + outer.rate * float(outer.last.norm()) / length if length else 1.0


class Secant:
    """Divide by kappa * rate * c / (1 - beta), at least 1, where c is how fast differences shrink along the path.

    A difference that is a round late makes outer steps with momentum unstable where rate * c / L reaches 1 - beta
    (z^2 - (1 + beta) z + beta + rate c / L has a root outside the unit circle). With x the point that a difference d
    was made from, c = <x' - x, d' - d> / |x' - x|^2, between 0 and 1, averaged over rounds; before there is any, 1. The
    step before the last one takes a buffer as large as the model.
    """

    looks_back = True

    def __init__(self) -> None:
        self.curvature: float | None = None
        self._older: Tensor | None = None  # the step before the last one
        self._along = 0.0  # the difference before this one, along it

    def __call__(self, outer: OuterStep, difference: Tensor) -> float:
        """Return the divisor."""
        if self._older is None:
            self._older = torch.zeros_like(difference)
        length = float(self._older.dot(self._older))
        if length:
            turn = -(float(self._older.dot(difference)) - self._along) / (outer.rate * length)
            found = min(max(turn, 0.0), 1.0)
            self.curvature = found if self.curvature is None else MEMORY * self.curvature + (1 - MEMORY) * found
        self._older.copy_(outer.last)
        self._along = float(self._older.dot(difference))
        return max(1.0, KAPPA * outer.rate * (1.0 if self.curvature is None else self.curvature) / (1 - outer.beta))

    def least(self, outer: OuterStep) -> float:
        """Return what it divides by where it measures c = 1."""
        return max(1.0, KAPPA * outer.rate / (1 - outer.beta))

    def state_dict(self) -> dict[str, Any]:
        """Return what it remembers."""
        return {"curvature": self.curvature, "older": self._older, "along": self._along}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.curvature, self._older, self._along = state["curvature"], state["older"], state["along"]
