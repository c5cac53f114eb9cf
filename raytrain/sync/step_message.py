"""One extra all-reduce in each step: loss and weight totals, stop flags, and buffers (BatchNorm statistics)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raytrain.sync.buffers import BufferMean, floating_buffers


class StepMessage:
    """Packs scalars and buffers into one message.

    A buffer that the forward pass updates (the running mean of a BatchNorm) becomes the weighted mean of the replicas'.

    Args:
        module: whose persistent floating-point buffers are averaged.
        device: of messages.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._buffers = BufferMean(floating_buffers(module))
        self._count = 0

    def pack(self, scalars: Sequence[float]) -> Tensor:
        """Return the message to all-reduce; `scalars` starts with this replica's weight."""
        self._count, weight = len(scalars), scalars[0]
        message = torch.zeros(self._count + self._buffers.size, dtype=torch.float64, device=self._device)
        message[: self._count] = torch.tensor(scalars, dtype=torch.float64)
        if weight:
            self._buffers.pack(message[self._count :])
            message[self._count :].mul_(weight)
        return message

    def unpack(self, summed: Tensor) -> list[float]:
        """Load the mean of the buffers, and return the sums of the scalars."""
        totals: list[float] = summed[: self._count].tolist()
        self._buffers.unpack(summed[self._count :] / (totals[0] or 1.0))
        self._buffers.load()
        return totals
