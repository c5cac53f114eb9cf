"""Compressed exchanges: fewer bytes on the wire, and what rounding leaves out is sent next time.

In two phases, as in 1-bit Adam (Tang et al. 2021): each replica sends each other one a part of its weighted values,
compressed, sums the parts that it gets, and sends the sum to all, compressed again, who divide it by the sum of the
weights. So all replicas hold the same bits, whatever the codec.

What is lost in compressing is added to what is compressed the next time (error feedback, Seide et al. 2014, Karimireddy
et al. 2019), by who sends as by who sums. With weights w_i and values v_i of the replicas, W = sum_i w_i and the mean m
of a round, over all rounds sum W m + residuals = sum (sum_i w_i v_i), whatever the weights: so the sums are exact over
time, and the means where W is the same in all rounds.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from raytrain.serialization import state_to_device
from raytrain.sync.averaging import ExactExchange
from raytrain.sync.transport import Pending, Transport


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

    A replica without weight sends zeros, and keeps its residual for when it has some.

    Args:
        transport: the replicas.
        codec: how values are sent.
    """

    def __init__(self, transport: Transport, codec: Codec) -> None:
        super().__init__(transport)
        self.codec = codec
        self.second = transport.lane()  # a replica starts the second phase when it has what came in the first
        self.left: Tensor | None = None  # the residual of its own weighted values, shape (members * k, block)
        self.left_of_sum: Tensor | None = None  # that of the sums that it makes, shape (k, block)

    def mean(self, flat: Tensor, weight: float, exact: int = 0) -> Pending:
        """Start the weighted mean; weights and `exact` values travel as float64 beside the coded ones."""
        return _TwoPhases(self, flat, weight, exact)

    def state_dict(self) -> dict[str, Any]:
        """Return what was lost and is still to be sent."""
        return {"left": self.left, "left_of_sum": self.left_of_sum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.left, self.left_of_sum = state_to_device([state["left"], state["left_of_sum"]], self.transport.device)


class _TwoPhases:
    def __init__(self, exchange: CompressedExchange, flat: Tensor, weight: float, exact: int) -> None:
        codec, members = exchange.codec, len(exchange.transport.members)
        self._exchange = exchange
        self._flat = flat
        self._count = count = flat.numel() - 1 - exact
        blocks = -(-count // (codec.block * members))
        values = torch.zeros(members * blocks * codec.block, device=flat.device).view(-1, codec.block)
        if weight:
            values.view(-1)[:count] = flat[:count] * weight
            coded, exchange.left = _with_feedback(codec, values, exchange.left)
        else:
            coded = codec.encode(values)
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
        sums = codec.decode(parts.reshape(-1, codec.block_bytes)).flatten()[: self._count]
        self._flat[: self._count] = sums / (float(self._flat[-1]) or 1.0)
        self.bytes_sent = self._first.bytes_sent + self._second.bytes_sent
        self.seconds = self._first.seconds + self._second.seconds
        return self._flat

    def _forward(self) -> Pending:
        """Sum this replica's part, and send it; what is exact has arrived."""
        exchange, codec = self._exchange, self._exchange.codec
        parts = self._first.wait()
        heads = parts[:, : self._head_bytes].flatten().clone().view(torch.float64).view(len(parts), -1)
        total, exact = float(heads[:, 0].sum()), torch.zeros_like(heads[0, 1:])
        for head in heads[heads[:, 0] > 0]:  # without weight nothing counts, finite or not
            exact += head[0] * head[1:]
        self._flat[self._count : -1] = exact / (total or 1.0)
        self._flat[-1] = total
        coded = parts[:, self._head_bytes :].reshape(len(parts), -1, codec.block_bytes)
        sums = torch.zeros(coded.shape[1], codec.block, device=parts.device)
        if not total:
            return exchange.second.all_gather(codec.encode(sums))
        for part in coded:
            sums += codec.decode(part)
        coded, exchange.left_of_sum = _with_feedback(codec, sums, exchange.left_of_sum)
        return exchange.second.all_gather(coded)


def _with_feedback(codec: Codec, values: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the bytes of values + residual, and the residual that these leave; `values` is used up."""
    if residual is not None:
        values += residual
    coded = codec.encode(values)
    return coded, values.sub_(codec.decode(coded))
