"""A replica's shards of a model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from raytrain.sync.transport import GroupTransport


class Shards:
    """This replica's shards of a model.

    A parameter is sharded along its first dimension into equal parts, of which the last may be short or empty. A scalar
    is replicated.

    Attributes:
        local: module with this replica's shards under the names of the parameters.

    Args:
        module: the model, sharded by torch's `fully_shard`.
        transport: of the replicas.
    """

    def __init__(self, module: nn.Module, transport: GroupTransport) -> None:
        self._transport = transport
        self._shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        self.local = _mirror(module, {parameter: _part(parameter) for parameter in module.parameters()}, {})
        self._local = dict(self.local.named_parameters())

    def norm(self) -> Tensor:
        """Return the norm of the full gradient; a collective."""
        first = self._transport.rank == 0
        counted = [part for name, part in self._local.items() if self._shapes[name] or first]
        own = get_total_norm([part.grad for part in counted if part.grad is not None])
        squares = own.to(self._transport.device, torch.float64).square().reshape(1)
        return self._transport.all_reduce(squares).wait()[0].sqrt()

    def gather(self, name: str, value: Any) -> Any:
        """Gather a full tensor on the CPU of the first replica; a collective.

        Args:
            name: of a parameter.
            value: its shard, or that of its optimizer state or average; a value of another shape is returned unchanged.
        """
        full = self.all_gather(name, value)
        return full.cpu() if self._transport.rank == 0 and full is not value else value

    def all_gather(self, name: str, value: Any) -> Any:
        """Return a full tensor on every replica; a collective. Arguments as of `gather`."""
        part = self._local.get(name)
        if part is None or not self._shapes[name] or not isinstance(value, Tensor) or value.shape != part.shape:
            return value
        padded = value.new_zeros(self._rows(name), *value.shape[1:])
        padded[: len(value)] = value
        flat = padded.new_empty(len(self._transport.members) * padded.numel())
        self._transport.gather_into(flat, padded.flatten())
        return flat[: self._shapes[name].numel()].view(self._shapes[name])

    def scatter(self, name: str, value: Any) -> Any:
        """Return this replica's shard of a full tensor; a value of another shape is returned unchanged."""
        if not isinstance(value, Tensor) or not value.shape or value.shape != self._shapes.get(name):
            return value
        rows = self._rows(name)
        return value[rows * self._transport.rank :][:rows]

    def _rows(self, name: str) -> int:
        return -(-self._shapes[name][0] // len(self._transport.members))


def local_part(tensor: Tensor) -> Tensor:
    """Return this replica's shard of a DTensor, in the same memory."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - slow to import

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _part(parameter: nn.Parameter) -> nn.Parameter:
    """Return this replica's shard as a parameter, in the same memory; a replicated one is returned unchanged."""
    local = local_part(parameter.detach())
    return nn.Parameter(local, parameter.requires_grad) if parameter.dim() else parameter


def _mirror(
    module: nn.Module, parts: Mapping[nn.Parameter, nn.Parameter], made: dict[nn.Module, nn.Module]
) -> nn.Module:
    """Return a module of the structure of `module`, shared submodules included, that holds `parts`."""
    if module not in made:
        made[module] = nn.Module()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            made[module].register_parameter(name, parts[parameter])
        for name, child in module.named_children():
            made[module].add_module(name, _mirror(child, parts, made))
    return made[module]
