import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain.data.sampler import Sampler

sizes = st.integers(1, 400)
seeds = st.integers(-(2**70), 2**70)


@given(sizes, seeds, st.integers(0, 10**9))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(Sampler(size, seed).indices(epoch * size, size)) == list(range(size))


@given(sizes, seeds, st.integers(0, 10**6), st.lists(st.integers(0, 50), max_size=8))
def test_any_cut_of_the_positions_gives_the_same_order(size: int, seed: int, start: int, cuts: list[int]) -> None:
    sampler = Sampler(size, seed)
    whole = sampler.indices(start, sum(cuts))
    pieces = [sampler.indices(start + sum(cuts[:place]), count) for place, count in enumerate(cuts)]
    assert np.array_equal(whole, np.concatenate([np.array([], np.int64), *pieces]))


def test_two_workers_take_what_one_would() -> None:
    sampler, batch = Sampler(37, 5), 4
    one = [sampler.indices(step * 2 * batch, 2 * batch) for step in range(30)]
    two = [
        np.concatenate([sampler.indices(step * 2 * batch + rank * batch, batch) for rank in range(2)])
        for step in range(30)
    ]
    assert np.array_equal(one, two)


@pytest.mark.parametrize("size", [10, 64, 1000])
def test_orders_look_random(size: int) -> None:
    """Chi-square over many epochs: where the first example goes, and how far apart two neighbours land."""
    epochs = 200_000 // size
    orders = Sampler(size, 7).indices(0, epochs * size).reshape(epochs, size)
    steps = (orders[:, 1] - orders[:, 0]) % size
    for counts, expected in (
        (np.bincount(orders[:, 0], minlength=size), epochs / size),
        (np.bincount(steps, minlength=size)[1:], epochs / (size - 1)),
    ):
        per_freedom = ((counts - expected) ** 2 / expected).sum() / (len(counts) - 1)
        assert per_freedom < 1 + 5 * np.sqrt(2 / (len(counts) - 1))


def test_seeds_and_epochs_differ() -> None:
    first = Sampler(100, 0).indices(0, 100)
    assert not np.array_equal(first, Sampler(100, 1).indices(0, 100))
    assert not np.array_equal(first, Sampler(100, 0).indices(100, 100))


def test_no_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="size: expected at least 1 example; got 0"):
        Sampler(0, 0)
