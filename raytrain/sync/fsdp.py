"""Sharding: every replica keeps a part of each parameter, of its gradient and of what the optimizer keeps for it.

This is stage 3 of ZeRO (Rajbhandari et al. 2020), as torch's FSDP does it (Zhao et al. 2023): a block's parameters are
gathered before it computes and forgotten after it, and its gradients are summed into the parts. What FSDP sends goes
through our transport, so that the loss of a peer is noticed as everywhere else. What lives from step to step is plain
tensors, the parts: an optimizer that moves each element by itself knows no difference.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from raytrain.errors import RecipeError
from raytrain.models.blocks import repeated_blocks
from raytrain.sync.averaging import Exchange
from raytrain.sync.buffers import persistent
from raytrain.sync.shards import Shards, local_part
from raytrain.sync.step_message import Rest
from raytrain.sync.synchroniser import EveryStep, Totals
from raytrain.sync.transport import GroupTransport


class ShardedGradients(EveryStep):
    """Sum gradients over replicas, each into the part of it that this replica keeps.

    The result is the exact weighted mean, as of `GradientAveraging`. Every micro-batch is summed at once, which sends
    more than to sum the last one only, but never holds a gradient as large as the model. All replicas must call the
    model, and the blocks in it, equally often and in the same order.

    Args:
        exchange: the replicas.
    """

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self._transport = exchange.transport
        self._weight = 0.0
        self._used: set[str] = set()
        self._trained: list[tuple[str, Tensor, Tensor]] = []  # name, the parameter as FSDP knows it, its part

    def shard(self, module: nn.Module, compute: torch.dtype | None) -> Shards:
        """Cut the first replica's parameters over all replicas.

        Args:
            module: equal in shape on all replicas; sharded in place, and moved to where the replicas compute.
            compute: the type to gather parameters in and to compute in, or None for that of the parameters; gradients
                are summed in float32, and a BatchNorm keeps its parameters in the type of its running means.

        Raises:
            RecipeError: the replicas are not processes.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: PLC0415 - slow to import

        transport = self._transport
        if not isinstance(transport, GroupTransport):
            raise RecipeError(
                f"sync.shard: expected workers that are processes; got {type(transport).__name__}; set sync.shard=false"
            )
        for tensor in persistent(module):
            there = tensor.data.to(transport.device).contiguous()  # FSDP knows no other
            self._await(transport.broadcast(there))
            tensor.data = there.to(tensor.device)  # not the whole model on a GPU
        scalars = {parameter for parameter in module.parameters() if not parameter.dim()}
        for scalar in scalars:
            scalar.data = scalar.data.to(transport.device)
        mesh = transport.mesh()
        gather, scatter = _Wire(self, transport.gather_into), _Wire(self, transport.reduce_scatter)
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=compute and torch.float32)
        exact = [inner for inner in module.modules() if isinstance(inner, _NormBase)] if compute else []
        for unit in [*exact, *_separate(module), module]:
            kept = MixedPrecisionPolicy() if unit in exact else policy
            sharded: Any = fully_shard(unit, mesh=mesh, mp_policy=kept, ignored_params=scalars)
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
            sharded.set_reduce_scatter_unused_params(True, recurse=False)
            sharded.set_custom_all_gather(gather)
            sharded.set_custom_reduce_scatter(scatter)
        # After a pass without gradients FSDP would keep the root's parameters, and not see that they move.
        module.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else sharded.reshard())
        shards = Shards(module, transport)
        self._watch(module, shards)
        return shards

    def start(self, module: nn.Module) -> None:
        """Learn where buffers stand: the parameters are in hand since `shard`."""
        self._rest = Rest(module, self._transport.device)

    def begin(self, weight: float) -> float:
        """Return 1: the sum of all weights is known when the gradients are summed, and they are divided then."""
        self._weight = weight
        self._used.clear()
        return 1.0

    def before_backward(self) -> None:
        """Do nothing: every backward pass sums its gradients."""

    @torch.no_grad()
    def before_step(self, loss: float, stop: bool) -> Totals:
        """Give each part its mean gradient, or none if no replica used the parameter."""
        used = [float(name in self._used) for name, _, _ in self._trained]
        alone = [part for _, known, part in self._trained if known is part]
        own = [0.0 if part.grad is None else float(part.grad) for part in alone]
        rest = self._rest.pack([self._weight, loss, float(stop), *used, *own])
        self._await(self._transport.all_reduce(rest))
        weight, loss, stops, *more = self._rest.take(rest)
        for part, total in zip(alone, more[len(used) :], strict=True):
            part.grad = torch.full_like(part, total)
        for (_, known, part), users in zip(self._trained, more[: len(used)], strict=True):
            gradient, known.grad = known.grad, None
            part.grad = None
            if users and gradient is not None:
                part.grad = local_part(gradient).div_(weight or 1.0)
        return Totals(weight, loss, bool(stops))

    def _watch(self, module: nn.Module, shards: Shards) -> None:
        """Note which parameters get a gradient: FSDP gives zeros to those that get none."""
        from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415 - slow to import

        names = {parameter: name for name, parameter in module.named_parameters()}
        for known, part in zip(module.parameters(), shards.parts.parameters(), strict=True):
            if known.requires_grad:
                self._trained.append((names[known], known, part))
            if known.requires_grad and known is part:
                known.register_post_accumulate_grad_hook(partial(self._on_gradient, names[known]))
        for unit in (inner for inner in module.modules() if isinstance(inner, FSDPModule)):
            before = list(unit.parameters())
            unit.unshard()
            for known, whole in zip(before, unit.parameters(), strict=True):
                if whole is not known and whole.requires_grad:
                    whole.register_post_accumulate_grad_hook(partial(self._on_gradient, names[known]))
            unit.reshard()

    def _on_gradient(self, name: str, _: Tensor) -> None:
        self._used.add(name)


class _Wire:
    """How FSDP sends: through the transport.

    Args:
        sync: counts what is sent.
        send: (result, what is sent) -> bytes sent.
    """

    def __init__(self, sync: ShardedGradients, send: Callable[[Tensor, Tensor], int]) -> None:
        self._sync = sync
        self._send = send

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return room for a message."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **_: Any) -> None:
        """Send `input_tensor` and fill `output_tensor`."""
        started = time.perf_counter()
        self._sync.bytes_sent += self._send(output_tensor, input_tensor)
        seconds = time.perf_counter() - started
        self._sync.exchange_seconds += seconds
        self._sync.waited_seconds += seconds


def _separate(module: nn.Module) -> list[nn.Module]:
    """Return the blocks that can be gathered by themselves: they share no parameter with the rest of the model."""
    found = repeated_blocks(module)
    inside = {part for block in found for part in block.modules()}
    outside = [part for part in module.modules() if part not in inside]
    owners = Counter(parameter for block in found for parameter in block.parameters())
    owners.update({parameter for part in outside for parameter in part.parameters(recurse=False)})
    return [block for block in found if all(owners[parameter] == 1 for parameter in block.parameters())]
