"""Bits of tensors: what they are known by, and how they become fewer."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes."""


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
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
    return tensor.view(INTEGERS[tensor.element_size()])


def digest_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of tensors and their names; "" without any."""
    total = hashlib.sha256()
    tensors = sorted(named, key=lambda pair: pair[0])
    for name, tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        total.update(name.encode() + b"\0" + values.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest() if tensors else ""
