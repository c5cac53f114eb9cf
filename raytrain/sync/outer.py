"""The outer step: how the point that all replicas share moves by the mean of what each of them did on its own."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Penalty(Protocol):
    """What a late difference is divided by, from what every replica already holds: so replicas never part."""

    def __call__(self, step: "OuterStep", difference: Tensor) -> float:
        """Return the divisor, at least 1, for the difference that has just arrived."""
        ...


@dataclass(kw_only=True)
class OuterStep:
    """SGD with momentum on differences: shape (n,), the start of a round minus its end, averaged over the replicas.

    With difference d, momentum v <- beta v + d, clipped by element, and the point X <- X - rate v, or by Nesterov
    X <- X - rate (d + beta v). With rate 1 and no momentum that is the mean of the replicas (local SGD), with momentum
    it is SlowMo (Wang et al. 2020), with Nesterov's DiLoCo (Douillard et al. 2023).

    Attributes:
        rate: of the step.
        beta: how much of the momentum stays.
        nesterov: which of the two.
        clip: the largest element of the momentum; 0: any.
        point: X, equal on all replicas; set by who steps.
        momentum: v, or None before there is any, or without.
    """

    rate: float = 1.0
    beta: float = 0.0
    nesterov: bool = False
    clip: float = 0.0
    point: Tensor = field(default_factory=lambda: torch.zeros(0))
    momentum: Tensor | None = None

    def begin(self, point: Tensor, momentum: Tensor | None) -> None:
        """Take the point that all replicas begin with, and the momentum that there was, if a run goes on."""
        self.point = point
        if self.beta:
            self.momentum = torch.zeros_like(point) if momentum is None else momentum.to(point)

    def __call__(self, difference: Tensor, beta: float | None = None) -> None:
        """Move the point; `difference` is used up."""
        beta = self.beta if beta is None else beta
        if self.momentum is None:
            step = difference
            if self.clip:
                step.clamp_(-self.clip, self.clip)
        else:
            self.momentum.mul_(beta).add_(difference)
            if self.clip:
                self.momentum.clamp_(-self.clip, self.clip)
            step = difference.add_(self.momentum, alpha=beta) if self.nesterov else self.momentum
        self.point.add_(step, alpha=-self.rate)
