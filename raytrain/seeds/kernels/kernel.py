"""Kernels: what draws directions and adds many of them up. All give the bits that prng.py defines."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from raytrain.errors import RaytrainError, RecipeError
from raytrain.registry import resolve, suggest
from raytrain.seeds.options import KERNELS
from raytrain.seeds.prng import UNITS, Distribution, validate_seed

PREFERRED_KERNELS = {"cpu": ("native", "numba"), "cuda": ("triton",)}

WEIGHT_BITS = 25
"""Weights of sums are integers below 2^25 in magnitude."""


class ScaledDirection(NamedTuple):
    """What a kernel draws, and how far it goes.

    Attributes:
        distribution: what a seed stands for.
        seed: 64 bits, without sign.
        scale: a float32, by which numbers are multiplied.
        parameter_id: its identity.
        offset: the first element.
    """

    distribution: Distribution
    seed: int
    scale: float
    parameter_id: int
    offset: int = 0


class Kernel(Protocol):
    """Draws directions on one kind of device.

    Attributes:
        name: in the table.
        device: the type of device that its tensors are on.
        dtypes: of the tensors that `move` takes.
    """

    name: str
    device: str
    dtypes: frozenset[torch.dtype]

    def accumulate(
        self, distribution: Distribution, seeds: Tensor, weights: Tensor, parameter_id: int, offset: int, out: Tensor
    ) -> None:
        """Add to out[m, i] the sum over k of weights[m, k] * (number of element start + i for seeds[k]), in units.

        Args:
            distribution: what a seed stands for.
            seeds: int64, shape (k,), contiguous, the bits of unsigned numbers.
            weights: int32, shape (m, k), contiguous, below 2^25 in magnitude.
            parameter_id: its identity.
            offset: the first element.
            out: int64, shape (m, n), contiguous.
        """
        ...

    def axpy(self, direction: ScaledDirection, base: Tensor, out: Tensor, rows: Tensor | None = None) -> None:
        """Write base + scale * direction to `out`: product and sum are rounded to float32, the sum then to the type.

        Args:
            direction: the direction, its scale, and the element that `base` starts with.
            base: contiguous.
            out: like `base`, which it may be, or with `rows` a row for each of them.
            rows: int64, contiguous; take only these rows of `base`, along its first dimension. They must be there: a
                kernel does not look.
        """
        ...


@cache
def load_kernel(name: str) -> Kernel:
    """Return the kernel of this name.

    Raises:
        RecipeError: there is none.
        RaytrainError: this machine cannot have it.
    """
    kernel: Kernel = resolve(KERNELS, name, "kernel")()
    return kernel


@cache
def fastest_kernel(device: str) -> Kernel:
    """Return the fastest kernel that this machine has for a type of device, as "cpu".

    Raises:
        RecipeError: there is none.
    """
    reasons = []
    for name in PREFERRED_KERNELS.get(device, ()):
        try:
            return load_kernel(name)
        except RaytrainError as error:
            reasons.append(f"{name}: {error}")
    raise RecipeError(
        f"resources: seeds need a kernel for {device!r} devices, and none works "
        f"({'; '.join(reasons) or 'none is known'}); {suggest(device, PREFERRED_KERNELS)}"
    )


def kernel_status() -> dict[str, str]:
    """Return for each kernel whether it is used, or why not, as `raytrain list` shows."""
    found = {}
    for name in KERNELS:
        try:
            kernel = load_kernel(name)
        except RaytrainError as error:
            found[name] = f"not here: {error}"
            continue
        used = name in PREFERRED_KERNELS.get(kernel.device, ()) and fastest_kernel(kernel.device) is kernel
        found[name] = f"in use on {kernel.device}" if used else ""
    return found


def seeds_tensor(seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return seeds as kernels take them: the bits of 64-bit numbers without sign."""
    signed = [seed - 2**64 if validate_seed(seed) >= 2**63 else seed for seed in seeds]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def quantise(coefficients: Tensor, distribution: Distribution) -> tuple[Tensor, Tensor]:
    """Return integer weights and their units, so that weights * unit is coefficients to 2^-25 of the largest of a row.

    Args:
        coefficients: float64, shape (..., k).
        distribution: whose unit is part of those returned.

    Returns:
        int32, below 2^25 in magnitude, like `coefficients`; what one of them stands for in each row, a power of two,
        float64, shape (...).

    Raises:
        ValueError: a coefficient is not finite.
    """
    if not torch.isfinite(coefficients).all():
        odd = coefficients[~torch.isfinite(coefficients)][0]
        raise ValueError(f"coefficients: expected finite numbers; got {odd:g}")
    largest = coefficients.abs().amax(-1) if coefficients.shape[-1] else coefficients.sum(-1)
    exponents = torch.frexp(largest).exponent.clamp(min=WEIGHT_BITS - 1000)  # far above where units vanish
    unit = torch.ldexp(torch.ones_like(largest), exponents - WEIGHT_BITS)
    limit = 2**WEIGHT_BITS - 1  # the largest may round up to a power of two
    weights = (coefficients / unit[..., None]).round().clamp(-limit, limit).int()
    return weights, unit * UNITS[distribution]
