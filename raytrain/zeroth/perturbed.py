"""Evaluate a loss at theta + eps * z(seed) without writing to theta.

The perturbed model never exists as a whole. While a layer runs, its entries in `module._parameters` are perturbed
copies in a scratch buffer that stays in the processor's cache; when it returns, they are the parameters again. So theta
keeps its bits in any type, also if the loss raises an error, and an evaluation needs memory for one layer only.

The life of an evaluation, `PerturbedModel.loss_at(seed, eps, closure)`:

1. Discovery, before the first evaluation only. The closure runs under `_ReadRecorder`, which sees every tensor that
   torch reads. A parameter that is read while its layer does not run (a tied weight, a functional call by the layer
   above, a penalty in the loss) leaves its layer's slots and becomes one of `_global_slots`. If there are any, a second
   run checks that nothing is missed any more; what is (a tensor kept in a list) is an error. Code that only a later
   call runs is not seen: a loss has to read its parameters in the same way in every call.
2. `_perturbed` saves the buffers, fills the global slots with perturbed copies in memory of their own, and sets
   `active`. Hooks return at once while it is not set.
3. The pre-hook of a layer pushes a `_LayerCall`, acquires a scratch buffer, and fills each slot that the direction
   perturbs. An embedding is special: noise is generated for the looked-up rows only, the slot gets a small
   table of these rows, and the layer gets indices into it instead of the tokens.
4. The layer computes. Layers inside it do the same, with the scratch buffer of their own depth.
5. The hook copies outputs that alias the scratch buffer, as a returned slice of a parameter does, restores the slots
   and pops the call.
6. `_perturbed` clears `active`, restores slots of calls that an error left open, the global slots and the buffers.

Invariants:

* A scratch buffer is shared by all layers of the same nesting depth, because none of them contains another. Between
  the pre-hook and the hook of a layer it belongs to that call, which `users` counts. A layer of the same depth that is
  called meanwhile, by a layer that does not contain it, gets a buffer of its own.
* Prepared views of a scratch buffer are valid as long as `_views_of` is the buffer's current memory; a larger layer
  replaces it, and views are then made anew.
* During discovery every call has its own buffer, whose address tells if its contents are read after the call
  (`stale`). Reads by this module itself do not count (`generating`).
* Slots are restored in reverse order, so a parameter that has two slots in nested calls comes back right.
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
"""Evaluates the loss, shape (), in float32 at least; it draws the same dropout in every call."""


class PerturbedModel:
    """Evaluates a loss at perturbed parameters of a module without writing to them; see the top.

    Buffers, such as the statistics of a BatchNorm, are restored after each evaluation.

    Args:
        module: the model. Its layers get forward hooks, which do nothing between evaluations; they must stay.
        directions: over some or all of its parameters, by their names in it.

    Raises:
        RecipeError: a name is not one of a parameter of the module. In the first evaluation: a parameter is kept and
            read where it cannot be replaced.
    """

    def __init__(self, module: nn.Module, directions: Directions) -> None:
        self.directions = directions
        self._buffers = _Buffers(module)
        self.seed, self.eps = 0, 0.0
        self.active = self.dual = self.discovering = self.generating = False
        self.stale: dict[StorageWeakRef, set[str]] = {}  # memory of perturbed copies of ended calls -> parameters
        self._discovered = False
        slots_of = _slots_by_layer(module, directions)
        names = [name for name, layer in module.named_modules() if layer in slots_of]
        buffers: dict[int, _ScratchBuffer] = {}
        self._layers = []
        for name in names:
            depth = sum(name != other and f"{name}.".startswith(f"{other}." if other else "") for other in names)
            owner = module.get_submodule(name)
            self._layers.append(_HookedLayer(self, owner, slots_of[owner], buffers.setdefault(depth, _ScratchBuffer())))
        for layer in sorted(self._layers, key=lambda layer: -layer.bytes):
            layer.prepare()  # before there are activations, between which long-lived buffers would fragment memory
        self._global_slots: list[_Slot] = []

    def loss_at(self, seed: int, eps: float, closure: Closure) -> Tensor:
        """Return L(theta + eps * z(seed))."""
        self.seed, self.eps = seed, eps
        self._discover(closure)
        with self._perturbed():
            return closure()

    def loss(self, closure: Closure) -> Tensor:
        """Return L(theta); buffers are restored here too."""
        with self._buffers.restored():
            return closure()

    def jvp(self, seed: int, closure: Closure) -> Tensor:
        """Return L(theta) as a dual tensor whose tangent is z(seed) . grad L(theta); inside a `dual_level`."""
        self._discover(closure)
        self.dual = True
        try:
            return self.loss_at(seed, 1.0, closure)
        finally:
            self.dual = False

    def _discover(self, closure: Closure) -> None:
        """Make slots global whose parameters are read outside of their layers, before the first evaluation."""
        if self._discovered:
            return
        read = self._read_outside(closure)
        for layer in self._layers:
            self._global_slots += layer.release(read)
        if self._global_slots and (missed := self._read_outside(closure)):
            raise RecipeError(
                f"directions: {', '.join(sorted(missed))} is kept outside of its layer, as in a list, and read "
                "from there, where it cannot be perturbed; read it from its layer, or freeze it with freeze.match"
            )
        self._discovered = True

    def _read_outside(self, closure: Closure) -> set[str]:
        """Return the parameters that are read instead of their perturbed copies, or whose stale copy is."""
        self.discovering = True
        recorder = _ReadRecorder(self.directions.slices, self.stale, lambda: self.generating)
        try:
            with self._perturbed(), recorder:
                closure()
        finally:
            self.discovering = False
            self.stale.clear()
        return recorder.read

    @contextmanager
    def _perturbed(self) -> Iterator[None]:
        """Perturb each layer while it runs, and the global slots all the time."""
        slots = [slot for slot in self._global_slots if self.is_perturbed(slot.part)]
        before: list[Any] = []
        with self._buffers.restored():
            try:
                for slot in slots:
                    before.append(slot.swap(self.perturb(slot.part, torch.empty_like(slot.part.tensor))))
                self.active = True
                yield
            finally:
                self.active = False
                for layer in self._layers:
                    layer.restore_all()  # of calls that an error left open
                for slot, parameter in zip(slots, before, strict=False):
                    slot.swap(parameter)

    def is_perturbed(self, part: ParameterSlice) -> bool:
        """Return whether the current direction is non-zero in a parameter; during discovery, always."""
        return self.discovering or self.directions.perturbs(part, self.seed)

    def perturb(self, part: ParameterSlice, out: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the perturbed parameter, or some rows of it, in `out`; in forward mode, as a new dual tensor."""
        self.generating = True
        try:
            if self.dual:
                tangent = torch.zeros_like(part.tensor)
                self.directions.add_to(part, tangent, self.seed, self.eps)
                dual: Tensor = forward_ad.make_dual(part.tensor, tangent)
                return dual  # noqa: RET504 - torch does not annotate it
            self.directions.write_perturbed(part, self.seed, self.eps, out, rows)
            return out
        finally:
            self.generating = False


def _slots_by_layer(module: nn.Module, directions: Directions) -> dict[nn.Module, list["_Slot"]]:
    """Return layer -> slots, for layers that own parameters of the directions.

    Raises:
        RecipeError: a slice is not a parameter of the module.
    """
    named = dict(module.named_parameters(remove_duplicate=False))
    parts = {}
    for part in directions.slices:
        if part.name not in named or named[part.name].data_ptr() != part.tensor.data_ptr():
            raise RecipeError(f"directions: {part.name} is not a parameter of the module")
        parts[memory_key(part.tensor, named[part.name])] = part
    slots: dict[nn.Module, list[_Slot]] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            key = None if parameter is None else memory_key(parameter, parameter)
            if key in parts:
                slots.setdefault(owner, []).append(_Slot(owner._parameters, name, parts[key]))
    return slots


class _Buffers:
    """The buffers of a module, restored after each evaluation.

    The first evaluation shows which are written to; later ones only save these.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = list(module.modules())
        self._written: set[tuple[int, str]] | None = None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore buffers at the end of the `with` block, as the means of a BatchNorm in training mode."""
        before = [dict(layer._buffers) for layer in self._layers]
        values = {
            (index, name): (buffer, buffer.clone())
            for index, named in enumerate(before)
            for name, buffer in named.items()
            if buffer is not None and self._may_change((index, name), buffer)
        }
        try:
            yield
            if self._written is None:
                self._written = {key for key, (buffer, value) in values.items() if not torch.equal(buffer, value)}
        finally:
            for layer, named in zip(self._layers, before, strict=True):  # the closure may have assigned others
                layer._buffers.clear()
                layer._buffers.update(named)
            for buffer, value in values.values():
                buffer.copy_(value)

    def _may_change(self, key: tuple[int, str], buffer: Tensor) -> bool:
        if self._written is not None:
            return key in self._written
        if buffer.layout is not torch.strided:
            return False
        # Torch refuses to write to a tensor whose elements overlap, as an expanded one's do.
        return not any(size > 1 and not stride for size, stride in zip(buffer.shape, buffer.stride(), strict=True))


class _Slot:
    """An entry of a layer's `_parameters`, which can hold a perturbed copy for a while."""

    __slots__ = ("_holder", "_name", "part")

    def __init__(self, holder: dict[str, Any], name: str, part: ParameterSlice) -> None:
        self.part = part
        self._holder, self._name = holder, name

    def swap(self, tensor: Any) -> Any:
        """Set the entry to a tensor, and return the one before it."""
        before, self._holder[self._name] = self._holder[self._name], tensor
        return before


class _ScratchBuffer:
    """Memory for perturbed copies of a layer's parameters, shared by layers of the same depth."""

    def __init__(self) -> None:
        self.flat = torch.empty(0, dtype=torch.uint8)
        self.users = 0

    def views(self, slots: Sequence[_Slot]) -> list[Tensor]:
        """Return a tensor for each slot, in this memory, which grows if it is too small."""
        tensors = [slot.part.tensor for slot in slots]
        offsets = [0]
        for tensor in tensors:
            offsets.append(offsets[-1] + -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
        if tensors and (self.flat.numel() < offsets[-1] or self.flat.device != tensors[0].device):
            self.flat = torch.empty(max(offsets[-1], self.flat.numel()), dtype=torch.uint8, device=tensors[0].device)
        return [
            self.flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for offset, tensor in zip(offsets, tensors, strict=False)
        ]


@dataclass(slots=True)
class _LayerCall:
    """A running call of a layer.

    Attributes:
        replaced: (slot, the parameter that it held) of each slot with a perturbed copy.
        buffer: the scratch buffer in use; None: of a look-up, which has a small table.
        padding_idx: the embedding's, during a look-up.
        is_lookup: whether an embedding was replaced by the rows that are looked up.
    """

    replaced: list[tuple[_Slot, Any]] = field(default_factory=list)
    buffer: _ScratchBuffer | None = None
    padding_idx: Any = None
    is_lookup: bool = False


class _HookedLayer:
    """A layer with forward hooks that swap perturbed copies in and out.

    Hooks do as little as possible: after a matrix product Python runs with cold caches.
    """

    def __init__(self, model: PerturbedModel, owner: nn.Module, slots: list[_Slot], buffer: _ScratchBuffer) -> None:
        self._model = model
        self._owner: Any = owner
        self._slots = slots
        self._buffer = buffer
        self._views: list[Tensor] = []
        self._views_of: Tensor | None = None
        self._calls: list[_LayerCall] = []
        self._is_embedding = type(owner) is nn.Embedding and owner.max_norm is None and len(slots) == 1
        self.bytes = sum(slot.part.tensor.nbytes for slot in slots)
        owner.register_forward_pre_hook(self._enter)
        owner.register_forward_hook(self._leave)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy or save the model without its `PerturbedModel`: the hooks of a copy do nothing."""
        return (_inactive_layer, ())

    def prepare(self) -> None:
        """Make views of the scratch buffer; an embedding rarely needs them."""
        if not self._is_embedding:
            self._views, self._views_of = self._buffer.views(self._slots), self._buffer.flat

    def release(self, names: set[str]) -> list[_Slot]:
        """Give up the slots of parameters with these names, and return them."""
        released = [slot for slot in self._slots if slot.part.name in names]
        self._slots = [slot for slot in self._slots if slot not in released]
        self._is_embedding = self._is_embedding and bool(self._slots)
        self._views_of = None
        return released

    def restore_all(self) -> None:
        """Restore the slots of calls that an error left open."""
        while self._calls:
            self._restore(self._calls.pop())

    def _restore(self, call: _LayerCall) -> None:
        for slot, parameter in reversed(call.replaced):
            copy = slot.swap(parameter)
            if self._model.discovering:
                memory = StorageWeakRef(copy.untyped_storage())
                self._model.stale.setdefault(memory, set()).add(slot.part.name)
        if call.buffer is not None:
            call.buffer.users -= 1
        if call.is_lookup:
            self._owner.padding_idx = call.padding_idx

    def _enter(self, owner: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:  # noqa: ARG002
        model = self._model
        if not model.active:
            return None
        call = _LayerCall()
        self._calls.append(call)
        if self._is_embedding and arguments and not model.dual and model.is_perturbed(self._slots[0].part):
            rows = self._look_up(arguments[0], call)
            if rows is not None:
                return (rows, *arguments[1:])
        call.buffer, views = self._acquire()
        call.buffer.users += 1
        for slot, view in zip(self._slots, views, strict=True):
            if model.is_perturbed(slot.part):
                call.replaced.append((slot, slot.swap(model.perturb(slot.part, view))))
        return None

    def _acquire(self) -> tuple["_ScratchBuffer", list[Tensor]]:
        """Return a scratch buffer for one call, and a view of it for each slot."""
        if (
            self._is_embedding  # which has no prepared views
            or self._buffer.users  # taken by a running call of a layer of the same depth
            or self._model.discovering  # when the buffer's address identifies the call
        ):
            buffer = _ScratchBuffer()
            return buffer, buffer.views(self._slots)
        if self._views_of is not self._buffer.flat:  # a larger layer replaced the memory
            self.prepare()
        return self._buffer, self._views

    def _look_up(self, tokens: Tensor, call: _LayerCall) -> Tensor | None:
        """Replace an embedding by its rows for `tokens`, and return the tokens' indices in these.

        Returns None where this does not pay, and for tokens out of range, about which torch raises the error.
        """
        slot = self._slots[0]
        table = slot.part.tensor
        distinct, indices = tokens.long().unique(return_inverse=True)
        count = len(distinct)
        if not 0 < 2 * count < len(table) or distinct[0] < 0 or distinct[-1] >= len(table):
            return None
        call.is_lookup, call.padding_idx = True, self._owner.padding_idx
        self._owner.padding_idx = None  # it is an index into the whole table
        rows = torch.empty((count, *table.shape[1:]), dtype=table.dtype, device=table.device)
        call.replaced.append((slot, slot.swap(self._model.perturb(slot.part, rows, distinct))))
        found: Tensor = indices
        return found

    def _leave(self, owner: nn.Module, arguments: Any, output: Any) -> Any:  # noqa: ARG002 - torch's signature
        if not self._model.active:
            return output
        buffer = self._calls[-1].buffer
        output = output if buffer is None else _without_aliases(buffer.flat, output)
        self._restore(self._calls.pop())
        return output


class _InactiveModel:
    active = False


def _inactive_layer() -> _HookedLayer:
    layer = object.__new__(_HookedLayer)
    layer._model = _InactiveModel()  # type: ignore[assignment]
    return layer


def _without_aliases(memory: Tensor, output: Any) -> Any:
    """Return a layer's output with copies of tensors that alias a memory, as parameter slices do."""
    start, stop = memory.data_ptr(), memory.data_ptr() + memory.nbytes

    def copy(value: Any) -> Any:
        inside = isinstance(value, Tensor) and value.numel() and start <= value.data_ptr() < stop
        return value.clone() if inside else value

    if isinstance(output, Tensor):
        return copy(output)
    if is_dataclass(output) and not isinstance(output, type | Mapping):
        for name in vars(output):
            object.__setattr__(output, name, tree_map(copy, getattr(output, name)))
        return output
    return tree_map(copy, output)


class _ReadRecorder(TorchDispatchMode):
    """Records the parameters that torch's operations read, except while `ignored` is true.

    Args:
        parts: the parameters; they may share storage with each other, or with frozen ones.
        stale: memory of perturbed copies of ended calls -> parameters, whose reads count as reads of these.
        ignored: whether reads are those of the perturbation itself.
    """

    def __init__(
        self, parts: Sequence[ParameterSlice], stale: Mapping[StorageWeakRef, set[str]], ignored: Callable[[], bool]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: set[str] = set()
        self._parts: dict[int, list[tuple[range, str]]] = {}
        for part in parts:
            self._parts.setdefault(_storage(part.tensor), []).append((address_range(part.tensor), part.name))
        self._stale = stale
        self._ignored = ignored

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: skipping would import torch's compiler, and no perturbed model is compiled."""
        return False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not self._ignored():
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor):
                    self._record(value)
        return function(*args, **(kwargs or {}))

    def _record(self, value: Tensor) -> None:
        if value.layout is not torch.strided:
            return  # a sparse tensor has no memory of its own, and is not a parameter's
        self.read |= self._stale.get(StorageWeakRef(value.untyped_storage()), set())
        for extent, name in self._parts.get(_storage(value), ()):
            touched = address_range(value)
            if touched.start < extent.stop and extent.start < touched.stop:
                self.read.add(name)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
