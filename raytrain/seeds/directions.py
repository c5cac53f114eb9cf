"""Random directions in parameter space, each named by a 64-bit seed: z(seed) over some parameters."""

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
"""Elements per tile where noise is materialised outside of a kernel: a tile stays in the processor's cache."""


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """A parameter, or a contiguous shard of one, and the scale of directions in it.

    Attributes:
        name: the parameter's name; its noise depends on it.
        tensor: its values, contiguous; for a shard, contiguous in the whole parameter too.
        scale: factor of the noise in this parameter.
        mask: bool, like `tensor`; True where directions are non-zero. None: everywhere.
        block: index of its block, in [0, block_count).
        offset: flat index of `tensor`'s first element in the whole parameter.
        parameter_id: 64-bit hash of the name.
    """

    name: str
    tensor: Tensor
    scale: float = 1.0
    mask: Tensor | None = None
    block: int = 0
    offset: int = 0
    parameter_id: int = field(init=False)

    def __post_init__(self) -> None:
        """Hash the name."""
        object.__setattr__(self, "parameter_id", parameter_id(self.name))


@dataclass(frozen=True, slots=True)
class Directions:
    """Maps a seed to a random direction z(seed) over a set of parameters.

    In parameter p, z(seed) = scale_p * mask_p * noise(seed, name of p) if block_p = seed mod block_count, and 0 else.

    Attributes:
        slices: the parameters, all on one device.
        distribution: of the noise.
        kernel: generates the noise.
        block_count: number of blocks of parameters; a direction is non-zero in one block only.
        read_only: whether writing to the parameters is refused, for weights that are mapped from a file.
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
        """Return the directions over named tensors.

        Args:
            named: name -> tensor. A tensor under a second name (tied weights) counts once, under its first name.
            distribution: "rademacher" or "gaussian".
            scales: name -> factor of the noise; default: 1.
            sparsity: fraction of each matrix that is masked, in [0, 1): the elements of largest magnitude at this time.
                Only the initial weights are needed to compute the mask again.
            blocks: name -> index of its block; default: one block.
            offsets: name -> flat index of the tensor's first element, for a shard of a parameter; default: 0.
            kernel: default: the fastest for the device.

        Raises:
            RecipeError: there is no tensor; tensors are on different devices, not contiguous, or overlap in memory; or
                shards come with sparsity, whose mask needs the whole parameter.

        Source: Liu et al. 2025, Sparse-MeZO (the mask).
        """
        if sparsity and offsets:
            raise RecipeError(
                "zo.sparsity: expected 0 with shards of parameters: the mask of the largest elements needs "
                "whole parameters"
            )
        once: dict[tuple[int, ...], tuple[str, Tensor]] = {}
        for name, tensor in named.items():
            once.setdefault(memory_key(tensor, tensor), (name, tensor))
        tensors = {name: tensor.detach() for name, tensor in once.values()}
        device = _common_device(tensors)
        slices = tuple(
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
        block_count = 1 + max(part.block for part in slices)
        return cls(slices, distribution, kernel or fastest_kernel(device.type), block_count)

    def with_tensors(self, tensors: Mapping[str, Tensor], *, read_only: bool = False) -> Self:
        """Return the same directions over other tensors, such as the initial weights in a file.

        Args:
            tensors: name -> contiguous tensor of the shape and type of the slice; other names are ignored. What
                `safetensors.torch.load_file` returns is mapped and takes no memory of the process.
            read_only: whether to refuse writing to them.

        Raises:
            RecipeError: one is missing, or of another shape or type.
        """
        for part in self.slices:
            other, wanted = tensors.get(part.name), (part.tensor.dtype, tuple(part.tensor.shape))
            came = None if other is None else (other.dtype, tuple(other.shape))
            if other is None or came != wanted or not other.is_contiguous():
                raise RecipeError(f"parameters: expected {part.name} of {wanted}, contiguous; got {came}")
        slices = tuple(replace(part, tensor=tensors[part.name].detach()) for part in self.slices)
        return replace(self, slices=slices, read_only=read_only)

    def direction_digest(self) -> str:
        """Return the SHA-256 of the mapping from seeds to directions, without the parameters' values."""
        about = [
            [part.name, [*part.tensor.shape], str(part.tensor.dtype), part.scale, part.block, part.offset]
            for part in self.slices
        ]
        masks = tensor_digest((part.name, part.mask) for part in self.slices if part.mask is not None)
        return hashlib.sha256(
            json.dumps([self.distribution, self.block_count, sorted(about), masks]).encode()
        ).hexdigest()

    def digest(self) -> str:
        """Return the SHA-256 of the parameters' current values and of the mapping from seeds to directions."""
        values = tensor_digest((part.name, part.tensor) for part in self.slices)
        return hashlib.sha256((values + self.direction_digest()).encode()).hexdigest()

    def perturbs(self, part: ParameterSlice, seed: int) -> bool:
        """Return whether direction `seed` has non-zero entries in this parameter."""
        return part.scale != 0 and seed % self.block_count == part.block

    def add_direction(self, seed: int, scale: float) -> None:
        """Add scale * z(seed) to all parameters in place."""
        for part in self.slices:
            self.add_to(part, part.tensor, seed, scale)

    def add_to(self, part: ParameterSlice, tensor: Tensor, seed: int, scale: float) -> None:
        """Add scale * z(seed), restricted to one parameter, to a tensor of its shape in place."""
        if self.perturbs(part, seed):
            self._axpy(part, tensor, seed, scale, tensor, None)

    def write_perturbed(
        self, part: ParameterSlice, seed: int, scale: float, out: Tensor, rows: Tensor | None = None
    ) -> None:
        """Write theta + scale * z(seed) for one parameter, which the direction perturbs, to another tensor.

        The product is rounded to float32, the sum to float32 and then to the parameter's type. Only float64 parameters
        are added to in float64.

        Args:
            part: of `slices`.
            seed: of the direction.
            scale: factor; its product with the slice's scale is rounded to float32.
            out: contiguous, of the parameter's type.
            rows: int64; only these rows of the parameter.
        """
        self._axpy(part, part.tensor, seed, scale, out, rows)

    def _axpy(
        self, part: ParameterSlice, base: Tensor, seed: int, scale: float, out: Tensor, rows: Tensor | None
    ) -> None:
        if out.dtype != base.dtype or not (out.is_contiguous() and base.is_contiguous()):
            raise ValueError(f"out: expected a contiguous tensor of {base.dtype}; got {out.dtype}, {out.stride()}")
        self.check_writable(part, out)
        direction = ScaledDirection(self.distribution, seed, scale * part.scale, part.parameter_id, part.offset)
        if part.mask is None and base.dtype in self.kernel.dtypes:
            self.kernel.axpy(direction, base, out, rows)
            return
        if rows is not None:
            for to, row in enumerate(rows.tolist()):
                mask = None if part.mask is None else part.mask[row]
                offset = part.offset + row * base[0].numel()
                self._axpy_tile(direction._replace(offset=offset), base[row], mask, out[to])
            return
        flat, target = base.view(-1), out.view(-1)
        mask = None if part.mask is None else part.mask.view(-1)
        for tile in tiles(len(flat)):
            tile_mask = None if mask is None else mask[tile]
            tile_direction = direction._replace(offset=part.offset + tile.start)
            self._axpy_tile(tile_direction, flat[tile], tile_mask, target[tile])

    def check_writable(self, part: ParameterSlice, out: Tensor) -> None:
        """Refuse to write to a read-only parameter.

        Raises:
            ValueError: `out` is the parameter itself, and the directions are read-only.
        """
        if self.read_only and out.data_ptr() == part.tensor.data_ptr():
            raise ValueError(f"out: expected another tensor than {part.name}, which is read-only")

    def _axpy_tile(self, direction: ScaledDirection, base: Tensor, mask: Tensor | None, out: Tensor) -> None:
        """Write base + mask * direction to `out` where the kernel itself has no mask, or not this type."""
        increment = torch.empty(base.shape, dtype=torch.float32, device=base.device)
        self.kernel.axpy(direction, torch.zeros_like(increment), increment)
        if mask is not None:
            increment *= mask
        out.copy_(base + increment if base.dtype == torch.float64 else base.float() + increment)


def _common_device(tensors: Mapping[str, Tensor]) -> torch.device:
    """Return the device of tensors that directions can be added to.

    Raises:
        RecipeError: see `Directions.of`.
    """
    if not tensors:
        raise RecipeError("directions: expected trainable parameters; got none: see freeze.match")
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) != 1:
        raise RecipeError(f"directions: expected parameters on one device; got them on {sorted(map(str, devices))}")
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise RecipeError(f"directions: expected contiguous parameters; {name} is not: make it so in the task")
    ranges = sorted((address_range(tensor).start, address_range(tensor).stop, name) for name, tensor in tensors.items())
    for (_, stop, name), (start, _, other) in pairwise(one for one in ranges if 0 < one[0] < one[1]):
        if start < stop:
            raise RecipeError(
                f"directions: {name} and {other} overlap in memory without being one tensor, and would be updated "
                "twice; make them one parameter, or freeze one with freeze.match"
            )
    return devices.pop()


def memory_key(tensor: Tensor, owner: Tensor) -> tuple[int, ...]:
    """Return a key, equal for tensors of the same memory and shape (if empty, of the same owner)."""
    return (tensor.data_ptr(), *tensor.shape) if tensor.data_ptr() else (id(owner),)


def address_range(tensor: Tensor) -> range:
    """Return the addresses from the first byte of a tensor to the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return range(start, start + (last + 1) * tensor.itemsize if tensor.numel() else start)


def sparse_mask(tensor: Tensor, sparsity: float) -> Tensor | None:
    """Return the mask without the fraction `sparsity` of largest magnitude of a matrix; None: no mask."""
    if not sparsity or tensor.dim() < 2 or not tensor.numel():
        return None
    magnitudes = tensor.detach().abs().flatten()
    kept = max(1, round((1 - sparsity) * magnitudes.numel()))
    return (magnitudes <= magnitudes.kthvalue(kept).values).view_as(tensor)


def tiles(count: int, size: int = TILE_ELEMENTS) -> Iterator[slice]:
    """Yield slices of at most `size` elements that cover `count` elements."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
