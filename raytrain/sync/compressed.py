"""Compressed exchanges: fewer bytes on the wire, and what rounding leaves out is sent next time.

In two phases, as in 1-bit Adam (Tang et al. 2021): each replica sends each other one a part of its values, compressed,
averages the parts that it gets, and sends the mean to all, compressed again. So all replicas hold the same bits,
whatever the codec. What is lost in compressing is added to what is compressed the next time (error feedback, Seide et
al. 2014, Karimireddy et al. 2019), by who sends as by who averages: over time the means are exact.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from raytrain.sync.exchange import ExactExchange
from raytrain.sync.transport import Pending, Transport

CODECS: dict[str, str] = {
    "bfloat16": "raytrain.sync.compressed:BFloat16",
    "int8": "raytrain.sync.compressed:Int8",
}


class Codec(Protocol):
    """Numbers as fewer bytes.

    Attributes:
        block: values are compressed so many at a time.
        block_bytes: what they take.
    """

    block: int
    block_bytes: int

    def encode(self, values: Tensor) -> Tensor:
        """Return blocks of values, float32, shape (k, block), as bytes, uint8, shape (k, block_bytes)."""
        ...

    def decode(self, payload: Tensor) -> Tensor:
        """Return the values that bytes stand for, float32, shape (k, block)."""
        ...


class BFloat16:
    """Two bytes each: eight bits of a number."""

    block = 1024
    block_bytes = 2048

    def encode(self, values: Tensor) -> Tensor:
        """Round."""
        return values.to(torch.bfloat16).view(torch.uint8)

    def decode(self, payload: Tensor) -> Tensor:
        """Widen."""
        return payload.view(torch.bfloat16).float()


class Int8:
    """One byte each, and for each block a scale: its largest value over 127."""

    block = 1024
    block_bytes = 1028

    def encode(self, values: Tensor) -> Tensor:
        """Scale and round."""
        scale = values.abs().amax(dim=1, keepdim=True).div_(127.0)
        whole = (values / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(-127, 127)
        return torch.cat([whole.to(torch.int8).view(torch.uint8), scale.view(torch.uint8)], dim=1)

    def decode(self, payload: Tensor) -> Tensor:
        """Scale back."""
        scale = payload[:, self.block :].flatten().clone().view(torch.float32).view(-1, 1)
        return payload[:, : self.block].view(torch.int8).float().mul_(scale)


class CompressedExchange(ExactExchange):
    """Averages through a codec, with error feedback on both sides; one mean at a time.

    Args:
        transport: the replicas.
        codec: how values are sent.
    """

    def __init__(self, transport: Transport, codec: Codec) -> None:
        super().__init__(transport)
        self.codec = codec
        self.second = transport.lane()  # a replica starts the second phase when it has what came in the first
        self.left: Tensor | None = None  # what this replica's last values lost, shape (members, k, block)
        self.left_of_sum: Tensor | None = None  # what the last sum that it sent lost, shape (k, block)

    def mean(self, flat: Tensor, weight: float, exact: int = 0) -> Pending:
        """Start the weighted mean; weights and `exact` values travel as float64 beside the coded ones."""
        return _TwoPhases(self, flat, weight, exact)

    def state_dict(self) -> dict[str, Any]:
        """Return what was lost and is still to be sent."""
        return {"left": self.left, "left_of_sum": self.left_of_sum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.left, self.left_of_sum = state["left"], state["left_of_sum"]


class _TwoPhases:
    def __init__(self, exchange: CompressedExchange, flat: Tensor, weight: float, exact: int) -> None:
        codec, members = exchange.codec, len(exchange.transport.members)
        self._exchange = exchange
        self._flat = flat
        self._count = count = flat.numel() - 1 - exact
        blocks = -(-count // (codec.block * members))
        values = torch.zeros(members * blocks * codec.block, device=flat.device)
        values[:count] = flat[:count]
        values = values.view(members, blocks, codec.block)
        if exchange.left is not None:
            values += exchange.left
        coded = codec.encode(values.view(-1, codec.block))
        exchange.left = values.sub_(codec.decode(coded).view_as(values))
        head = torch.cat([flat.new_tensor([weight], dtype=torch.float64), flat[count:-1].double()])
        self._head_bytes = 8 * head.numel()
        rows = torch.cat([head.view(torch.uint8).expand(members, -1), coded.view(members, -1)], dim=1)
        self._first = exchange.transport.all_to_all(rows)
        self._second: Pending | None = None
        self.bytes_sent = self._first.bytes_sent
        self.seconds = 0.0

    def advance(self) -> bool:
        if self._second is None and self._first.advance():
            self._second = self._forward()
        return self._second is not None and self._second.advance()

    def wait(self) -> Tensor:
        self._second = self._second or self._forward()
        parts, codec = self._second.wait(), self._exchange.codec
        self._flat[: self._count] = codec.decode(parts.reshape(-1, codec.block_bytes)).flatten()[: self._count]
        self.bytes_sent = self._first.bytes_sent + self._second.bytes_sent
        self.seconds = self._first.seconds + self._second.seconds
        return self._flat

    def _forward(self) -> Pending:
        """Sum this replica's part, and send it; what is exact has arrived."""
        exchange, codec = self._exchange, self._exchange.codec
        parts = self._first.wait()
        heads = parts[:, : self._head_bytes].flatten().clone().view(torch.float64).view(len(parts), -1)
        weights, total = heads[:, 0].tolist(), float(heads[:, 0].sum())
        self._flat[self._count : -1] = heads[:, 0] @ heads[:, 1:] / (total or 1.0)
        self._flat[-1] = total
        coded = parts[:, self._head_bytes :]
        mean = exchange.left_of_sum
        if mean is None:
            mean = torch.zeros(coded[0].numel() // codec.block_bytes, codec.block, device=parts.device)
        for weight, part in zip(weights, coded, strict=True):
            own = codec.decode(part.contiguous().view(-1, codec.block_bytes))
            mean.add_(own, alpha=weight / (total or 1.0))
        coded = codec.encode(mean)
        exchange.left_of_sum = mean.sub_(codec.decode(coded))
        return exchange.second.all_gather(coded)
