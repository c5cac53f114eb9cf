"""A loss with the parameters of a model moved along a direction, without moving them.

The perturbed model never exists as a whole: when a layer is called, its parameters are replaced by perturbed ones in a
scratch buffer that stays in the processor's cache, and put back when it returns. So parameters are never written: they
come back bit for bit in any type, also when the loss raises. Of an embedding only rows that are looked up are drawn.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from raytrain.errors import RecipeError
from raytrain.seeds.directions import Directions, ParameterSlice, address_range, memory_key

ALIGNMENT_BYTES = 64

Closure = Callable[[], Tensor]
"""Returns the loss, shape (), at least in float32; it draws the same dropout in every call."""


class PerturbedModel:
    """Calls a loss with the parameters of a module moved along a direction.

    In a call each layer has moved parameters from when it is entered until it is left. The first call is watched: a
    parameter that is read outside its own layer's call (by a layer above it, or by the loss) is from then on replaced
    for the whole of a call, which takes memory for all of it; and a second watched call sees whether that was enough.
    What only a later call does is not seen, so a loss must use its parameters in one way. Buffers are afterwards what
    they were before.

    Args:
        module: the model; its layers are given hooks, which do nothing between calls, so they must stay.
        directions: some or all of its parameters, by their names in it.

    Raises:
        RecipeError: a name of the space is not a parameter of the module; in the first call: a parameter is kept where
            it cannot be replaced.
    """

    def __init__(self, module: nn.Module, directions: Directions) -> None:
        self.directions = directions
        self._buffers = _Buffers(module)
        self.seed, self.eps = 0, 0.0
        self.active = self.dual = self.watching = self.moving = False
        self.left_behind: dict[StorageWeakRef, set[str]] = {}  # memory of what stood for parameters in an ended call
        self._watched = False
        owned = _owned(module, directions)
        names = [name for name, layer in module.named_modules() if layer in owned]
        memory: dict[int, _Memory] = {}
        self._layers = []
        for name in names:
            around = sum(name != other and f"{name}.".startswith(f"{other}." if other else "") for other in names)
            owner = module.get_submodule(name)
            self._layers.append(_Layer(self, owner, owned[owner], memory.setdefault(around, _Memory())))
        for layer in sorted(self._layers, key=lambda layer: -layer.bytes):
            layer.prepare()  # before activations come, among which memory that stays would leave gaps
        self._whole: list[_Swap] = []

    def loss_at(self, seed: int, eps: float, closure: Closure) -> Tensor:
        """Return the loss at theta + scale * direction(seed)."""
        self.seed, self.eps = seed, eps
        self._look(closure)
        with self._moved():
            return closure()

    def loss(self, closure: Closure) -> Tensor:
        """Return the loss at theta; buffers are kept here too."""
        with self._buffers.kept():
            return closure()

    def jvp(self, seed: int, closure: Closure) -> Tensor:
        """Return the loss at theta, carrying its derivative along direction(seed); inside a `dual_level`."""
        self._look(closure)
        self.dual = True
        try:
            return self.loss_at(seed, 1.0, closure)
        finally:
            self.dual = False

    def _look(self, loss: Closure) -> None:
        """Watch the first call, and set apart what it reads although it should have been replaced."""
        if self._watched:
            return
        used = self._seen(loss)
        for layer in self._layers:
            self._whole += layer.give_up(used)
        if self._whole and (kept := self._seen(loss)):
            raise RecipeError(
                f"directions: {', '.join(sorted(kept))} is kept outside the layer that it belongs to, as in a list, "
                "and read from there, where it cannot be replaced; read it from its layer, or freeze it with "
                "freeze.match"
            )
        self._watched = True

    def _seen(self, loss: Closure) -> set[str]:
        """Return the parameters that a call reads although they should have been replaced, or after they were."""
        self.watching = True
        watch = _Watch(self.directions.slices, self.left_behind, lambda: self.moving)
        try:
            with self._moved(), watch:
                loss()
        finally:
            self.watching = False
            self.left_behind.clear()
        return watch.used

    @contextmanager
    def _moved(self) -> Iterator[None]:
        """Have each layer's parameters replaced while it is called, and those set apart all the time."""
        whole = [swap for swap in self._whole if self.is_perturbed(swap.part)]
        before: list[Any] = []
        with self._buffers.kept():
            try:
                for swap in whole:
                    before.append(swap.put(self.write_perturbed(swap.part, torch.empty_like(swap.part.tensor))))
                self.active = True
                yield
            finally:
                self.active = False
                for layer in self._layers:
                    layer.put_all_back()  # of calls that were left by an error
                for swap, plain in zip(whole, before, strict=False):
                    swap.put(plain)

    def is_perturbed(self, part: ParameterSlice) -> bool:
        """Return whether the direction moves a part."""
        return self.watching or self.directions.perturbs(part, self.seed)

    def write_perturbed(self, part: ParameterSlice, out: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return what stands for a part, or some rows of it, now: `out`, unless it carries a derivative."""
        self.moving = True
        try:
            if self.dual:
                tangent = torch.zeros_like(part.tensor)
                self.directions.add_to(part, tangent, self.seed, self.eps)
                dual: Tensor = forward_ad.make_dual(part.tensor, tangent)
                return dual  # noqa: RET504 - torch does not say what it is
            self.directions.write_perturbed(part, self.seed, self.eps, out, rows)
            return out
        finally:
            self.moving = False


def _owned(module: nn.Module, space: Directions) -> dict[nn.Module, list["_Swap"]]:
    """Return the layers that have parameters of a space of their own, with these."""
    named = dict(module.named_parameters(remove_duplicate=False))
    parts = {}
    for part in space.slices:
        if part.name not in named or named[part.name].data_ptr() != part.tensor.data_ptr():
            raise RecipeError(f"directions: {part.name} is not a parameter of the module")
        parts[memory_key(part.tensor, named[part.name])] = part
    owned: dict[nn.Module, list[_Swap]] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            place = None if parameter is None else memory_key(parameter, parameter)
            if place in parts:
                owned.setdefault(owner, []).append(_Swap(owner._parameters, name, parts[place]))
    return owned


class _Buffers:
    """The buffers of a module, which are after a call what they were before it.

    The first call shows which it writes into; of these alone a later one keeps the values.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = list(module.modules())
        self._written: set[tuple[int, str]] | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Have buffers afterwards as they were before, as the means of a BatchNorm in training mode."""
        before = [dict(layer._buffers) for layer in self._layers]
        values = {
            (place, name): (buffer, buffer.clone())
            for place, named in enumerate(before)
            for name, buffer in named.items()
            if buffer is not None and self._may_change((place, name), buffer)
        }
        try:
            yield
            if self._written is None:
                self._written = {key for key, (buffer, value) in values.items() if not torch.equal(buffer, value)}
        finally:
            for layer, named in zip(self._layers, before, strict=True):  # others may be in their places
                layer._buffers.clear()
                layer._buffers.update(named)
            for buffer, value in values.values():
                buffer.copy_(value)

    def _may_change(self, key: tuple[int, str], buffer: Tensor) -> bool:
        if self._written is not None:
            return key in self._written
        if buffer.layout is not torch.strided:
            return False
        # Nobody can write to a tensor of which elements lie in the same place, as in an expanded one.
        return not any(size > 1 and not stride for size, stride in zip(buffer.shape, buffer.stride(), strict=True))


class _Swap:
    """A place where a layer keeps a parameter, which can be given another tensor for a while."""

    __slots__ = ("_name", "_place", "part")

    def __init__(self, place: dict[str, Any], name: str, part: ParameterSlice) -> None:
        self.part = part
        self._place, self._name = place, name

    def put(self, tensor: Any) -> Any:
        """Put a tensor there, and return what was there before."""
        before, self._place[self._name] = self._place[self._name], tensor
        return before


class _Memory:
    """Memory for the parameters of one layer, shared by layers of which none is a part of another."""

    def __init__(self) -> None:
        self.flat = torch.empty(0, dtype=torch.uint8)
        self.users = 0

    def views(self, swaps: Sequence[_Swap]) -> list[Tensor]:
        """Return a tensor for each parameter of a layer."""
        tensors = [swap.part.tensor for swap in swaps]
        starts = [0]
        for tensor in tensors:
            starts.append(starts[-1] + -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
        if tensors and (self.flat.numel() < starts[-1] or self.flat.device != tensors[0].device):
            self.flat = torch.empty(max(starts[-1], self.flat.numel()), dtype=torch.uint8, device=tensors[0].device)
        return [
            self.flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(starts, tensors, strict=False)
        ]


@dataclass(slots=True)
class _Call:
    """What a call of a layer replaced, with what was there before; the memory it took; and an embedding's padding."""

    replaced: list[tuple[_Swap, Any]] = field(default_factory=list)
    memory: _Memory | None = None
    padding: Any = None
    is_lookup: bool = False


class _Layer:
    """A layer and its hooks. After a matrix product Python runs from cold caches, so what can be made before is."""

    def __init__(self, probe: PerturbedModel, owner: nn.Module, swaps: list[_Swap], memory: _Memory) -> None:
        self._probe = probe
        self._owner: Any = owner
        self._swaps = swaps
        self._memory = memory
        self._views: list[Tensor] = []
        self._flat: Tensor | None = None
        self._calls: list[_Call] = []
        self._is_table = type(owner) is nn.Embedding and owner.max_norm is None and len(swaps) == 1
        self.bytes = sum(swap.part.tensor.nbytes for swap in swaps)
        owner.register_forward_pre_hook(self._enter)
        owner.register_forward_hook(self._leave)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the probe behind where the model is copied or written out: the copy's hooks do nothing."""
        return (_without_probe, ())

    def prepare(self) -> None:
        """Find room for the parameters; a table seldom needs it."""
        if not self._is_table:
            self._views, self._flat = self._memory.views(self._swaps), self._memory.flat

    def give_up(self, used: set[str]) -> list[_Swap]:
        """Return the parameters with these names, and leave them alone from now on."""
        given = [swap for swap in self._swaps if swap.part.name in used]
        self._swaps = [swap for swap in self._swaps if swap not in given]
        self._is_table = self._is_table and bool(self._swaps)
        self._flat = None
        return given

    def put_all_back(self) -> None:
        """Put back what calls replaced that were left by an error."""
        while self._calls:
            self._put_back(self._calls.pop())

    def _put_back(self, call: _Call) -> None:
        for swap, before in reversed(call.replaced):
            stood_in = swap.put(before)
            if self._probe.watching:
                memory = StorageWeakRef(stood_in.untyped_storage())
                self._probe.left_behind.setdefault(memory, set()).add(swap.part.name)
        if call.memory is not None:
            call.memory.users -= 1
        if call.is_lookup:
            self._owner.padding_idx = call.padding

    def _enter(self, owner: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:  # noqa: ARG002
        probe = self._probe
        if not probe.active:
            return None
        call = _Call()
        self._calls.append(call)
        if self._is_table and arguments and not probe.dual and probe.is_perturbed(self._swaps[0].part):
            rows = self._look_up(arguments[0], call)
            if rows is not None:
                return (rows, *arguments[1:])
        call.memory, views = self._room()
        call.memory.users += 1
        for swap, view in zip(self._swaps, views, strict=True):
            if probe.is_perturbed(swap.part):
                call.replaced.append((swap, swap.put(probe.write_perturbed(swap.part, view))))
        return None

    def _room(self) -> tuple["_Memory", list[Tensor]]:
        """Return memory for the parameters in a call, and a tensor in it for each."""
        if (
            self._is_table  # nothing was prepared for it
            or self._memory.users  # by a call around this one, of a layer that does not hold this layer
            or self._probe.watching  # its memory is how what outlives the call is told
        ):
            memory = _Memory()
            return memory, memory.views(self._swaps)
        if self._flat is not self._memory.flat:  # a larger layer has renewed it
            self.prepare()
        return self._memory, self._views

    def _look_up(self, tokens: Tensor, call: _Call) -> Tensor | None:
        """Replace a table by the rows that are looked up, and return where they are; None: take all of it.

        That is also for tokens that are not in the table: torch says so.
        """
        swap = self._swaps[0]
        table = swap.part.tensor
        looked_up, rows = tokens.long().unique(return_inverse=True)
        count = len(looked_up)
        if not 0 < 2 * count < len(table) or looked_up[0] < 0 or looked_up[-1] >= len(table):
            return None
        call.is_lookup, call.padding = True, self._owner.padding_idx
        self._owner.padding_idx = None  # it is a row of the whole table
        some = torch.empty((count, *table.shape[1:]), dtype=table.dtype, device=table.device)
        call.replaced.append((swap, swap.put(self._probe.write_perturbed(swap.part, some, looked_up))))
        found: Tensor = rows
        return found

    def _leave(self, owner: nn.Module, arguments: Any, output: Any) -> Any:  # noqa: ARG002 - what torch gives
        if not self._probe.active:
            return output
        memory = self._calls[-1].memory
        output = output if memory is None else _out_of(memory.flat, output)
        self._put_back(self._calls.pop())
        return output


class _WithoutProbe:
    active = False


def _without_probe() -> _Layer:
    layer = object.__new__(_Layer)
    layer._probe = _WithoutProbe()  # type: ignore[assignment]
    return layer


def _out_of(memory: Tensor, output: Any) -> Any:
    """Return what a layer returned, with copies of tensors that lie in some memory, as a slice of a parameter does."""
    start, stop = memory.data_ptr(), memory.data_ptr() + memory.nbytes

    def copied(value: Any) -> Any:
        inside = isinstance(value, Tensor) and value.numel() and start <= value.data_ptr() < stop
        return value.clone() if inside else value

    if isinstance(output, Tensor):
        return copied(output)
    if is_dataclass(output) and not isinstance(output, type | Mapping):
        for name in vars(output):
            object.__setattr__(output, name, tree_map(copied, getattr(output, name)))
        return output
    return tree_map(copied, output)


class _Watch(TorchDispatchMode):
    """Notes which parameters are read by what torch does, but not while `ours` is true.

    Args:
        parts: these are; they may share a storage with each other, or with parameters that stand still.
        left_behind: memory that counts as theirs: of what stood for them in calls that have ended.
        ours: whether the probe itself is at work.
    """

    def __init__(
        self, parts: Sequence[ParameterSlice], left_behind: Mapping[StorageWeakRef, set[str]], ours: Callable[[], bool]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used: set[str] = set()
        self._parts: dict[int, list[tuple[range, str]]] = {}
        for part in parts:
            self._parts.setdefault(_storage(part.tensor), []).append((address_range(part.tensor), part.name))
        self._left_behind = left_behind
        self._ours = ours

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Answer that torch's compiler is not to be kept out: that would import it, and no probed model is compiled."""
        return False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not self._ours():
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor):
                    self._note(value)
        return function(*args, **(kwargs or {}))

    def _note(self, value: Tensor) -> None:
        if value.layout is not torch.strided:
            return  # a sparse tensor is no parameter's memory, and has none of its own
        self.used |= self._left_behind.get(StorageWeakRef(value.untyped_storage()), set())
        for extent, name in self._parts.get(_storage(value), ()):
            read = address_range(value)
            if read.start < extent.stop and extent.start < read.stop:
                self.used.add(name)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
