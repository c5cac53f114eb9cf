"""The kernel in PyTorch operations: slow, and the definition of what the others compute."""

import torch
from torch import Tensor

from raytrain.seeds.kernels.kernel import Drawn
from raytrain.seeds.prng import Mode, direction, units


class ReferenceKernel:
    """NumPy, as the specification is written: to test the others against."""

    name = "reference"
    device = "cpu"
    types = frozenset({torch.float32, torch.bfloat16, torch.float16})

    def sums(self, mode: Mode, seeds: Tensor, weights: Tensor, parameter: int, start: int, out: Tensor) -> None:
        """Add to `out`; see `Kernel.sums`."""
        for place, seed in enumerate(seeds.tolist()):
            drawn = torch.from_numpy(units(mode, seed % 2**64, parameter, start, start + out.shape[1]))
            out += weights[:, place, None].long() * drawn

    def move(self, drawn: Drawn, base: Tensor, out: Tensor, rows: Tensor | None = None) -> None:
        """Write to `out`; see `Kernel.move`."""
        mode, seed, scale, parameter, start = drawn
        numbers = torch.from_numpy(direction(mode, seed, parameter, start, start + base.numel())).view_as(base)
        moved = base.float() + numbers * torch.tensor(scale)
        out.copy_(moved if rows is None else moved[rows])
