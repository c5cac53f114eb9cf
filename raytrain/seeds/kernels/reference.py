"""The kernel in PyTorch operations: slow, and the definition of what the others compute."""

import torch
from torch import Tensor

from raytrain.seeds.kernels.kernel import ScaledDirection
from raytrain.seeds.prng import Distribution, noise, quantised_noise


class ReferenceKernel:
    """NumPy, as the specification is written: to test the others against."""

    name = "reference"
    device = "cpu"
    dtypes = frozenset({torch.float32, torch.bfloat16, torch.float16})

    def accumulate(
        self, distribution: Distribution, seeds: Tensor, weights: Tensor, parameter_id: int, offset: int, out: Tensor
    ) -> None:
        """Add to `out`; see `Kernel.sums`."""
        for place, seed in enumerate(seeds.tolist()):
            drawn = torch.from_numpy(
                quantised_noise(distribution, seed % 2**64, parameter_id, offset, offset + out.shape[1])
            )
            out += weights[:, place, None].long() * drawn

    def axpy(self, direction: ScaledDirection, base: Tensor, out: Tensor, rows: Tensor | None = None) -> None:
        """Write to `out`; see `Kernel.move`."""
        mode, seed, scale, parameter, start = direction
        numbers = torch.from_numpy(noise(mode, seed, parameter, start, start + base.numel())).view_as(base)
        moved = base.float() + numbers * torch.tensor(scale)
        out.copy_(moved if rows is None else moved[rows])
