from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from raytrain.errors import CheckpointError
from raytrain.serialization import (
    canonical_json,
    find_non_finite,
    join_tensors,
    pack,
    split_tensors,
    state_to_device,
    to_savable,
    unpack,
)

tensors = st.sampled_from(
    [
        torch.arange(6).view(2, 3),
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.randn(4).bfloat16(),
        torch.randn(4, 2, dtype=torch.float64).T,
    ]
)
plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text().filter(lambda s: s[:7] != "tensor:")
)
states = st.recursive(
    plain | tensors,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet="ab/.1", max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other and type(one) is type(other))


@given(st.dictionaries(st.sampled_from("abc"), states, max_size=3))
def test_joining_what_was_split_gives_it_back(state: dict[str, Any]) -> None:
    skeleton, found = split_tensors(state)
    assert same(join_tensors(skeleton, found), state)
    canonical_json(skeleton)  # is JSON


@given(st.dictionaries(st.sampled_from("abc"), states, max_size=3))
def test_a_packed_state_is_unpacked_and_equal_states_have_equal_bytes(state: dict[str, Any]) -> None:
    packed = pack(state)
    assert same(unpack(packed), state)
    assert pack(unpack(packed)) == packed


PACKED = pack({"model": {"w": torch.arange(6.0).view(2, 3)}, "step": 3})


@given(st.integers(0, len(PACKED) - 1), st.integers(0, 255), st.integers(0, len(PACKED)))
def test_what_is_no_packed_state_is_refused(place: int, byte: int, length: int) -> None:
    """A changed value can pass, as no digest is in it: whoever keeps packed states names them by theirs."""
    damaged = (PACKED[:place] + bytes([byte]) + PACKED[place + 1 :])[:length]
    with suppress(CheckpointError):  # and no other error
        unpack(damaged)


def test_a_packed_state_has_the_tensors_that_it_speaks_of() -> None:
    other = PACKED.replace(b"tensor:model/w", b"tensor:model/x")
    with pytest.raises(CheckpointError, match=r"^a packed state cannot be read: ValueError: its skeleton speaks of"):
        unpack(other)


def test_keys_with_slashes_do_not_collide() -> None:
    with pytest.raises(TypeError, match="state at the top: two tensors at 'a/b'"):
        split_tensors({"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {1: 2}}, "state at a: expected string keys; got 1"),
        ({"a": [{"b": object()}]}, "state at a/0/b: cannot be saved without pickle: object"),
        ("tensor:x", "state at the top: cannot be saved without pickle: str"),
    ],
)
def test_what_only_pickle_could_save_is_refused(state: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        split_tensors(state)


def test_shared_memory_is_saved_apart() -> None:
    base = torch.randn(4, 4)
    ready = to_savable({"a": base, "b": base, "row": base[1], "turned": base.T})
    storages = [tensor.untyped_storage().data_ptr() for tensor in ready.values()]
    assert len(set(storages)) == 4
    assert torch.equal(ready["turned"], base.T)
    assert torch.equal(ready["row"], base[1])


def test_finite_names_the_culprit() -> None:
    good = {"a": torch.ones(2), "n": torch.tensor([1, 2])}
    mask = torch.tensor([0.0, float("-inf"), float("nan")])
    assert find_non_finite(good, {}) is None
    assert find_non_finite({**good, "b": torch.tensor([0.0, float("nan")])}, {}) == "b"
    assert find_non_finite({**good, "c": torch.tensor([float("-inf")])}, {"mask": mask}) == "c"
    assert find_non_finite({**good, "mask": mask.clone()}, {"mask": mask}) is None
    assert find_non_finite({**good, "mask": mask.flip(0)}, {"mask": mask}) == "mask"


def test_nested_state_goes_to_a_device_and_the_rest_of_it_stays() -> None:
    state = {"a": [torch.ones(2), 3, None], "b": {"c": torch.ones(1)}, "d": "x"}
    there = state_to_device(state, torch.device("meta"))
    assert (there["a"][0].device.type, there["b"]["c"].device.type) == ("meta", "meta")
    assert (there["a"][1:], there["d"]) == ([3, None], "x")


def test_a_sum_over_what_was_loaded_rounds_as_over_what_it_was_saved_from(tmp_path: Path) -> None:
    """A file puts a tensor at any place in memory, and a dot product takes what is aligned in other groups."""
    saved = {f"{size}": torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in range(60, 90)}
    save_file({"odd": torch.ones(1), **saved}, tmp_path / "file")
    loaded = state_to_device(load_file(tmp_path / "file"), torch.device("cpu"))
    for name, value in saved.items():
        other = torch.randn(len(value), generator=torch.Generator().manual_seed(1))
        assert loaded[name].dot(other).item() == value.dot(other).item()
        assert loaded[name].data_ptr() % 64 == 0
