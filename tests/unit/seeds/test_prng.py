"""The numbers that a seed stands for: as the papers say, the same on any shard, and what they were in every version."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain.seeds.prng import Distribution, fold_in, fold_in_all, noise, parameter_id, philox, quantised_noise

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "stream.json").read_text())
MODES: tuple[Distribution, ...] = ("rademacher", "gaussian")
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


@pytest.mark.parametrize(
    ("master", "place", "seed"),
    [
        (0, (), 16242730742183356629),
        (2**64 - 1, (1, 2, 3, 4), 9784953660061110917),
        (1234567890123456789, (4095,), 9521613839800962072),
        (7, (0, 2, 1, 1), 12738236117908543719),
    ],
)
def test_seeds_that_follow_from_another_are_what_they_were(master: int, place: tuple[int, ...], seed: int) -> None:
    assert fold_in(master, *place) == seed


@pytest.mark.parametrize("mode", MODES)
@given(U64, U64, st.integers(0, 2**40), st.integers(0, 300), st.data())
def test_a_part_of_a_direction_is_that_part_of_the_whole(
    mode: Distribution, seed: int, parameter: int, start: int, count: int, data: st.DataObject
) -> None:
    whole = noise(mode, seed, parameter, start, start + count)
    first = data.draw(st.integers(0, count))
    last = data.draw(st.integers(first, count))
    assert whole.shape == (count,)
    assert (noise(mode, seed, parameter, start + first, start + last) == whole[first:last]).all()


@pytest.mark.parametrize("mode", MODES)
def test_numbers_have_the_moments_that_they_should(mode: Distribution) -> None:
    count = 1 << 18
    drawn = np.stack([noise(mode, seed, parameter_id(name), 0, count) for seed in (0, 1) for name in "ab"]).astype(
        float
    )
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
    assert parameter_id(case["name"]) == case["identity"]
    start, first = case["start"], case["units"]
    drawn = quantised_noise(case["mode"], case["seed"], case["identity"], start, start + 1_000_000)
    assert drawn[: len(first)].tolist() == first
    assert hashlib.sha256(drawn.astype("<i4").tobytes()).hexdigest() == case["sha256_of_a_million"]


def test_normal_numbers_are_those_of_box_and_muller() -> None:
    words = philox(
        np.stack([np.arange(1000), *np.zeros((3, 1000))], 1).astype(np.uint32), np.array([7, 0], np.uint32)
    ).reshape(-1, 2)
    radius = np.sqrt(-2 * np.log(((words[:, 0] >> 9) + 0.5) / 2**23))
    angle = words[:, 1] * (2 * np.pi / 2**32)
    exact = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
    np.testing.assert_allclose(noise("gaussian", 7, 0, 0, 4000), exact, rtol=0, atol=1e-6)


@given(U64, U64, st.lists(st.integers(0, 2**32 - 1), max_size=4))
def test_derived_seeds_differ_by_master_and_place(master: int, other: int, place: list[int]) -> None:
    seed = fold_in(master, *place)
    assert 0 <= seed < 2**64
    assert seed == fold_in(master, *place, *[0] * (4 - len(place)))
    assert (seed == fold_in(other, *place)) == (master == other)
    assert all(
        fold_in(master, *(number ^ (at == where) for at, number in enumerate(place))) != seed
        for where in range(len(place))
    )


@pytest.mark.parametrize("place", [(1, 2, 3, 4, 5), (2**32,), (0, -1)])
def test_a_place_that_does_not_fit_is_refused_and_not_cut(place: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"position: expected up to four integers from 0 to 2\^32 - 1; got \("):
        fold_in(7, *place)


@given(st.lists(U64, min_size=1, max_size=4), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4))
def test_many_seeds_at_once_are_each_of_them(masters: list[int], places: list[int]) -> None:
    found = fold_in_all(np.array(masters, np.uint64)[:, None], 7, np.array(places, np.int64))
    assert found.tolist() == [[fold_in(master, 7, place) for place in places] for master in masters]
