"""How steep a loss is along a direction, from forward passes alone (Malladi et al. 2023, MeZO).

The perturbed model never exists as a whole: when a layer is called, its parameters are replaced by perturbed ones in a
scratch buffer that stays in the processor's cache, and put back when it returns. So parameters are never written: they
come back bit for bit in any type, also when the loss raises. Of an embedding only rows that are looked up are drawn.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from raytrain.errors import RecipeError
from raytrain.seeds.space import Part, Space

Loss = Callable[[], Tensor]
"""Returns the loss, shape (), at least in float32; it draws the same dropout in every call."""


class Probe:
    """Calls a loss with the parameters of a module moved along a direction.

    The first call is watched: a parameter that is used outside its own layer's call (by a layer above it, or by the
    loss) is from then on replaced for the whole of a call, which takes memory for all of it.

    Args:
        module: the model; its layers are given hooks, which do nothing between calls, so they must stay.
        space: some or all of its parameters, by their names in it.

    Raises:
        RecipeError: a name of the space is not a parameter of the module.
    """

    def __init__(self, module: nn.Module, space: Space) -> None:
        self.space = space
        self.seed, self.scale = 0, 0.0
        self.active = self.dual = self.everything = self.moving = False
        self._watched = False
        owned = _owned(module, space)
        names = [name for name, layer in module.named_modules() if layer in owned]
        memory: dict[int, _Memory] = {}
        self._layers = []
        for name in names:
            around = sum(name != other and f"{name}.".startswith(f"{other}." if other else "") for other in names)
            owner = module.get_submodule(name)
            self._layers.append(_Layer(self, owner, owned[owner], memory.setdefault(around, _Memory())))
        for layer in self._layers:
            layer.prepare()  # before activations come, among which memory that stays would leave gaps
        self._whole: list[_Swap] = []

    def at(self, seed: int, scale: float, loss: Loss) -> Tensor:
        """Return the loss at theta + scale * direction(seed)."""
        self.seed, self.scale = seed, scale
        self._look(loss)
        with self._moved():
            return loss()

    def along(self, seed: int, loss: Loss) -> Tensor:
        """Return the loss at theta, carrying its derivative along direction(seed); inside a `dual_level`."""
        self._look(loss)
        self.dual = True
        try:
            return self.at(seed, 1.0, loss)
        finally:
            self.dual = False

    def _look(self, loss: Loss) -> None:
        """Watch the first call, and set apart what it reads although it should have been replaced."""
        if self._watched:
            return
        watch = _Watch({_storage(part.tensor) for part in self.space.parts}, lambda: self.moving)
        self.everything = True
        try:
            with self._moved(), watch:
                loss()
        finally:
            self.everything = False
        for layer in self._layers:
            self._whole += layer.give_up(watch.used)
        self._watched = True

    @contextmanager
    def _moved(self) -> Iterator[None]:
        """Have each layer's parameters replaced while it is called, and those set apart all the time."""
        whole = [swap for swap in self._whole if self.reached(swap.part)]
        try:
            for swap in whole:
                swap.put(self.moved(swap.part, torch.empty_like(swap.part.tensor)))
            self.active = True
            yield
        finally:
            self.active = False
            for layer in self._layers:
                layer.put_back()  # of a call that was left by an error
            for swap in whole:
                swap.put_back()

    def reached(self, part: Part) -> bool:
        """Return whether the direction moves a part."""
        return self.everything or self.space.reaches(part, self.seed)

    def moved(self, part: Part, out: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return what stands for a part, or some rows of it, now: `out`, unless it carries a derivative."""
        self.moving = True
        if self.dual:
            tangent = torch.zeros_like(part.tensor)
            self.space.add(part, tangent, self.seed, self.scale)
            out = forward_ad.make_dual(part.tensor, tangent)
        else:
            self.space.moved(part, self.seed, self.scale, out, rows)
        self.moving = False
        return out


def _owned(module: nn.Module, space: Space) -> dict[nn.Module, list["_Swap"]]:
    """Return the layers that have parameters of a space of their own, with these."""
    named = dict(module.named_parameters(remove_duplicate=False))
    parts = {}
    for part in space.parts:
        if part.name not in named or named[part.name].data_ptr() != part.tensor.data_ptr():
            raise RecipeError(f"directions: {part.name} is not a parameter of the module")
        parts[id(named[part.name])] = part
    owned: dict[nn.Module, list[_Swap]] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if id(parameter) in parts:
                owned.setdefault(owner, []).append(_Swap(owner._parameters, name, parts[id(parameter)]))
    return owned


class _Swap:
    """A place where a layer keeps a parameter, which can be given another tensor for a while."""

    __slots__ = ("_name", "_place", "_plain", "part")

    def __init__(self, place: dict[str, Any], name: str, part: Part) -> None:
        self.part = part
        self._place, self._name, self._plain = place, name, place[name]

    def put(self, tensor: Tensor) -> None:
        self._place[self._name] = tensor

    def put_back(self) -> None:
        self._place[self._name] = self._plain


class _Memory:
    """Memory for the parameters of one layer, shared by layers of which none is a part of another."""

    def __init__(self) -> None:
        self.flat = torch.empty(0)
        self.users = 0

    def views(self, swaps: Sequence["_Swap"]) -> list[Tensor]:
        """Return a tensor for each parameter of a layer."""
        tensors = [swap.part.tensor for swap in swaps]
        starts = [0]
        for tensor in tensors:  # at multiples of 64 bytes
            starts.append(starts[-1] + -(-tensor.numel() // 32) * 32)
        if self.flat.numel() < starts[-1] or self.flat.dtype != tensors[0].dtype:
            count = max(starts[-1], self.flat.numel())
            self.flat = torch.empty(count, dtype=tensors[0].dtype, device=tensors[0].device)
        return [
            self.flat[start : start + tensor.numel()].view(tensor.shape)
            for start, tensor in zip(starts, tensors, strict=False)
        ]


class _Layer:
    """A layer and its hooks. After a matrix product Python runs from cold caches, so what can be made before is."""

    def __init__(self, probe: Probe, owner: nn.Module, swaps: list[_Swap], memory: _Memory) -> None:
        self._probe = probe
        self._swaps = swaps
        self._memory = memory
        self._views: list[Tensor] = []
        self._flat: Tensor | None = None
        self._entered: list[_Swap] = []
        self._padding: list[Any] = []
        self._is_table = type(owner) is nn.Embedding and owner.max_norm is None and len(swaps) == 1
        owner.register_forward_pre_hook(self._enter)
        owner.register_forward_hook(self._leave)

    def prepare(self, memory: _Memory | None = None) -> None:
        """Find room for the parameters."""
        if memory is None and self._is_table:
            return  # which is seldom needed as a whole
        memory = memory or self._memory
        self._views = memory.views(self._swaps) if self._swaps else []
        self._flat = memory.flat

    def give_up(self, used: set[int]) -> list[_Swap]:
        """Return the parameters that lie in the storages `used`, and leave them alone from now on."""
        given = [swap for swap in self._swaps if _storage(swap.part.tensor) in used]
        self._swaps = [swap for swap in self._swaps if swap not in given]
        self._flat = None
        return given

    def put_back(self) -> None:
        """Put all back that was replaced."""
        for swap in self._entered:
            swap.put_back()
        self._entered.clear()
        self._memory.users = 0
        while self._padding:
            owner, padding = self._padding.pop()
            owner.padding_idx = padding

    def _enter(self, owner: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        probe = self._probe
        if not probe.active:
            return None
        if self._is_table and self._swaps and arguments and not probe.dual and probe.reached(self._swaps[0].part):
            looked_up, rows = arguments[0].unique(return_inverse=True)
            swap = self._swaps[0]
            table = swap.part.tensor
            if 2 * len(looked_up) < len(table):
                self._padding.append((owner, owner.padding_idx))
                owner.padding_idx = None  # type: ignore[assignment] # it is a row of the whole table
                shape = (len(looked_up), *table.shape[1:])
                swap.put(probe.moved(swap.part, torch.empty(shape, dtype=table.dtype, device=table.device), looked_up))
                self._entered.append(swap)
                return (rows, *arguments[1:])
        if self._memory.users or self._is_table:
            self.prepare(_Memory())  # also for a layer that is called by one which does not hold it
        elif self._flat is not self._memory.flat:
            self.prepare()
        self._memory.users += 1
        for swap, view in zip(self._swaps, self._views, strict=True):
            if probe.reached(swap.part):
                swap.put(probe.moved(swap.part, view))
                self._entered.append(swap)
        return None

    def _leave(self, owner: nn.Module, arguments: Any, output: Any) -> Any:  # noqa: ARG002 - what torch gives
        if not self._probe.active:
            return output
        self.put_back()
        return self._copied(output) if isinstance(output, Tensor) else tree_map(self._copied, output)

    def _copied(self, value: Any) -> Any:
        """Return a tensor, or its copy if it lies in our memory, as what a table of positions returns does."""
        if not isinstance(value, Tensor) or self._flat is None:
            return value
        start = self._flat.data_ptr()
        inside = start <= value.data_ptr() < start + self._flat.nbytes
        return value.clone() if inside and value.numel() else value


class _Watch(TorchDispatchMode):
    """Notes which of some storages are read by what torch does, but not while `ours` is true."""

    def __init__(self, storages: set[int], ours: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used: set[int] = set()
        self._storages = storages
        self._ours = ours

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not self._ours():
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and _storage(value) in self._storages:
                    self.used.add(_storage(value))
        return function(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True, slots=True)
class Slope:
    """What probing a direction found.

    Attributes:
        value: how fast the loss rises along it; nan or infinite where the loss is.
        loss: the mean of the losses that were looked at.
    """

    value: float
    loss: float


def slope(loss: Loss, probe: Probe, seed: int, eps: float, *, at_rest: float | None = None) -> Slope:
    """Return how fast the loss rises along a direction, from differences.

    Args:
        loss: called twice, or once.
        probe: of the module.
        seed: of the direction.
        eps: how far to go.
        at_rest: the loss without a move, for a one-sided difference (L(theta + eps z) - L(theta)) / eps; None: take
            (L(theta + eps z) - L(theta - eps z)) / (2 eps).
    """
    ahead = float(probe.at(seed, eps, loss))
    if at_rest is not None:
        return Slope((ahead - at_rest) / eps, at_rest)
    behind = float(probe.at(seed, -eps, loss))
    return Slope((ahead - behind) / (2 * eps), (ahead + behind) / 2)


def derivative(loss: Loss, probe: Probe, seed: int) -> Slope:
    """Return how fast the loss rises along a direction, exactly, from one pass that carries derivatives along."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention has no such derivative, neither this nor the next
    try:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            value, tangent = forward_ad.unpack_dual(probe.along(seed, loss))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return Slope(0.0 if tangent is None else float(tangent), float(value))
