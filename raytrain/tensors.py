"""Tensor functions shared by several packages: device moves, rounding, digests, seeding."""

import hashlib
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytrain.errors import TrainingError


def to_device(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move the tensors of a nested batch to a device, and floating-point ones to a type."""
    if isinstance(batch, Tensor):
        return batch.to(device, dtype if batch.is_floating_point() else batch.dtype, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device, dtype) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        parts = [to_device(value, device, dtype) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """Return sum over i of weights[i] * losses[i], in float32 at least.

    Raises:
        TrainingError: the shapes differ.
    """
    if losses.shape != weights.shape:
        mean = 'a loss function of torch returns the mean unless reduction="none"'
        way_out = "give Task.weights, or return one for each example" if losses.shape else mean
        raise TrainingError(
            f"Task.losses returned shape {tuple(losses.shape)} where {tuple(weights.shape)} was expected: one loss for "
            "each weight of Task.weights, or one for each example of the batch if the task has no weights; "
            f"{way_out}"
        )
    losses = at_least_float32(losses)
    return torch.dot(losses, weights.to(losses.dtype))


def at_least_float32_type(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or the type itself if it has more bits."""
    return torch.promote_types(dtype, torch.float32)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or unchanged if its type has more bits."""
    return tensor.to(at_least_float32_type(tensor.dtype))


def seed_everything_at(seed: int, *place: int) -> None:
    """Seed Python's, NumPy's and torch's generators for a position, such as (rank, step).

    The random numbers of a step depend on the seed and the position only: (rank, step) for the model, (position, count,
    parts) for its examples. So no generator state is saved, an evaluation in between changes nothing, and a resumed run
    draws the numbers of an uninterrupted one, wherever its examples are prepared.
    """
    mixed = np.random.SeedSequence([seed % 2**64, *place]).generate_state(1, np.uint64).item()
    torch.default_generator.manual_seed(mixed)  # torch.manual_seed queries every accelerator: 100 times slower
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)  # noqa: NPY002 - a user's collate may use the global generator


INTEGER_TYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Size in bytes -> integer type."""


def round_once(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a float64 tensor to a narrower type once, to nearest with ties to even.

    To 16-bit types torch converts by way of float32, which rounds twice. Here that first rounding is to odd, after
    which the second one is right (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums").

    >>> round_once(torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64), torch.bfloat16).item()
    1.0078125
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return tensor.to(dtype)
    near = tensor.float()
    back = near.double()
    toward_zero = torch.where(back.abs() > tensor.abs(), near.nextafter(torch.zeros_like(near)), near)
    return (toward_zero.view(torch.int32) | (back != tensor).int()).view(torch.float32).to(dtype)


def bits_of(tensor: Tensor) -> Tensor:
    """Return a view of a tensor's bits as integers, in which nan equals itself."""
    return tensor.view(INTEGER_TYPES[tensor.element_size()])


def tensor_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of named tensors, in the order of their names; "" for none."""
    total = hashlib.sha256()
    tensors = sorted(named, key=lambda pair: pair[0])
    for name, tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        total.update(name.encode() + b"\0" + values.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest() if tensors else ""


def autocast_type(precision: str) -> torch.dtype | None:
    """Return the type of the forward pass for a recipe's `precision`; None: that of the parameters."""
    return torch.bfloat16 if precision == "bfloat16" else None
