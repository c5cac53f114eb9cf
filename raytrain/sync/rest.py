"""What replicas sum at each step beside the gradients: a few numbers, and how far buffers moved."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class Rest:
    """Packs numbers and the moves of buffers into one message.

    A buffer that the forward pass moves (the running mean of a BatchNorm) is then moved by the weighted mean of what it
    moved on each replica.

    Args:
        module: whose buffers; those of floats that belong to its state.
        device: where messages must be.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        ours = {id(tensor) for tensor in persistent(module)}
        self._buffers = [buffer for buffer in module.buffers() if id(buffer) in ours and buffer.is_floating_point()]
        self._before = [buffer.clone() for buffer in self._buffers]
        self._count = 0

    def pack(self, numbers: Sequence[float]) -> Tensor:
        """Return what to sum over the replicas; `numbers` starts with this replica's weight."""
        self._count = len(numbers)
        moves = [
            (buffer.double() - before.double()).flatten() * numbers[0]
            for buffer, before in zip(self._buffers, self._before, strict=True)
        ]
        return torch.cat([torch.tensor(numbers, dtype=torch.float64).to(self._device), *moves])

    def take(self, summed: Tensor) -> list[float]:
        """Move the buffers by the mean, and return the sums of the numbers."""
        numbers: list[float] = summed[: self._count].tolist()
        moves = summed[self._count :].split([buffer.numel() for buffer in self._buffers])
        for buffer, before, move in zip(self._buffers, self._before, moves, strict=True):
            before.add_((move / (numbers[0] or 1.0)).view_as(before))
            buffer.copy_(before)
        return numbers


def persistent(module: nn.Module) -> Iterable[Tensor]:
    """Return each parameter and each buffer that belongs to the module's state, tied ones once."""
    return {id(value): value for value in module.state_dict(keep_vars=True).values()}.values()
