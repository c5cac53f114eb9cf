"""Averages of buffers over replicas: BatchNorm statistics, and other state that is not trained."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from raytrain.tensors import bits_of


def state_tensors(module: nn.Module) -> Iterable[Tensor]:
    """Return the parameters and persistent buffers of a module, tied ones once."""
    return {id(value): value for value in module.state_dict(keep_vars=True).values()}.values()


def floating_buffers(module: nn.Module) -> list[Tensor]:
    """Return the persistent floating-point buffers of a module, tied ones once."""
    return [
        value for value in state_tensors(module) if not isinstance(value, nn.Parameter) and value.is_floating_point()
    ]


class BufferMean:
    """Averages buffers over replicas.

    With weights w_i and buffers b_i of the replicas, the anchor is X = sum_i w_i b_i / sum_i w_i. It averages values
    and not differences, so that a delayed mean of variances is still a variance. A buffer that no replica of positive
    weight has changed since the last average keeps its bits: constants do not drift, and need not be finite, such as an
    additive attention mask.

    Args:
        local: this replica's buffers, equal on all replicas at this time.

    Attributes:
        anchor: X, one tensor for each buffer.
        round_start: buffers at the start of the round, one tensor for each.
        size: values in a message.
    """

    def __init__(self, local: Sequence[Tensor]) -> None:
        self.local = local
        self.anchor = [buffer.clone() for buffer in local]
        self.round_start = [buffer.clone() for buffer in local]
        self.size = len(local) + sum(buffer.numel() for buffer in local)

    def pack(self, message: Tensor) -> None:
        """Write into a message, shape (size,): for each buffer whether it changed (1 or 0), and then all values."""
        for place, (live, shared) in enumerate(zip(self.local, self.anchor, strict=True)):
            message[place] = (bits_of(live) != bits_of(shared)).any()
        for view, live in zip(self._values(message), self.local, strict=True):
            view.copy_(live)

    def unpack(self, mean: Tensor) -> None:
        """Set X from the weighted mean of the messages; this replica's own buffers stay as they are."""
        for changed, value, shared in zip(mean[: len(self.local)], self._values(mean), self.anchor, strict=True):
            shared.copy_(torch.where(changed > 0, value.to(shared.dtype), shared))

    def start_round(self, *, keep: bool) -> None:
        """Start a round at this replica's own buffers, or with `keep=False` at X."""
        for live, shared, begun in zip(self.local, self.anchor, self.round_start, strict=True):
            begun.copy_(live if keep else shared)
        if not keep:
            self.load()

    def load(self) -> None:
        """Set this replica's buffers to X."""
        for live, shared in zip(self.local, self.anchor, strict=True):
            live.copy_(shared)

    def approach(self, alpha: float) -> None:
        """Interpolate own buffers toward X: b <- b + alpha * (X - round_start), but never past X.

        A running average forgets, so part of that distance has gone by itself since the round started. Past X, a
        variance could be negative.
        """
        for live, shared, begun in zip(self.local, self.anchor, self.round_start, strict=True):
            place = begun.lerp(shared, alpha) + (live - begun)
            place = place.clamp(torch.minimum(live, shared), torch.maximum(live, shared))
            # What is infinite has no distance from anything: it stays, or equals X already.
            live.copy_(torch.where(place.isnan() | (bits_of(live) == bits_of(shared)), live, place))

    def _values(self, message: Tensor) -> list[Tensor]:
        parts = message[len(self.local) :].split([buffer.numel() for buffer in self.local])
        return [part.view_as(buffer) for part, buffer in zip(parts, self.local, strict=True)]
