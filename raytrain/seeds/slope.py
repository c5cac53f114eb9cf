"""How steep a loss is along a direction, from forward passes alone (Malladi et al. 2023, MeZO).

The perturbed model never exists as a whole: when a layer is called, its parameters are replaced by perturbed ones in a
scratch buffer that stays in the processor's cache, and put back when it returns. So parameters are never written, and
come back bit for bit in any type, also when the loss raises. Of an embedding only the rows that are looked up are drawn.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raytrain.errors import RecipeError
from raytrain.seeds.space import Part, Space

Loss = Callable[[], float]


class Probe:
    """Calls a loss with the parameters of a module moved along a direction.

    The first call is watched: a parameter that is used outside its own layer's call (by a layer above it, or by the
    loss) is from then on replaced for the whole of a call, which takes memory for all of it.

    Args:
        module: the model; it is looked at once, so its layers must stay.
        space: some or all of its parameters, by their names in it.

    Raises:
        RecipeError: a name of the space is not a parameter of the module.
    """

    def __init__(self, module: nn.Module, space: Space) -> None:
        self._space = space
        self._scratch = _Scratch()
        self._seed, self._scale = 0, 0.0
        self._moving = False
        self._whole: list[tuple[nn.Module, str, Part]] = []
        named = dict(module.named_parameters(remove_duplicate=False))
        parts = {}
        for part in space.parts:
            if part.name not in named or named[part.name].data_ptr() != part.tensor.data_ptr():
                raise RecipeError(f"directions: {part.name} is not a parameter of the module")
            parts[id(named[part.name])] = part
        self._owned: dict[nn.Module, list[tuple[nn.Module, str, Part]]] = {}
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None and id(parameter) in parts:
                    self._owned.setdefault(owner, []).append((owner, name, parts[id(parameter)]))
        self._watched = False

    def at(self, seed: int, scale: float, loss: Loss) -> float:
        """Return the loss at theta + scale * direction(seed)."""
        self._seed, self._scale = seed, scale
        if not self._watched:
            used = self._watch(loss)
            self._set_apart(used)
            self._watched = True
        with self._hooked():
            return loss()

    def _watch(self, loss: Loss) -> set[int]:
        """Return the places in memory of parameters that something reads that should have been replaced."""
        watch = _Watch({part.tensor.untyped_storage().data_ptr() for part in self._space.parts}, lambda: self._moving)
        with self._hooked(), watch:
            loss()
        return watch.used

    def _set_apart(self, used: set[int]) -> None:
        for owner, members in list(self._owned.items()):
            outside = [member for member in members if member[2].tensor.untyped_storage().data_ptr() in used]
            self._whole += outside
            self._owned[owner] = [member for member in members if member not in outside]

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        """Have each layer's parameters replaced while it is called, and those set apart all the time."""
        handles = []
        put_back: dict[nn.Module, Callable[[], None]] = {}

        def before(owner: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            arguments_of_rows, undo = self._replace(owner, arguments)
            put_back[owner] = undo
            return arguments_of_rows

        def after(owner: nn.Module, *_: object) -> None:
            put_back.pop(owner)()

        restore = [self._swap(*member) for member in self._whole]
        try:
            for owner, members in self._owned.items():
                if members:
                    handles.append(owner.register_forward_pre_hook(before))
                    handles.append(owner.register_forward_hook(after, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for undo in [*put_back.values(), *restore[::-1]]:
                undo()

    def _replace(
        self, owner: nn.Module, arguments: tuple[Any, ...]
    ) -> tuple[tuple[Any, ...] | None, Callable[[], None]]:
        """Replace the parameters of a layer; return its arguments, if they change, and what puts all back."""
        members = self._owned[owner]
        if type(owner) is nn.Embedding and owner.max_norm is None and arguments and len(members) == 1:
            looked_up, rows = arguments[0].unique(return_inverse=True)
            if 2 * len(looked_up) < owner.num_embeddings:
                padding, owner.padding_idx = owner.padding_idx, None  # it is a row of the whole table
                undo = self._swap(*members[0], rows=looked_up)

                def put_back() -> None:
                    owner.padding_idx = padding
                    undo()

                return (rows, *arguments[1:]), put_back
        undone = [self._swap(*member) for member in members]

        def put_all_back() -> None:
            for undo in undone[::-1]:
                undo()

        return None, put_all_back

    def _swap(self, owner: nn.Module, name: str, part: Part, rows: Tensor | None = None) -> Callable[[], None]:
        """Replace one parameter by a moved one; return what puts it back."""
        shape = part.tensor.shape if rows is None else (len(rows), *part.tensor.shape[1:])
        plain = owner._parameters[name]
        self._moving = True
        moved, release = self._scratch.take(shape, part.tensor)
        self._space.moved(part, self._seed, self._scale, moved, rows)
        self._moving = False
        owner._parameters[name] = moved  # type: ignore[assignment]

        def undo() -> None:
            owner._parameters[name] = plain
            release()

        return undo


class _Scratch:
    """Memory that is taken and released as a stack, and kept for the next call."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._taken = 0

    def take(self, shape: Sequence[int], like: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Return a tensor of a shape, and what releases it; release in the opposite order."""
        count = torch.Size(shape).numel()
        place = self._taken
        if place == len(self._blocks) or self._blocks[place].numel() < count or self._blocks[place].dtype != like.dtype:
            self._blocks[place : place + 1] = [like.new_empty(count)]
        self._taken += 1

        def release() -> None:
            self._taken -= 1

        return self._blocks[place][:count].view(shape), release


class _Watch(TorchDispatchMode):
    """Notes which of some storages are read by what torch does, but not while `ours` is true."""

    def __init__(self, storages: set[int], ours: Callable[[], bool]) -> None:
        super().__init__()
        self.used: set[int] = set()
        self._storages = storages
        self._ours = ours

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not self._ours():
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self._storages:
                    self.used.add(tensor.untyped_storage().data_ptr())
        return function(*args, **(kwargs or {}))


def slope(loss: Loss, probe: Probe, seed: int, eps: float, *, at_rest: float | None = None) -> tuple[float, float]:
    """Return how fast the loss rises along a direction, and the loss.

    Args:
        loss: called once or twice; it draws the same dropout both times. Averages over micro-batches are its affair.
        probe: of the module.
        seed: of the direction.
        eps: how far to go.
        at_rest: the loss without a move, for a one-sided difference (L(theta + eps z) - L(theta)) / eps; None: take
            (L(theta + eps z) - L(theta - eps z)) / (2 eps).

    Returns:
        The slope, and the mean of the two losses; either may be nan or infinite where the loss is.
    """
    ahead = probe.at(seed, eps, loss)
    if at_rest is not None:
        return (ahead - at_rest) / eps, at_rest
    behind = probe.at(seed, -eps, loss)
    return (ahead - behind) / (2 * eps), (ahead + behind) / 2
