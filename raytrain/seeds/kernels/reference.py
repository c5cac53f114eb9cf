"""The reference kernel: slow, and the specification that the others are tested against."""

import torch
from torch import Tensor

from raytrain.seeds.kernels.kernel import ScaledDirection
from raytrain.seeds.prng import Distribution, noise, quantised_noise


class ReferenceKernel:
    """Noise from prng.py, summed in PyTorch."""

    name = "reference"
    device = "cpu"
    dtypes = frozenset({torch.float32, torch.bfloat16, torch.float16})

    def accumulate(
        self, distribution: Distribution, seeds: Tensor, weights: Tensor, parameter_id: int, offset: int, out: Tensor
    ) -> None:
        """Accumulate into `out`; see `Kernel.accumulate`."""
        for place, seed in enumerate(seeds.tolist()):
            drawn = torch.from_numpy(
                quantised_noise(distribution, seed % 2**64, parameter_id, offset, offset + out.shape[1])
            )
            out += weights[:, place, None].long() * drawn

    def axpy(self, direction: ScaledDirection, base: Tensor, out: Tensor, rows: Tensor | None = None) -> None:
        """Write to `out`; see `Kernel.axpy`."""
        mode, seed, scale, parameter, start = direction
        values = torch.from_numpy(noise(mode, seed, parameter, start, start + base.numel())).view_as(base)
        perturbed = base.float() + values * torch.tensor(scale)
        out.copy_(perturbed if rows is None else perturbed[rows])
