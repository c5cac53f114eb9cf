"""Nested state split into tensors (safetensors) and a JSON skeleton; no pickle."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from raytrain.errors import CheckpointError
from raytrain.tensors import bits_of

MARK = "tensor:"
SKELETON = "state"
"""The field of a packed state's header that holds all but its tensors."""


def split_tensors(state: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Split nested state into a skeleton with a mark in place of each tensor, and path -> tensor.

    Args:
        state: dicts with string keys, lists, tuples, numbers, strings, None and tensors, nested.
        path: path of `state` inside a larger one.

    Raises:
        TypeError: it contains another type, or a string that looks like a mark.

    >>> split_tensors({"step": 3, "scale": [1.0, "x"]})
    ({'step': 3, 'scale': [1.0, 'x']}, {})
    """
    if isinstance(state, Tensor):
        return MARK + path, {path: state}
    if isinstance(state, Mapping):
        if wrong := [key for key in state if not isinstance(key, str)]:
            raise TypeError(f"state at {path or 'the top'}: expected string keys; got {wrong[0]!r}")
        parts = {key: split_tensors(value, f"{path}/{key}" if path else key) for key, value in state.items()}
        return {key: part[0] for key, part in parts.items()}, _union((part[1] for part in parts.values()), path)
    if isinstance(state, list | tuple):
        rows = [split_tensors(value, f"{path}/{place}") for place, value in enumerate(state)]
        return [row[0] for row in rows], _union((row[1] for row in rows), path)
    if (
        state is None
        or isinstance(state, bool | int | float)
        or (isinstance(state, str) and not state.startswith(MARK))
    ):
        return state, {}
    raise TypeError(f"state at {path or 'the top'}: cannot be saved without pickle: {type(state).__name__}")


def _union(parts: Iterable[Mapping[str, Tensor]], path: str) -> dict[str, Tensor]:
    union: dict[str, Tensor] = {}
    for part in parts:
        if twice := union.keys() & part.keys():
            raise TypeError(f"state at {path or 'the top'}: two tensors at {min(twice)!r}")
        union |= part
    return union


def join_tensors(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Join a skeleton and its tensors to the state that `split_tensors` split; tuples come back as lists."""
    if isinstance(skeleton, str) and skeleton.startswith(MARK):
        return tensors[skeleton.removeprefix(MARK)]
    if isinstance(skeleton, dict):
        return {key: join_tensors(value, tensors) for key, value in skeleton.items()}
    if isinstance(skeleton, list):
        return [join_tensors(value, tensors) for value in skeleton]
    return skeleton


def tensor_paths(skeleton: Any) -> set[str]:
    """Return the paths of the tensors that a skeleton refers to."""
    if isinstance(skeleton, str):
        return {skeleton.removeprefix(MARK)} if skeleton.startswith(MARK) else set()
    inner = skeleton.values() if isinstance(skeleton, dict) else skeleton if isinstance(skeleton, list) else ()
    return set().union(*(tensor_paths(value) for value in inner))


def to_savable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors requires them: contiguous, on the CPU, without shared memory."""
    seen: set[int] = set()
    ready = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().nbytes() != plain.nbytes or (plain.nbytes and plain.data_ptr() in seen):
            plain = plain.clone()
        seen.add(plain.data_ptr())
        ready[name] = plain
    return ready


def pack(state: Any) -> bytes:
    """Return nested state as the bytes of a safetensors file, the same bytes for the same state.

    Raises:
        TypeError: there is something in it that cannot be saved without pickle.
    """
    skeleton, tensors = split_tensors(state)
    return save(to_savable(tensors), {SKELETON: canonical_json(skeleton).decode()})


def unpack(packed: bytes) -> Any:
    """Return the state that `pack` was given; tuples come back as lists.

    Raises:
        CheckpointError: the bytes are none that `pack` returns.
    """
    try:
        length = int.from_bytes(packed[:8], "little")
        skeleton = json.loads(json.loads(packed[8 : 8 + length])["__metadata__"][SKELETON])
        tensors = load(packed)
        if tensor_paths(skeleton) != tensors.keys():
            raise ValueError("its skeleton speaks of other tensors than it holds")
        return join_tensors(skeleton, tensors)
    except (SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"a packed state cannot be read: {type(error).__name__}: {error}") from error


def state_to_device(state: Any, device: torch.device) -> Any:
    """Copy the tensors of nested state to a device.

    They are copied even on the same device: tensors in a file's memory are aligned otherwise, and sums over them may
    round otherwise.
    """
    if isinstance(state, Tensor):
        return state.to(device, copy=True)
    if isinstance(state, Mapping):
        return {key: state_to_device(value, device) for key, value in state.items()}
    return [state_to_device(value, device) for value in state] if isinstance(state, list | tuple) else state


def find_non_finite(tensors: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor with a value that is not finite, or None.

    Args:
        tensors: by name.
        constants: by name, accepted to the bit whether finite or not, such as an attention mask of -inf.
    """
    for name, tensor in tensors.items():
        same = name in constants and torch.equal(bits_of(tensor), bits_of(constants[name]))
        if not same and not torch.isfinite(tensor).all():
            return name
    return None


def canonical_json(skeleton: Any) -> bytes:
    """Return a skeleton as canonical JSON."""
    return json.dumps(skeleton, sort_keys=True).encode()
