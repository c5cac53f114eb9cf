"""Averages of buffers over replicas: of running means and variances, and of whatever else a model keeps beside them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from raytrain.tensors import bits_of


def state_tensors(module: nn.Module) -> Iterable[Tensor]:
    """Return each parameter and each buffer that belongs to the module's state, tied ones once."""
    return {id(value): value for value in module.state_dict(keep_vars=True).values()}.values()


def floating_buffers(module: nn.Module) -> list[Tensor]:
    """Return the floating-point buffers of a module's state, tied ones once."""
    return [
        value for value in state_tensors(module) if not isinstance(value, nn.Parameter) and value.is_floating_point()
    ]


class BufferMean:
    """Averages buffers over replicas, and leaves alone what no replica changed.

    With weights w_i and buffers b_i of the replicas, the shared buffer becomes X = sum_i w_i b_i / sum_i w_i. It is the
    mean of values and not a sum of differences, so that whatever comes late, a mean of variances is a variance. Where
    no replica with a weight changed a buffer since X was last agreed on, X keeps its bits: constants do not drift, and
    need not be finite, as an additive attention mask.

    Args:
        local: this replica's buffers, equal on all replicas now.

    Attributes:
        anchor: X, one for each buffer.
        round_start: where the round that is under way began, one for each buffer.
        size: the numbers that a message takes.
    """

    def __init__(self, local: Sequence[Tensor]) -> None:
        self.local = local
        self.anchor = [buffer.clone() for buffer in local]
        self.round_start = [buffer.clone() for buffer in local]
        self.size = len(local) + sum(buffer.numel() for buffer in local)

    def pack(self, message: Tensor) -> None:
        """Write into a message, shape (size,): whether each buffer changed (1 or 0), and then all their values."""
        for place, (live, shared) in enumerate(zip(self.local, self.anchor, strict=True)):
            message[place] = (bits_of(live) != bits_of(shared)).any()
        for view, live in zip(self._values(message), self.local, strict=True):
            view.copy_(live)

    def unpack(self, mean: Tensor) -> None:
        """Take X from the weighted mean of the messages; this replica's own buffers stay as they are."""
        for changed, value, shared in zip(mean[: len(self.local)], self._values(mean), self.anchor, strict=True):
            shared.copy_(torch.where(changed > 0, value.to(shared.dtype), shared))

    def start_round(self, *, keep: bool) -> None:
        """Begin a round, at this replica's own buffers or at X."""
        for live, shared, begun in zip(self.local, self.anchor, self.round_start, strict=True):
            begun.copy_(live if keep else shared)
        if not keep:
            self.load()

    def load(self) -> None:
        """Go on from X."""
        for live, shared in zip(self.local, self.anchor, strict=True):
            live.copy_(shared)

    def approach(self, alpha: float) -> None:
        """Move own buffers by pull * (X - where the round began), but never past X.

        A running average forgets: since the round began, part of that distance has gone by itself. To take it out again
        could end on the other side of X, where a variance may be below 0.

        Args:
            alpha: 1: to X, where nothing changed since the round began.
        """
        for live, shared, begun in zip(self.local, self.anchor, self.round_start, strict=True):
            place = begun.lerp(shared, alpha) + (live - begun)
            place = place.clamp(torch.minimum(live, shared), torch.maximum(live, shared))
            # What is infinite has no distance from anything: it stays, or is X already.
            live.copy_(torch.where(place.isnan() | (bits_of(live) == bits_of(shared)), live, place))

    def _values(self, message: Tensor) -> list[Tensor]:
        parts = message[len(self.local) :].split([buffer.numel() for buffer in self.local])
        return [part.view_as(buffer) for part, buffer in zip(parts, self.local, strict=True)]
