"""Weighted averages over replicas, and small messages between them."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from raytrain.sync.transport import PendingWork, Transport


class Averager(Protocol):
    """Averages over the replicas of a transport."""

    transport: Transport

    def average(self, flat: Tensor, weight: float, exact: int = 0) -> PendingWork:
        """Start the weighted mean of `flat` over the replicas, in place.

        Args:
            flat: shape (n + 1,); the last element is room for the weight.
            weight: of this replica; 0 leaves it out.
            exact: number of values at the end that must not be compressed.

        Returns:
            Work whose result is flat, with the mean in flat[:n] and the sum of the weights in flat[n].
        """
        ...

    def all_gather_bytes(self, payload: bytes) -> list[bytes]:
        """Return the payload of each replica, in order."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the residuals of this replica, when nothing is in flight."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


class ExactAverager:
    """Averages in the precision of the values.

    Args:
        transport: of the replicas.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def average(self, flat: Tensor, weight: float, exact: int = 0) -> PendingWork:  # noqa: ARG002 - all are
        """All-reduce weight * value and weight in one message, and divide on arrival."""
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
        """Return nothing: there is no residual."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""


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
