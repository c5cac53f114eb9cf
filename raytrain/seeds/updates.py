"""Two ways to apply seeds, never confused: one by one as a live run does, and all at once with a single rounding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytrain.seeds.directions import Directions, ParameterSlice, tiles
from raytrain.seeds.kernels.kernel import quantise, seeds_tensor
from raytrain.seeds.prng import validate_seed
from raytrain.tensors import round_once

TILE_SUMS = 1 << 21
"""Sums that are taken at once: enough for all threads of a machine, and little beside a model."""
FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class SeedUpdate:
    """A move of all parameters: theta += scale * direction(seed).

    Attributes:
        seed: 64 bits, without sign.
        coefficient: how far; with the scale of a part it is rounded to float32.
    """

    seed: int
    coefficient: float

    def __post_init__(self) -> None:
        """Refuse what would move everything to where nothing comes back from."""
        validate_seed(self.seed)
        if not abs(self.coefficient) <= FLOAT32_MAX:
            raise ValueError(f"scale: expected a finite float32; got {self.coefficient}")


def apply_updates(directions: Directions, updates: Sequence[SeedUpdate]) -> None:
    """Make moves one after the other, in place: each rounds, so this equals the run that made them to the bit."""
    for move in filter(lambda move: move.coefficient, updates):
        directions.add_direction(move.seed, move.coefficient)


def materialise(
    directions: Directions, coefficients: Tensor, seeds: Sequence[int], out: Sequence[Tensor] | None = None
) -> Sequence[Tensor]:
    """Return w0 + sum over k of coefficients[k] * direction(seeds[k]), rounded once.

    Coefficients are taken to 2^-25 of the largest one of their model, and their sums are made in integers: so neither
    the order of the seeds nor the kernel, the device, the shard or the number of threads changes a bit. The sum is
    added to w0 in float64, and that is rounded to the parameter's type.

    Args:
        directions: holds w0.
        coefficients: float64, shape (k,); or (m, k) for m models at once, for which each direction is drawn once.
        seeds: of the k directions.
        out: where to, for each part of the space: its shape, or (m, *shape) for m models; it may be w0 itself for one.
            Default: new tensors.

    Returns:
        `out`.

    Raises:
        ValueError: there is not one coefficient for each seed, one is not finite, or `out` is of other shapes or types,
            or is w0 itself in a space that is read-only; or a sum is beyond what a parameter's type holds, and `out` is
            then of no use.
    """
    device = directions.slices[0].tensor.device
    many = coefficients.dim() == 2
    if coefficients.shape[-1:] != (len(seeds),) or coefficients.dim() > 2 or (many and not len(coefficients)):
        raise ValueError(
            f"coefficients: expected shape ({len(seeds)},) or (models, {len(seeds)}), one for each seed; "
            f"got {tuple(coefficients.shape)}"
        )
    weights, unit = quantise(coefficients.double() if many else coefficients.double()[None], directions.distribution)
    models, unit = len(weights), unit[:, None].to(device)
    of_block = [
        [place for place, seed in enumerate(seeds) if seed % directions.block_count == block]
        for block in range(directions.block_count)
    ]
    drawn = [seeds_tensor([seeds[place] for place in places], device) for places in of_block]
    chosen = [weights[:, places].contiguous().to(device) for places in of_block]
    shapes = [(models, *part.tensor.shape) if many else tuple(part.tensor.shape) for part in directions.slices]
    if out is None:
        out = [part.tensor.new_empty(shape) for part, shape in zip(directions.slices, shapes, strict=True)]
    for part, shape, target in zip(directions.slices, shapes, out, strict=True):
        if target.shape != shape or target.dtype != part.tensor.dtype or not target.is_contiguous():
            raise ValueError(
                f"out: expected a contiguous tensor of {part.tensor.dtype} and shape {shape} for {part.name}; "
                f"got {target.dtype}, {tuple(target.shape)} with strides {target.stride()}"
            )
    for part, target in zip(directions.slices, out, strict=True):
        directions.check_writable(part, target)
        base, written = part.tensor.view(-1), target.view(models, part.tensor.numel())
        for piece in tiles(base.numel(), max(1, TILE_SUMS // models)):
            sums = torch.zeros(models, piece.stop - piece.start, dtype=torch.int64, device=device)
            directions.kernel.accumulate(
                directions.distribution,
                drawn[part.block],
                chosen[part.block],
                part.parameter_id,
                part.offset + piece.start,
                sums,
            )
            moves = sums.double() * (unit * part.scale)
            if part.mask is not None:
                moves *= part.mask.view(-1)[piece]
            written[:, piece] = round_once(moves + base[piece], part.tensor.dtype)
            _check_reach(part, base[piece], written[:, piece], coefficients)
    return out


def _check_reach(part: ParameterSlice, base: Tensor, written: Tensor, coefficients: Tensor) -> None:
    """Check that what was finite still is.

    Raises:
        ValueError: it is not.
    """
    if not (written.isfinite() | ~base.isfinite()).all():
        raise ValueError(
            f"coefficients: expected finite parameters; the largest, {coefficients.abs().max():g}, takes {part.name} "
            f"beyond {part.tensor.dtype}"
        )
