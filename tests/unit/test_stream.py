"""The numbers that a seed stands for: as the papers say, the same on any shard, and what they were in every version."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from raytrain.seeds.stream import gaussian, identity, philox, rademacher

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "stream.json").read_text())
Draw = Callable[[int, int, int, int], NDArray[Any]]
MODES: dict[str, Draw] = {"rademacher": rademacher, "gaussian": gaussian}
U64 = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_words_are_those_that_the_authors_of_philox_publish(counter: str, key: str, expected: str) -> None:
    numbers = [np.array([int(word, 16) for word in words.split()], np.uint32) for words in (counter, key, expected)]
    assert (philox(numbers[0], numbers[1]) == numbers[2]).all()


@pytest.mark.parametrize("mode", MODES)
@given(U64, U64, st.integers(0, 2**40), st.integers(0, 300), st.data())
def test_a_part_of_a_direction_is_that_part_of_the_whole(
    mode: str, seed: int, parameter: int, start: int, count: int, data: st.DataObject
) -> None:
    whole = MODES[mode](seed, parameter, start, start + count)
    first = data.draw(st.integers(0, count))
    last = data.draw(st.integers(first, count))
    assert whole.shape == (count,)
    assert (MODES[mode](seed, parameter, start + first, start + last) == whole[first:last]).all()


@pytest.mark.parametrize("mode", MODES)
def test_numbers_have_the_moments_that_they_should(mode: str) -> None:
    count = 1 << 18
    drawn = np.stack([MODES[mode](seed, identity(name), 0, count) for seed in (0, 1) for name in "ab"]).astype(float)
    bound = 5 / count**0.5
    fourth = {"rademacher": 1.0, "gaussian": 3.0}[mode]
    assert np.abs(drawn.mean(1)).max() < bound
    assert np.abs((drawn**2).mean(1) - 1).max() < 1.5 * bound
    assert np.abs((drawn**4).mean(1) - fourth).max() < 10 * bound
    between = drawn @ drawn.T / count - np.eye(len(drawn))
    assert np.abs(between[~np.eye(len(drawn), dtype=bool)]).max() < bound
    for lag in (1, 2, 4, 32, 128):
        assert np.abs((drawn[:, lag:] * drawn[:, :-lag]).mean(1)).max() < 1.1 * bound


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['mode']}-{case['seed']}-{case['start']}")
def test_a_seed_means_what_it_always_did(case: dict[str, Any]) -> None:
    assert identity(case["name"]) == case["identity"]
    start, numbers = case["start"], case["numbers"]
    drawn = MODES[case["mode"]](case["seed"], case["identity"], start, start + len(numbers))
    np.testing.assert_allclose(drawn, numbers, rtol=0, atol=0 if case["mode"] == "rademacher" else 1e-6)
