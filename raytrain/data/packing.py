"""Batches as bytes, to send them from one process to another: JSON for the containers, safetensors for the tensors."""

import json
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from raytrain.serialization import to_savable

Packet = tuple[str, bytes]
"""The containers, as JSON, and the tensors that are in them, in the form of safetensors."""


def pack_batch(value: Any) -> Packet:
    """Return dicts, lists, tuples, tensors, arrays, numbers, strings and None, nested, as bytes.

    Raises:
        TypeError: there is something else in it.
    """
    tensors: dict[str, Tensor] = {}
    shape = json.dumps(_taken_apart(value, tensors))
    return shape, save(to_savable(tensors))


def unpack_batch(packet: Packet) -> Any:
    """Return what `pack_batch` took, equal to the bit and in the same containers."""
    shape, content = packet
    return _put_together(_parsed(shape), load(content))


def _taken_apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return [kind, content], and put each tensor among `tensors` under a number that stands for it."""
    if isinstance(value, Tensor | np.ndarray):
        number = str(len(tensors))
        tensors[number] = value if isinstance(value, Tensor) else torch.from_numpy(value.copy())
        return ["tensor" if isinstance(value, Tensor) else "array", number]
    if type(value) is dict:
        return ["dict", [[_taken_apart(key, tensors), _taken_apart(part, tensors)] for key, part in value.items()]]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_taken_apart(part, tensors) for part in value]]
    if value is None or type(value) in (bool, int, float, str):
        return ["plain", value]
    raise TypeError(
        f"a batch can be sent as dicts, lists, tuples, tensors, arrays, numbers and strings; this one has a "
        f"{type(value).__module__}.{type(value).__qualname__} in it: let Task.collate return those"
    )


def _put_together(shape: Any, tensors: dict[str, Tensor]) -> Any:
    kind, content = shape
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "dict":
        return {_put_together(key, tensors): _put_together(part, tensors) for key, part in content}
    if kind == "plain":
        return content
    parts = [_put_together(part, tensors) for part in content]
    return parts if kind == "list" else tuple(parts)


@lru_cache(maxsize=64)
def _parsed(shape: str) -> Any:
    """Return the parsed JSON, which is the same for most batches of a task."""
    return json.loads(shape)
