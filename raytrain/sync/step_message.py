"""What replicas sum at each step beside the gradients: a few numbers, and the buffers that moved."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raytrain.sync.buffers import BufferMean, floating_buffers


class StepMessage:
    """Packs numbers and buffers into one message.

    A buffer that the forward pass moves (the running mean of a BatchNorm) becomes the weighted mean of the replicas'.

    Args:
        module: whose buffers; those of floats that belong to its state.
        device: where messages must be.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._buffers = BufferMean(floating_buffers(module))
        self._count = 0

    def pack(self, numbers: Sequence[float]) -> Tensor:
        """Return what to sum over the replicas; `numbers` starts with this replica's weight."""
        self._count, weight = len(numbers), numbers[0]
        message = torch.zeros(self._count + self._buffers.size, dtype=torch.float64, device=self._device)
        message[: self._count] = torch.tensor(numbers, dtype=torch.float64)
        if weight:
            self._buffers.pack(message[self._count :])
            message[self._count :].mul_(weight)
        return message

    def unpack(self, summed: Tensor) -> list[float]:
        """Take the mean of the buffers, and return the sums of the numbers."""
        numbers: list[float] = summed[: self._count].tolist()
        self._buffers.unpack(summed[self._count :] / (numbers[0] or 1.0))
        self._buffers.load()
        return numbers
