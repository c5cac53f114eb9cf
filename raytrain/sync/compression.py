"""Compressed averaging with error feedback.

Two phases, as in 1-bit Adam (Tang et al. 2021). Reduce-scatter: each replica sends each other one its part of the
weighted values, compressed, and sums the parts it receives. All-gather: it sends the sum to all, compressed again, and
all divide by the sum of the weights. So all replicas hold the same bits, whatever the compressor.

The compression error of a round, the residual, is added to the values of the next one (error feedback, Seide et al.
2014, Karimireddy et al. 2019), on the sending and on the summing side. With weights w_i and values v_i of the replicas,
W = sum_i w_i and the mean m of a round, over all rounds sum W m + residuals = sum (sum_i w_i v_i): the sums are exact
over time, and so are the means where W is the same in all rounds.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from raytrain.serialization import state_to_device
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import PendingWork, Transport


class Compressor(Protocol):
    """Compresses values block by block.

    Attributes:
        block: values in a block.
        block_bytes: size of a compressed block.
    """

    block: int
    block_bytes: int

    def compress(self, values: Tensor) -> Tensor:
        """Return values, float32, shape (k, block), as bytes, uint8, shape (k, block_bytes)."""
        ...

    def decompress(self, payload: Tensor) -> Tensor:
        """Return the values, float32, shape (k, block), of bytes, uint8, shape (k, block_bytes)."""
        ...


class BFloat16:
    """Two bytes for each value: bfloat16."""

    block = 1024
    block_bytes = 2048

    def compress(self, values: Tensor) -> Tensor:
        """Round."""
        return values.to(torch.bfloat16).view(torch.uint8)

    def decompress(self, payload: Tensor) -> Tensor:
        """Widen."""
        return payload.view(torch.bfloat16).float()


class Int8:
    """One byte for each value, and a scale for each block: its largest absolute value over 127."""

    block = 1024
    block_bytes = 1028

    def compress(self, values: Tensor) -> Tensor:
        """Scale and round."""
        scale = values.abs().amax(dim=1, keepdim=True).div_(127.0)
        whole = (values / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(-127, 127)
        return torch.cat([whole.to(torch.int8).view(torch.uint8), scale.view(torch.uint8)], dim=1)

    def decompress(self, payload: Tensor) -> Tensor:
        """Scale back."""
        scale = payload[:, self.block :].flatten().clone().view(torch.float32).view(-1, 1)
        return payload[:, : self.block].view(torch.int8).float().mul_(scale)


class CompressedAverager(ExactAverager):
    """Averages compressed values, with error feedback on both sides; one average at a time.

    A replica of weight 0 sends zeros, and keeps its residual.

    Args:
        transport: of the replicas.
        compressor: of the values.
    """

    def __init__(self, transport: Transport, compressor: Compressor) -> None:
        super().__init__(transport)
        self.compressor = compressor
        # Replicas start the second phase at different times, when their first one is complete.
        self.second_channel = transport.new_channel()
        self.residual: Tensor | None = None  # of its own weighted values, shape (members * k, block)
        self.sum_residual: Tensor | None = None  # of the sums that it computes, shape (k, block)

    def average(self, flat: Tensor, weight: float, exact: int = 0) -> PendingWork:
        """Start the weighted mean; weights and `exact` values are sent as float64 beside the compressed ones."""
        return _TwoPhases(self, flat, weight, exact)

    def state_dict(self) -> dict[str, Any]:
        """Return the residuals."""
        return {"residual": self.residual, "sum_residual": self.sum_residual}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.residual, self.sum_residual = state_to_device(
            [state["residual"], state["sum_residual"]], self.transport.device
        )


class _TwoPhases:
    def __init__(self, averager: CompressedAverager, flat: Tensor, weight: float, exact: int) -> None:
        compressor, members = averager.compressor, len(averager.transport.members)
        self._averager = averager
        self._flat = flat
        self._count = count = flat.numel() - 1 - exact
        blocks = -(-count // (compressor.block * members))
        values = torch.zeros(members * blocks * compressor.block, device=flat.device).view(-1, compressor.block)
        if weight:
            values.view(-1)[:count] = flat[:count] * weight
            coded, averager.residual = _with_feedback(compressor, values, averager.residual)
        else:
            coded = compressor.compress(values)
        head = torch.cat([flat.new_tensor([weight], dtype=torch.float64), flat[count:-1].double()])
        self._head_bytes = 8 * head.numel()
        rows = torch.cat([head.view(torch.uint8).expand(members, -1), coded.view(members, -1)], dim=1)
        self._first = averager.transport.all_to_all(rows)
        self._second: PendingWork | None = None
        self.bytes_sent = self._first.bytes_sent
        self.seconds = 0.0

    def poll(self) -> bool:
        if self._second is None and self._first.poll():
            self._second = self._forward()
        return self._second is not None and self._second.poll()

    def wait(self) -> Tensor:
        self._second = self._second or self._forward()
        parts, compressor = self._second.wait(), self._averager.compressor
        sums = compressor.decompress(parts.reshape(-1, compressor.block_bytes)).flatten()[: self._count]
        self._flat[: self._count] = sums / (float(self._flat[-1]) or 1.0)
        self.bytes_sent = self._first.bytes_sent + self._second.bytes_sent
        self.seconds = self._first.seconds + self._second.seconds
        return self._flat

    def _forward(self) -> PendingWork:
        """Sum this replica's part, and send it; `exact` values are averaged already."""
        averager, compressor = self._averager, self._averager.compressor
        parts = self._first.wait()
        heads = parts[:, : self._head_bytes].flatten().clone().view(torch.float64).view(len(parts), -1)
        total, exact = float(heads[:, 0].sum()), torch.zeros_like(heads[0, 1:])
        for head in heads[heads[:, 0] > 0]:  # of weight 0 nothing counts, finite or not
            exact += head[0] * head[1:]
        self._flat[self._count : -1] = exact / (total or 1.0)
        self._flat[-1] = total
        coded = parts[:, self._head_bytes :].reshape(len(parts), -1, compressor.block_bytes)
        sums = torch.zeros(coded.shape[1], compressor.block, device=parts.device)
        if not total:
            return averager.second_channel.all_gather(compressor.compress(sums))
        for part in coded:
            sums += compressor.decompress(part)
        coded, averager.sum_residual = _with_feedback(compressor, sums, averager.sum_residual)
        return averager.second_channel.all_gather(coded)


def _with_feedback(compressor: Compressor, values: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return compressed (values + residual), and the new residual; `values` is overwritten."""
    if residual is not None:
        values += residual
    coded = compressor.compress(values)
    return coded, values.sub_(compressor.decompress(coded))
