"""Two ways to apply seeds, never confused: one by one as a live run does, and all at once with a single rounding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytrain.seeds.directions import Part, Space, pieces
from raytrain.seeds.kernels.kernel import quantised, seeds_tensor
from raytrain.seeds.prng import checked
from raytrain.tensors import rounded

SUMMED = 1 << 21
"""Sums that are taken at once: enough for all threads of a machine, and little beside a model."""
FARTHEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class Nudge:
    """A move of all parameters: theta += scale * direction(seed).

    Attributes:
        seed: 64 bits, without sign.
        scale: how far; with the scale of a part it is rounded to float32.
    """

    seed: int
    scale: float

    def __post_init__(self) -> None:
        """Refuse what would move everything to where nothing comes back from."""
        checked(self.seed)
        if not abs(self.scale) <= FARTHEST:
            raise ValueError(f"scale: expected a finite float32; got {self.scale}")


def replay_log(space: Space, moves: Sequence[Nudge]) -> None:
    """Make moves one after the other, in place: each rounds, so this equals the run that made them to the bit."""
    for move in filter(lambda move: move.scale, moves):
        space.move(move.seed, move.scale)


def materialise(
    space: Space, coefficients: Tensor, seeds: Sequence[int], out: Sequence[Tensor] | None = None
) -> Sequence[Tensor]:
    """Return w0 + sum over k of coefficients[k] * direction(seeds[k]), rounded once.

    Coefficients are taken to 2^-25 of the largest one of their model, and their sums are made in integers: so neither
    the order of the seeds nor the kernel, the device, the shard or the number of threads changes a bit. The sum is
    added to w0 in float64, and that is rounded to the parameter's type.

    Args:
        space: holds w0.
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
    device = space.parts[0].tensor.device
    many = coefficients.dim() == 2
    if coefficients.shape[-1:] != (len(seeds),) or coefficients.dim() > 2 or (many and not len(coefficients)):
        raise ValueError(
            f"coefficients: expected shape ({len(seeds)},) or (models, {len(seeds)}), one for each seed; "
            f"got {tuple(coefficients.shape)}"
        )
    weights, unit = quantised(coefficients.double() if many else coefficients.double()[None], space.mode)
    models, unit = len(weights), unit[:, None].to(device)
    of_block = [
        [place for place, seed in enumerate(seeds) if seed % space.blocks == block] for block in range(space.blocks)
    ]
    drawn = [seeds_tensor([seeds[place] for place in places], device) for places in of_block]
    chosen = [weights[:, places].contiguous().to(device) for places in of_block]
    shapes = [(models, *part.tensor.shape) if many else tuple(part.tensor.shape) for part in space.parts]
    if out is None:
        out = [part.tensor.new_empty(shape) for part, shape in zip(space.parts, shapes, strict=True)]
    for part, shape, target in zip(space.parts, shapes, out, strict=True):
        if target.shape != shape or target.dtype != part.tensor.dtype or not target.is_contiguous():
            raise ValueError(
                f"out: expected a contiguous tensor of {part.tensor.dtype} and shape {shape} for {part.name}; "
                f"got {target.dtype}, {tuple(target.shape)} with strides {target.stride()}"
            )
    for part, target in zip(space.parts, out, strict=True):
        space.check_writable(part, target)
        base, written = part.tensor.view(-1), target.view(models, part.tensor.numel())
        for piece in pieces(base.numel(), max(1, SUMMED // models)):
            sums = torch.zeros(models, piece.stop - piece.start, dtype=torch.int64, device=device)
            space.kernel.sums(
                space.mode, drawn[part.block], chosen[part.block], part.identity, part.start + piece.start, sums
            )
            moves = sums.double() * (unit * part.scale)
            if part.mask is not None:
                moves *= part.mask.view(-1)[piece]
            written[:, piece] = rounded(moves + base[piece], part.tensor.dtype)
            _check_reach(part, base[piece], written[:, piece], coefficients)
    return out


def _check_reach(part: Part, base: Tensor, written: Tensor, coefficients: Tensor) -> None:
    """Check that what was finite still is.

    Raises:
        ValueError: it is not.
    """
    if not (written.isfinite() | ~base.isfinite()).all():
        raise ValueError(
            f"coefficients: expected finite parameters; the largest, {coefficients.abs().max():g}, takes {part.name} "
            f"beyond {part.tensor.dtype}"
        )
