"""Averages over replicas, and small messages between them."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from raytrain.sync.transport import PendingWork, Transport


class Averager(Protocol):
    """A way to average over the replicas of a transport."""

    transport: Transport

    def average(self, flat: Tensor, weight: float, exact: int = 0) -> PendingWork:
        """Start the weighted mean of `flat` over the replicas, in place.

        Args:
            flat: shape (n + 1,); the last element is room for the weight.
            weight: what this replica's values count; the mean is over those who contributed, so 0 leaves one out.
            exact: how many of the values, those at the end, are not to be rounded.

        Returns:
            When it has arrived: flat, with the mean in flat[:n] and the sum of the weights in flat[n].
        """
        ...

    def all_gather_bytes(self, payload: bytes) -> list[bytes]:
        """Return the payload of each replica, in order."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what this replica has still to send, when nothing is under way."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        ...


class ExactAverager:
    """Plain sums in the precision of the values.

    Args:
        transport: the replicas.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def average(self, flat: Tensor, weight: float, exact: int = 0) -> PendingWork:  # noqa: ARG002 - all are
        """Sum weight * value and weight together, and divide on arrival: one message carries both."""
        if weight:
            flat[:-1].mul_(weight)
        else:
            flat.zero_()  # also where a value is not finite
        flat[-1] = weight
        return _PendingMean(self.transport.all_reduce(flat))

    def all_gather_bytes(self, payload: bytes) -> list[bytes]:
        """Gather the lengths, then the payloads padded to the longest."""
        if len(self.transport.members) == 1:
            return [payload]
        device = self.transport.device
        length = torch.tensor([len(payload)], dtype=torch.int64, device=device)
        lengths = self.transport.all_gather(length).wait()[:, 0].tolist()
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8, device=device)
        if payload:
            padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        rows = self.transport.all_gather(padded).wait().cpu()
        return [row[:size].numpy().tobytes() for row, size in zip(rows, lengths, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: all is sent at once."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take nothing."""


class _PendingMean:
    def __init__(self, pending: PendingWork) -> None:
        self.bytes_sent = pending.bytes_sent
        self._pending = pending

    @property
    def seconds(self) -> float:
        return self._pending.seconds

    def poll(self) -> bool:
        return self._pending.poll()

    def wait(self) -> Tensor:
        flat = self._pending.wait()
        flat[:-1].div_(flat[-1].masked_fill(flat[-1] == 0, 1.0))  # nobody contributed: 0, not NaN
        return flat
