"""Sharding: every replica keeps a shard of each parameter, of its gradient and of its optimizer state.

This is stage 3 of ZeRO (Rajbhandari et al. 2020), by torch's FSDP2 (Zhao et al. 2023): a block's parameters are
all-gathered before it computes and freed after it, and its gradients are reduce-scattered. FSDP sends through our
transport, so that the loss of a peer is noticed as everywhere else. Between steps, shards are plain tensors: an
elementwise optimizer needs no change.
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
from raytrain.sync.averaging import Averager
from raytrain.sync.buffers import state_tensors
from raytrain.sync.ddp import DataParallel
from raytrain.sync.options import FsdpOptions
from raytrain.sync.shards import Shards, local_part
from raytrain.sync.step_message import StepMessage
from raytrain.sync.synchroniser import StepSynchroniser, StepTotals
from raytrain.sync.transport import GroupTransport


def fsdp(averager: Averager, options: FsdpOptions) -> "DataParallel | ShardedDataParallel":  # noqa: ARG001
    """Return the synchroniser that shards parameters, gradients and optimizer state; a single replica keeps all."""
    return ShardedDataParallel(averager) if len(averager.transport.members) > 1 else DataParallel(averager, 0)


class ShardedDataParallel(StepSynchroniser):
    """Shards a model, and reduce-scatters its gradients.

    The result is the exact weighted mean, as of `DataParallel`. Gradients are reduce-scattered in every micro-batch:
    this sends more than in the last one only, but never holds a gradient as large as the model. All replicas must call
    the model, and its blocks, equally often and in the same order.

    Args:
        averager: over the replicas.
    """

    def __init__(self, averager: Averager) -> None:
        super().__init__()
        self._transport = averager.transport
        self._weight = 0.0
        self._used: set[str] = set()
        self._trained: list[tuple[str, Tensor, Tensor]] = []  # name, the parameter as FSDP knows it, its shard

    def shard(self, module: nn.Module, compute: torch.dtype | None) -> Shards:
        """Shard the first replica's parameters over all replicas.

        Args:
            module: of equal shapes on all replicas; sharded in place, and moved to the replicas' device.
            compute: type to gather parameters and to compute in, or None for that of the parameters; gradients are
                summed in float32, and a BatchNorm keeps its parameters in the type of its running means.

        Raises:
            RecipeError: the replicas are not processes.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: PLC0415 - slow to import

        transport = self._transport
        if not isinstance(transport, GroupTransport):
            raise RecipeError(
                f"sync.name: fsdp takes workers that are processes; got {type(transport).__name__}; set sync.name=ddp"
            )
        for tensor in state_tensors(module):
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
        self._register_hooks(module, shards)
        return shards

    def attach(self, module: nn.Module) -> None:
        """Attach to the model's buffers: its parameters are sharded already."""
        self._step_message = StepMessage(module, self._transport.device)

    def set_weight(self, weight: float) -> float:
        """Return 1: gradients are divided after their reduction, when the sum of weights is known."""
        self._weight = weight
        self._used.clear()
        return 1.0

    def before_backward(self) -> None:
        """Do nothing: every backward pass reduces its gradients."""

    @torch.no_grad()
    def before_step(self, loss: float, stop: bool) -> StepTotals:
        """Set the mean gradient of each shard, or None if no replica used the parameter."""
        used = [float(name in self._used) for name, _, _ in self._trained]
        alone = [part for _, known, part in self._trained if known is part]
        own = [0.0 if part.grad is None else float(part.grad) for part in alone]
        message = self._step_message.pack([self._weight, loss, float(stop), *used, *own])
        self._await(self._transport.all_reduce(message))
        weight, loss, stops, *more = self._step_message.unpack(message)
        for part, total in zip(alone, more[len(used) :], strict=True):
            part.grad = torch.full_like(part, total)
        for (_, known, part), users in zip(self._trained, more[: len(used)], strict=True):
            gradient, known.grad = known.grad, None
            part.grad = None
            if users and gradient is not None:
                part.grad = local_part(gradient).div_(weight or 1.0)
        return StepTotals(weight, loss, bool(stops))

    def _register_hooks(self, module: nn.Module, shards: Shards) -> None:
        """Record which parameters get a gradient: FSDP gives zeros to the others."""
        from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415 - slow to import

        names = {parameter: name for name, parameter in module.named_parameters()}
        for known, part in zip(module.parameters(), shards.local.parameters(), strict=True):
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
    """A collective of FSDP, through the transport.

    Args:
        sync: counts bytes and seconds.
        send: (output, input) -> bytes sent.
    """

    def __init__(self, sync: ShardedDataParallel, send: Callable[[Tensor, Tensor], int]) -> None:
        self._sync = sync
        self._send = send

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an empty tensor for a message."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **_: Any) -> None:
        """Run the collective."""
        started = time.perf_counter()
        self._sync.bytes_sent += self._send(output_tensor, input_tensor)
        seconds = time.perf_counter() - started
        self._sync.exchange_seconds += seconds
        self._sync.waited_seconds += seconds


def _separate(module: nn.Module) -> list[nn.Module]:
    """Return the blocks that share no parameter with the rest of the model, to be sharded as units."""
    found = repeated_blocks(module)
    inside = {part for block in found for part in block.modules()}
    outside = [part for part in module.modules() if part not in inside]
    owners = Counter(parameter for block in found for parameter in block.parameters())
    owners.update({parameter for part in outside for parameter in part.parameters(recurse=False)})
    return [block for block in found if all(owners[parameter] == 1 for parameter in block.parameters())]
