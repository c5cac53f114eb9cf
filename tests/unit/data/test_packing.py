"""Batches as bytes: what comes out is what went in, to the bit and in the same containers."""

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.data.packing import pack_batch, unpack_batch

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.int16,
    torch.bool,
]


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    bits = torch.randint(0, 255, (*shape,), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return bits.to(draw(st.sampled_from(DTYPES)))


LEAVES = tensors() | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
BATCHES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@given(BATCHES)
@settings(deadline=None)
def test_what_is_decoded_is_what_was_encoded(batch: Any) -> None:
    assert equal(unpack_batch(pack_batch(batch)), batch)


def test_arrays_stay_arrays() -> None:
    frozen = np.arange(6).reshape(2, 3)[:, ::-1]
    frozen.flags.writeable = False
    batch = {"reversed": frozen, "scalar": np.array(2.5), "empty": np.zeros((0, 3), np.float32)}
    assert equal(unpack_batch(pack_batch(batch)), batch)


def test_tensors_that_share_memory_come_out_equal() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    batch = [whole, whole[1], whole.T, whole.requires_grad_() * 2, whole[:0]]
    assert equal(unpack_batch(pack_batch(batch)), [part.detach() for part in batch])


@pytest.mark.parametrize("value", [object(), {1, 2}, namedtuple("Pair", "a b")(1, 2), np.float32(1)])
def test_what_cannot_be_sent_is_refused(value: Any) -> None:
    with pytest.raises(TypeError) as caught:
        pack_batch([({"x": value}, 3)])
    kind = type(value)
    assert str(caught.value) == (
        "a batch can be sent as dicts, lists, tuples, tensors, arrays, numbers and strings; this one has a "
        f"{kind.__module__}.{kind.__qualname__} in it: let Task.collate return those"
    )
