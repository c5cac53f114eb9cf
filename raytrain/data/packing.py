"""Batches packed into bytes for another process: JSON and safetensors, no pickle."""

import json
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from raytrain.serialization import to_savable

Packet = tuple[str, bytes]
"""(containers as JSON, tensors in the format of safetensors)."""


def pack_batch(value: Any) -> Packet:
    """Pack nested dicts, lists, tuples, tensors, arrays, numbers, strings and None into bytes.

    Raises:
        TypeError: it contains another type.
    """
    tensors: dict[str, Tensor] = {}
    shape = json.dumps(_split(value, tensors))
    return shape, save(to_savable(tensors))


def unpack_batch(packet: Packet) -> Any:
    """Unpack what `pack_batch` packed, equal to the bit and in the same containers."""
    shape, content = packet
    return _join(_parsed(shape), load(content))


def _split(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return [kind, content], and add each tensor to `tensors` under a number."""
    if isinstance(value, Tensor | np.ndarray):
        number = str(len(tensors))
        tensors[number] = value if isinstance(value, Tensor) else torch.from_numpy(value.copy())
        return ["tensor" if isinstance(value, Tensor) else "array", number]
    if type(value) is dict:
        return ["dict", [[_split(key, tensors), _split(part, tensors)] for key, part in value.items()]]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_split(part, tensors) for part in value]]
    if value is None or type(value) in (bool, int, float, str):
        return ["plain", value]
    raise TypeError(
        f"a batch can be sent as dicts, lists, tuples, tensors, arrays, numbers and strings; this one has a "
        f"{type(value).__module__}.{type(value).__qualname__} in it: let Task.collate return those"
    )


def _join(shape: Any, tensors: dict[str, Tensor]) -> Any:
    kind, content = shape
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "dict":
        return {_join(key, tensors): _join(part, tensors) for key, part in content}
    if kind == "plain":
        return content
    parts = [_join(part, tensors) for part in content]
    return parts if kind == "list" else tuple(parts)


@lru_cache(maxsize=64)
def _parsed(shape: str) -> Any:
    """Return the parsed JSON, cached: most batches of a task have the same containers."""
    return json.loads(shape)
