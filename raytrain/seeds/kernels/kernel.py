"""Noise kernels: generate and accumulate directions, to the bit as prng.py specifies."""

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
"""Weights of accumulated sums are integers below 2^25 in magnitude."""


class ScaledDirection(NamedTuple):
    """scale * noise of one parameter, from element `offset` on.

    Attributes:
        distribution: of the noise.
        seed: unsigned 64-bit seed.
        scale: factor, a float32.
        parameter_id: of the parameter.
        offset: flat index of the first element.
    """

    distribution: Distribution
    seed: int
    scale: float
    parameter_id: int
    offset: int = 0


class Kernel(Protocol):
    """Generates noise on one type of device.

    Attributes:
        name: key in `KERNELS`.
        device: type of device of its tensors.
        dtypes: types of tensors that `axpy` supports.
    """

    name: str
    device: str
    dtypes: frozenset[torch.dtype]

    def accumulate(
        self, distribution: Distribution, seeds: Tensor, weights: Tensor, parameter_id: int, offset: int, out: Tensor
    ) -> None:
        """Add sum over k of weights[m, k] * noise(seeds[k])[offset + i], in units, to out[m, i].

        Args:
            distribution: of the noise.
            seeds: int64, shape (k,), contiguous, the bits of unsigned integers.
            weights: int32, shape (m, k), contiguous, below 2^25 in magnitude.
            parameter_id: of the parameter.
            offset: flat index of the first element.
            out: int64, shape (m, n), contiguous.
        """
        ...

    def axpy(self, direction: ScaledDirection, base: Tensor, out: Tensor, rows: Tensor | None = None) -> None:
        """Write base + scale * noise to `out`, rounding product and sum to float32, then to the type.

        Args:
            direction: noise and scale; its offset is that of the first element of `base`.
            base: contiguous.
            out: like `base`, and possibly `base` itself; with `rows`, one row for each of them.
            rows: int64, contiguous; only these rows of `base` along its first dimension. They are not bounds-checked.
        """
        ...


@cache
def load_kernel(name: str) -> Kernel:
    """Load the kernel of this name.

    Raises:
        RecipeError: there is none.
        RaytrainError: it does not run on this machine.
    """
    kernel: Kernel = resolve(KERNELS, name, "kernel")()
    return kernel


@cache
def fastest_kernel(device: str) -> Kernel:
    """Return the fastest kernel that runs here for a type of device, such as "cpu".

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
    """Return for each kernel whether it is in use, or why not, as `raytrain list` shows."""
    found = {}
    for name in KERNELS:
        try:
            kernel = load_kernel(name)
        except RaytrainError as error:
            found[name] = f"unavailable: {error}"
            continue
        used = name in PREFERRED_KERNELS.get(kernel.device, ()) and fastest_kernel(kernel.device) is kernel
        found[name] = f"in use on {kernel.device}" if used else ""
    return found


def seeds_tensor(seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return seeds as kernels take them: int64 with the bits of unsigned 64-bit integers."""
    signed = [seed - 2**64 if validate_seed(seed) >= 2**63 else seed for seed in seeds]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def quantise(coefficients: Tensor, distribution: Distribution) -> tuple[Tensor, Tensor]:
    """Return (weights, unit) with coefficients = weights * unit, up to 2^-25 of the largest of a row.

    Args:
        coefficients: float64, shape (..., k).
        distribution: whose unit of noise is included in `unit`.

    Returns:
        weights: int32, shape (..., k), below 2^25 in magnitude.
        unit: float64, shape (...), powers of two.

    Raises:
        ValueError: a coefficient is not finite.
    """
    if not torch.isfinite(coefficients).all():
        odd = coefficients[~torch.isfinite(coefficients)][0]
        raise ValueError(f"coefficients: expected finite numbers; got {odd:g}")
    largest = coefficients.abs().amax(-1) if coefficients.shape[-1] else coefficients.sum(-1)
    exponents = torch.frexp(largest).exponent.clamp(min=WEIGHT_BITS - 1000)  # so that units stay normal float64 numbers
    unit = torch.ldexp(torch.ones_like(largest), exponents - WEIGHT_BITS)
    limit = 2**WEIGHT_BITS - 1  # the largest may round up to 2^25
    weights = (coefficients / unit[..., None]).round().clamp(-limit, limit).int()
    return weights, unit * UNITS[distribution]
