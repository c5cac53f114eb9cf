"""Small things done to tensors in more than one place."""

import hashlib
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytrain.errors import TrainingError


def to_device(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return `batch` with its tensors on `device`, and those of floats as `dtype`; containers keep their shape."""
    if isinstance(batch, Tensor):
        return batch.to(device, dtype if batch.is_floating_point() else batch.dtype, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device, dtype) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        parts = [to_device(value, device, dtype) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """Return sum of weight * loss, at least in float32.

    Raises:
        TrainingError: there are not as many losses as weights.
    """
    if losses.shape != weights.shape:
        raise TrainingError(
            f"Task.losses returned shape {tuple(losses.shape)} where {tuple(weights.shape)} was expected: one loss for "
            "each weight of Task.weights, or one for each example of the batch if the task has no weights"
        )
    losses = at_least_float32(losses)
    return torch.dot(losses, weights.to(losses.dtype))


def at_least_float32_type(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or the type itself if it is wider."""
    return torch.promote_types(dtype, torch.float32)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or as it is if it is wider."""
    return tensor.to(at_least_float32_type(tensor.dtype))


def seed_everything_at(seed: int, *place: int) -> None:
    """Seed the generators that dropout, augmentation and the like draw from.

    What a step draws depends on the seed and its place alone: (rank, step) for the model, (position, count, parts) for
    its examples. So there is no random state to save, an evaluation in between changes nothing, and a resumed run draws
    what the uninterrupted one would, wherever its examples are prepared.
    """
    mixed = np.random.SeedSequence([seed % 2**64, *place]).generate_state(1, np.uint64).item()
    torch.default_generator.manual_seed(mixed)  # torch.manual_seed also asks after every accelerator: 100 times slower
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)  # noqa: NPY002 - what a user's collate may draw from


INTEGER_TYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes."""


def round_once(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a float64 tensor in a narrower type, rounded once, to the nearest and then to even.

    Below 32 bits torch goes through float32, which would round twice; here that first step rounds to odd, which leaves
    what the second one needs to know (Boldo and Melquiond 2008).
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return tensor.to(dtype)
    near = tensor.float()
    back = near.double()
    toward_zero = torch.where(back.abs() > tensor.abs(), near.nextafter(torch.zeros_like(near)), near)
    return (toward_zero.view(torch.int32) | (back != tensor).int()).view(torch.float32).to(dtype)


def bits_of(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor's numbers as integers, in the same memory: also nan equals itself there."""
    return tensor.view(INTEGER_TYPES[tensor.element_size()])


def tensor_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of tensors and their names; "" without any."""
    total = hashlib.sha256()
    tensors = sorted(named, key=lambda pair: pair[0])
    for name, tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        total.update(name.encode() + b"\0" + values.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest() if tensors else ""
