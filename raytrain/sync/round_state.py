"""State of a replica between two averages: counters, and the flat vectors that hold its parameters and buffers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raytrain.sync.buffers import BufferMean, floating_buffers

EXTRA_SCALARS = 4
"""Sent with each pseudo-gradient: a stop flag, and seconds of a step, of an all-reduce and of its overhead."""


@dataclass
class RoundState:
    """Counters of the round that goes on, and of the one whose average is in flight.

    Attributes:
        steps: local steps in this round.
        samples: of this replica in this round, which weigh its pseudo-gradient.
        steps_since_momentum: local steps since global momentum was applied.
        sent_steps: local steps in the round that is in flight.
        apply_at: steps of this round after which the average in flight is applied.
    """

    steps: int = 0
    samples: float = 0.0
    steps_since_momentum: int = 0
    sent_steps: int = 0
    apply_at: int = 0

    def add_step(self, samples: float) -> None:
        """Count a local step."""
        self.steps += 1
        self.steps_since_momentum += 1
        self.samples += samples

    def start_next(self, delay: int) -> None:
        """Start the next round; the average of this one is applied after `delay` of its steps."""
        self.sent_steps, self.apply_at = self.steps, delay
        self.steps, self.samples = 0, 0.0


class ReplicaVectors:
    """The parameters and buffers of a replica, and flat vectors of the same layout.

    Args:
        module: its trainable parameters and floating-point buffers.
        share_buffers: whether buffers are averaged in each round, and not only at the end.

    Attributes:
        parameters: of the module, trained.
        buffers: shared in each round.
        own_buffers: averaged at the end alone.
        message: what is all-reduced: parameters (n values), then buffers, extra scalars, and room for the weight.
        round_start: parameters at the start of the round, shape (n,).
        anchor: X, shape (n,).
        exact: values of the message that are never compressed: all but the parameters, and without the weight.
    """

    def __init__(self, module: nn.Module, *, share_buffers: bool) -> None:
        self.parameters = [value.data for value in module.parameters() if value.requires_grad]
        buffers = floating_buffers(module)
        self.buffers = BufferMean(buffers if share_buffers else [])
        self.own_buffers = [] if share_buffers else buffers
        size = sum(value.numel() for value in self.parameters)
        self.exact = self.buffers.size + EXTRA_SCALARS
        self.message = flat_zeros([*self.parameters, *self.buffers.local], size + self.exact + 1)
        self._packed = _views(self.message, self.parameters)
        self.pack()
        self.round_start = self.message[:size].clone()
        self.anchor = self.round_start.clone()

    @property
    def pseudo_gradient(self) -> Tensor:
        """The message's part for the parameters, shape (n,)."""
        return self.message[: self.round_start.numel()]

    @property
    def buffer_message(self) -> Tensor:
        """The message's part for the buffers."""
        return self.message[self.round_start.numel() :][: self.buffers.size]

    @property
    def scalars(self) -> Tensor:
        """The message's extra scalars, shape (EXTRA_SCALARS,)."""
        return self.message[-EXTRA_SCALARS - 1 : -1]

    @property
    def average(self) -> Tensor:
        """The message without scalars and weight: what an interrupted run has to keep."""
        return self.message[: -EXTRA_SCALARS - 1]

    def pack(self) -> None:
        """Copy the parameters into the message."""
        torch._foreach_copy_(self._packed, self.parameters)

    def unpack(self) -> None:
        """Copy the message into the parameters."""
        torch._foreach_copy_(self.parameters, self._packed)

    def read(self, flat: Tensor) -> None:
        """Copy the parameters into a vector, shape (n,)."""
        torch._foreach_copy_(_views(flat, self.parameters), self.parameters)

    def write(self, flat: Tensor) -> None:
        """Copy a vector, shape (n,), into the parameters."""
        torch._foreach_copy_(self.parameters, _views(flat, self.parameters))


def flat_zeros(tensors: Sequence[Tensor], size: int) -> Tensor:
    """Return zeros, shape (size,), of the widest type of `tensors`, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.zeros(size, dtype=dtype, device=tensors[0].device)


def _views(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return views into `flat` in the shapes of `tensors`."""
    parts = flat[: sum(tensor.numel() for tensor in tensors)].split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
