"""The space that directions lie in: which parameters they move, how far, and which of their elements."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from raytrain.errors import RecipeError
from raytrain.seeds.kernels.kernel import Kernel, ScaledDirection, fastest_kernel
from raytrain.seeds.prng import Distribution, parameter_id
from raytrain.tensors import tensor_digest

TILE_ELEMENTS = 1 << 16
"""Elements at a time where numbers are kept for more than the kernel itself: these stay in a processor's cache."""


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """One parameter.

    Attributes:
        name: by which its numbers are drawn.
        tensor: its values, contiguous; or those of a shard of it that is contiguous in the whole.
        scale: how much longer directions are here than elsewhere.
        mask: which elements they move, bool, of the same shape; None: all.
        block: which of the space's blocks it is in.
        offset: the flat position in the whole parameter of the first element that is here.
    """

    name: str
    tensor: Tensor
    scale: float = 1.0
    mask: Tensor | None = None
    block: int = 0
    offset: int = 0
    parameter_id: int = field(init=False)

    def __post_init__(self) -> None:
        """Find the number that stands for the name."""
        object.__setattr__(self, "identity", parameter_id(self.name))


@dataclass(frozen=True, slots=True)
class Directions:
    """Some parameters, and what a seed stands for in them.

    Attributes:
        slices: of one device.
        distribution: of the numbers.
        kernel: draws them.
        block_count: into how many the parts are put; a seed moves the block seed % blocks, and nothing else.
        read_only: whether the parameters are never written to, as those of a file that is mapped to memory.
    """

    slices: tuple[ParameterSlice, ...]
    distribution: Distribution
    kernel: Kernel
    block_count: int = 1
    read_only: bool = False

    @classmethod
    def of(
        cls,
        named: Mapping[str, Tensor],
        distribution: Distribution = "rademacher",
        *,
        scales: Mapping[str, float] | None = None,
        sparsity: float = 0.0,
        blocks: Mapping[str, int] | None = None,
        offsets: Mapping[str, int] | None = None,
        kernel: Kernel | None = None,
    ) -> Self:
        """Return the space of some tensors.

        Args:
            named: name -> tensor; one that comes again under another name (tied weights) is taken once, by the first.
            distribution: "rademacher" or "gaussian".
            scales: name -> how much longer directions are there; default: 1.
            sparsity: the share of each tensor of two or more dimensions, the elements of largest magnitude now, that
                stands still (Liu et al. 2025, Sparse-MeZO). The mask follows from the initial weights alone, so who
                has these has the mask.
            blocks: name -> its block, counted from 0; default: all are in one.
            offsets: name -> where in the whole parameter the tensor starts, if it is a shard of it; default: 0.
            kernel: default: the fastest for the device.

        Raises:
            RecipeError: there is no tensor, they are on different devices, or one is not contiguous; two share some
                memory and are not one tensor; or there are shards and sparsity, for which the whole parameter would
                have to be looked at.
        """
        if sparsity and offsets:
            raise RecipeError("zo.sparsity: expected 0 with shards of parameters, which do not know the largest")
        once: dict[tuple[int, ...], tuple[str, Tensor]] = {}
        for name, tensor in named.items():
            once.setdefault(memory_key(tensor, tensor), (name, tensor))
        tensors = {name: tensor.detach() for name, tensor in once.values()}
        device = _device_of(tensors)
        parts = tuple(
            ParameterSlice(
                name,
                tensor,
                (scales or {}).get(name, 1.0),
                sparse_mask(tensor, sparsity),
                (blocks or {}).get(name, 0),
                (offsets or {}).get(name, 0),
            )
            for name, tensor in tensors.items()
        )
        return cls(parts, distribution, kernel or fastest_kernel(device.type), 1 + max(part.block for part in parts))

    def with_tensors(self, tensors: Mapping[str, Tensor], *, read_only: bool = False) -> Self:
        """Return the same directions over other tensors, as over first weights that a file holds.

        Args:
            tensors: name -> tensor, contiguous, of the shape and type of the part; others are ignored. What
                `safetensors.torch.load_file` returns is mapped: it takes no memory of the process that reads it.
            read_only: whether to refuse to write to them.

        Raises:
            RecipeError: one is missing, or of another shape or type.
        """
        for part in self.slices:
            other, wanted = tensors.get(part.name), (part.tensor.dtype, tuple(part.tensor.shape))
            came = None if other is None else (other.dtype, tuple(other.shape))
            if other is None or came != wanted or not other.is_contiguous():
                raise RecipeError(f"parameters: expected {part.name} of {wanted}, contiguous; got {came}")
        parts = tuple(replace(part, tensor=tensors[part.name].detach()) for part in self.slices)
        return replace(self, slices=parts, read_only=read_only)

    def direction_digest(self) -> str:
        """Return a hash of what seeds stand for here: of all but the values of the parameters."""
        about = [
            [part.name, [*part.tensor.shape], str(part.tensor.dtype), part.scale, part.block, part.offset]
            for part in self.slices
        ]
        masks = tensor_digest((part.name, part.mask) for part in self.slices if part.mask is not None)
        return hashlib.sha256(
            json.dumps([self.distribution, self.block_count, sorted(about), masks]).encode()
        ).hexdigest()

    def digest(self) -> str:
        """Return what the parameters, as they are now, and their directions are known by."""
        values = tensor_digest((part.name, part.tensor) for part in self.slices)
        return hashlib.sha256((values + self.direction_digest()).encode()).hexdigest()

    def perturbs(self, part: ParameterSlice, seed: int) -> bool:
        """Return whether a direction moves a part."""
        return part.scale != 0 and seed % self.block_count == part.block

    def add_direction(self, seed: int, scale: float) -> None:
        """Add scale * direction to the parameters in place."""
        for part in self.slices:
            self.add_to(part, part.tensor, seed, scale)

    def add_to(self, part: ParameterSlice, tensor: Tensor, seed: int, scale: float) -> None:
        """Add scale * direction to a tensor like the part in place."""
        if self.perturbs(part, seed):
            self._write(part, tensor, seed, scale, tensor, None)

    def write_perturbed(
        self, part: ParameterSlice, seed: int, scale: float, out: Tensor, rows: Tensor | None = None
    ) -> None:
        """Write one parameter plus scale * direction, which reaches it, to another tensor.

        The product is rounded to float32; so is the sum, and then to the parameter's type, unless that is float64.

        Args:
            part: of this space.
            seed: which direction.
            scale: how far; with the part's own scale it is rounded to float32.
            out: contiguous, of the parameter's type.
            rows: int64; only these rows of the parameter.
        """
        self._write(part, part.tensor, seed, scale, out, rows)

    def _write(
        self, part: ParameterSlice, base: Tensor, seed: int, scale: float, out: Tensor, rows: Tensor | None
    ) -> None:
        if out.dtype != base.dtype or not (out.is_contiguous() and base.is_contiguous()):
            raise ValueError(f"out: expected a contiguous tensor of {base.dtype}; got {out.dtype}, {out.stride()}")
        self.check_writable(part, out)
        drawn = ScaledDirection(self.distribution, seed, scale * part.scale, part.parameter_id, part.offset)
        if part.mask is None and base.dtype in self.kernel.dtypes:
            self.kernel.axpy(drawn, base, out, rows)
            return
        if rows is not None:
            for to, row in enumerate(rows.tolist()):
                mask = None if part.mask is None else part.mask[row]
                self._write_piece(drawn._replace(offset=part.offset + row * base[0].numel()), base[row], mask, out[to])
            return
        flat, target = base.view(-1), out.view(-1)
        mask = None if part.mask is None else part.mask.view(-1)
        for piece in tiles(len(flat)):
            some = None if mask is None else mask[piece]
            self._write_piece(drawn._replace(offset=part.offset + piece.start), flat[piece], some, target[piece])

    def check_writable(self, part: ParameterSlice, out: Tensor) -> None:
        """Refuse to write to a parameter that is only read.

        Raises:
            ValueError: `out` is the parameter, and the space is read-only.
        """
        if self.read_only and out.data_ptr() == part.tensor.data_ptr():
            raise ValueError(f"out: expected another tensor than {part.name}, which is read-only")

    def _write_piece(self, drawn: ScaledDirection, base: Tensor, mask: Tensor | None, out: Tensor) -> None:
        by = torch.empty(base.shape, dtype=torch.float32, device=base.device)
        self.kernel.axpy(drawn, torch.zeros_like(by), by)
        if mask is not None:
            by *= mask
        out.copy_(base + by if base.dtype == torch.float64 else base.float() + by)


def _device_of(tensors: Mapping[str, Tensor]) -> torch.device:
    """Return where tensors are, of which each can be moved.

    Raises:
        RecipeError: see `Directions.of`.
    """
    if not tensors:
        raise RecipeError("directions: expected parameters to move; got none: look at freeze.match and the others")
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) != 1:
        raise RecipeError(f"directions: expected parameters on one device; got them on {sorted(map(str, devices))}")
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise RecipeError(f"directions: expected contiguous parameters; {name} is not: make it so in the task")
    placed = sorted((address_range(tensor).start, address_range(tensor).stop, name) for name, tensor in tensors.items())
    for (_, stop, name), (start, _, other) in pairwise(one for one in placed if 0 < one[0] < one[1]):
        if start < stop:
            raise RecipeError(
                f"directions: {name} and {other} lie in the same memory, though not as one tensor, and would be moved "
                "twice; make them one parameter, or freeze one with freeze.match"
            )
    return devices.pop()


def memory_key(tensor: Tensor, owner: Tensor) -> tuple[int, ...]:
    """Return by what a tensor is known to be another one: where it lies, or if it is nowhere, whose it is."""
    return (tensor.data_ptr(), *tensor.shape) if tensor.data_ptr() else (id(owner),)


def address_range(tensor: Tensor) -> range:
    """Return the addresses from the first byte of a tensor to the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return range(start, start + (last + 1) * tensor.itemsize if tensor.numel() else start)


def sparse_mask(tensor: Tensor, sparsity: float) -> Tensor | None:
    """Return which elements of a matrix are not among the share `sparsity` of largest magnitude; None: all count."""
    if not sparsity or tensor.dim() < 2 or not tensor.numel():
        return None
    magnitudes = tensor.detach().abs().flatten()
    kept = max(1, round((1 - sparsity) * magnitudes.numel()))
    return (magnitudes <= magnitudes.kthvalue(kept).values).view_as(tensor)


def tiles(count: int, size: int = TILE_ELEMENTS) -> Iterator[slice]:
    """Yield slices of at most `size` that make up `count` elements."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
