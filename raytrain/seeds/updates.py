"""Two ways to apply seeded updates, which round differently and are never mixed.

One by one, `apply_updates`: theta <- theta + coefficient * z(seed), rounded to the parameter's type after each update,
as a live run does. All at once, `materialise`: w = w0 + sum_k coefficients[k] * z(seeds[k]), rounded once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytrain.seeds.directions import Directions, ParameterSlice, tiles
from raytrain.seeds.kernels.kernel import quantise, seeds_tensor
from raytrain.seeds.prng import validate_seed
from raytrain.tensors import round_once

TILE_SUMS = 1 << 21
"""Sums accumulated at a time, over all models: enough to keep all threads busy, and little memory beside a model."""
FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class SeedUpdate:
    """An update of all parameters: theta <- theta + coefficient * z(seed).

    Attributes:
        seed: unsigned 64-bit seed of the direction.
        coefficient: finite in float32, to which its product with the scale of a parameter is rounded.

    Raises:
        ValueError: the seed has more than 64 bits, or the coefficient is not finite in float32.
    """

    seed: int
    coefficient: float

    def __post_init__(self) -> None:
        """Refuse an update that would make every parameter infinite or nan."""
        validate_seed(self.seed)
        if not abs(self.coefficient) <= FLOAT32_MAX:
            raise ValueError(f"coefficient: expected a finite float32; got {self.coefficient}")


def apply_updates(directions: Directions, updates: Sequence[SeedUpdate]) -> None:
    """Apply updates one after the other, in place: equal to the bit to the run that applied them first."""
    for update in filter(lambda update: update.coefficient, updates):
        directions.add_direction(update.seed, update.coefficient)


@dataclass(frozen=True, slots=True)
class _QuantisedSum:
    """The terms of a sum over seeds as integers, for each block of the directions.

    Attributes:
        seeds: int64, shape (k_b,), for each block b.
        weights: int32, shape (m, k_b), for each block b: coefficients = weights * unit, up to 2^-25 of the largest.
        unit: float64, shape (m, 1).
    """

    seeds: Sequence[Tensor]
    weights: Sequence[Tensor]
    unit: Tensor

    @classmethod
    def of(cls, directions: Directions, coefficients: Tensor, seeds: Sequence[int]) -> "_QuantisedSum":
        """Quantise coefficients, float64, shape (m, k), and divide seeds by the block that they perturb."""
        device = directions.slices[0].tensor.device
        weights, unit = quantise(coefficients, directions.distribution)
        of_block: list[list[int]] = [[] for _ in range(directions.block_count)]
        for index, seed in enumerate(seeds):
            of_block[seed % directions.block_count].append(index)
        return cls(
            [seeds_tensor([seeds[index] for index in indices], device) for indices in of_block],
            [weights[:, indices].contiguous().to(device) for indices in of_block],
            unit[:, None].to(device),
        )


def materialise(
    directions: Directions, coefficients: Tensor, seeds: Sequence[int], out: Sequence[Tensor] | None = None
) -> Sequence[Tensor]:
    """Return w0 + sum over k of coefficients[k] * z(seeds[k]), rounded once.

    Coefficients are quantised to 2^-25 of the largest of their model and summed as integers, so the result does not
    depend on the order of the seeds, nor on kernel, device, sharding or number of threads, to the bit. The sum is added
    to w0 in float64, and the result is rounded to the parameter's type.

    Args:
        directions: over w0.
        coefficients: float64, shape (k,); or (m, k) for m models at once, which share the generated noise.
        seeds: of the k directions.
        out: for each slice of the directions a tensor of its shape, or (m, *shape) for m models. For one model it may
            be w0 itself. Default: new tensors.

    Returns:
        `out`.

    Raises:
        ValueError: there is not one coefficient for each seed; one is not finite; `out` has other shapes or types, or
            is a read-only w0; or a result exceeds the parameter's type, which leaves `out` undefined.
    """
    stacked = coefficients.dim() == 2
    if coefficients.shape[-1:] != (len(seeds),) or coefficients.dim() > 2 or (stacked and not len(coefficients)):
        raise ValueError(
            f"coefficients: expected shape ({len(seeds)},) or (models, {len(seeds)}), one for each seed; "
            f"got {tuple(coefficients.shape)}"
        )
    rows = coefficients.double() if stacked else coefficients.double()[None]
    terms = _QuantisedSum.of(directions, rows, seeds)
    out = _outputs(directions, (len(rows),) if stacked else (), out)
    for part, target in zip(directions.slices, out, strict=True):
        directions.check_writable(part, target)
        flat = target.view(len(rows), part.tensor.numel())
        for tile in tiles(part.tensor.numel(), max(1, TILE_SUMS // len(rows))):
            _write_tile(directions, part, terms, tile, flat[:, tile])
            _check_finite(part, part.tensor.view(-1)[tile], flat[:, tile], coefficients)
    return out


def _outputs(directions: Directions, models: tuple[int, ...], out: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """Return a tensor for each slice, of shape (*models, *shape): new ones, or `out` checked.

    Raises:
        ValueError: `out` has another shape, type or layout.
    """
    shapes = [(*models, *part.tensor.shape) for part in directions.slices]
    if out is None:
        return [part.tensor.new_empty(shape) for part, shape in zip(directions.slices, shapes, strict=True)]
    for part, shape, target in zip(directions.slices, shapes, out, strict=True):
        if target.shape != shape or target.dtype != part.tensor.dtype or not target.is_contiguous():
            raise ValueError(
                f"out: expected a contiguous tensor of {part.tensor.dtype} and shape {shape} for {part.name}; "
                f"got {target.dtype}, {tuple(target.shape)} with strides {target.stride()}"
            )
    return out


def _write_tile(
    directions: Directions, part: ParameterSlice, terms: _QuantisedSum, tile: slice, target: Tensor
) -> None:
    """Write one tile of one parameter of all models to `target`, shape (m, tile)."""
    base = part.tensor.view(-1)[tile]
    sums = torch.zeros(len(target), len(base), dtype=torch.int64, device=base.device)
    directions.kernel.accumulate(
        directions.distribution,
        terms.seeds[part.block],
        terms.weights[part.block],
        part.parameter_id,
        part.offset + tile.start,
        sums,
    )
    increment = sums.double() * (terms.unit * part.scale)
    if part.mask is not None:
        increment *= part.mask.view(-1)[tile]
    target[:] = round_once(increment + base, base.dtype)


def _check_finite(part: ParameterSlice, base: Tensor, written: Tensor, coefficients: Tensor) -> None:
    """Check that elements which were finite in w0 still are.

    Raises:
        ValueError: one is not.
    """
    if not (written.isfinite() | ~base.isfinite()).all():
        raise ValueError(
            f"coefficients: expected finite parameters; the largest, {coefficients.abs().max():g}, takes {part.name} "
            f"beyond {part.tensor.dtype}"
        )
