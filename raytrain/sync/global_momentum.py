"""Momentum that is spread over local steps: how far all replicas move in a step, of late."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

HORIZON_STEPS = 24
"""Steps over which movements are averaged, at least: over fewer, what an optimizer's own momentum does comes twice."""


class GlobalMomentum:
    """The mean movement of the replicas in a step, of which each adds a share to its own steps.

    When the mean movement m of a round of tau steps is known, v <- v + min(1, tau / 24) (m / tau - v), and from then on
    a replica moves by its own steps and share * v for each, which is part of the movement that is averaged next. So a
    movement that lasts is amplified by up to 1 / (1 - share), which is reached slowly, and what changes from round to
    round is not. Between rounds a replica so goes the way that the others go too, and not only its own.

    Nesterov's momentum of the mean (DiLoCo) moves the replicas as far, but all at once when the mean arrives: with
    lateness or with short rounds it diverges, where its product with the rate is large. This one was stable on every
    quadratic tried of which a local step leaves -0.9 to 0.99 of a distance, with shares up to 0.9, rounds of 1 to 200
    steps and means that come up to a round late, where local steps had no momentum of their own, and with a share of
    0.7 where that was 0.9. With 0.95, or where a step leaves -0.99, it can diverge.

    Args:
        coefficient: how much of it is added.
    """

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def reset(self, anchor: Tensor, parameters: Sequence[nn.Parameter], state: Tensor | None) -> None:
        """Begin at rest, or go on from what `state_dict` returned.

        Args:
            anchor: flat, the parameters' numbers.
            parameters: what is moved; those that do not train at the time are left alone.
            state: of a run before.
        """
        self._parameters = parameters
        self._momentum = torch.zeros_like(anchor) if state is None else state.to(anchor, copy=True)
        parts = self._momentum.split([one.numel() for one in parameters])
        self._views = [part.view_as(one) for part, one in zip(parts, parameters, strict=True)]

    def update(self, difference: Tensor, steps: int) -> None:
        """Take in the difference between where a round of so many steps began and where it ended, the mean of all."""
        weight = min(1.0, steps / HORIZON_STEPS)
        self._momentum.mul_(1.0 - weight).add_(difference, alpha=-weight / steps)

    def apply(self, steps: int) -> None:
        """Move the parameters by what so many steps add."""
        pairs = zip(self._parameters, self._views, strict=True)
        if moving := [(one.data, part) for one, part in pairs if one.requires_grad]:
            torch._foreach_add_(*map(list, zip(*moving, strict=True)), alpha=self.coefficient * steps)

    def state_dict(self) -> Tensor:
        """Return all there is."""
        return self._momentum
