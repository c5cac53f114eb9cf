"""Draws of a federated run: each follows from its place alone, and has the distribution that it should."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from federated.sampling import batches, common_seeds, important_directions, participants, pool_directions, pool_seeds
from raytrain.seeds.prng import fold_in
from raytrain.seeds.seed_model import SeedModel

masters, rounds, clients = st.integers(0, 2**63 - 1), st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)


@given(masters, rounds, st.integers(1, 2_000_000), st.data())
def test_participants_are_different_clients_in_order(master: int, number: int, total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, min(total, 50)))
    drawn = participants(master, number, total, count)
    assert len(set(drawn.tolist())) == count
    assert (np.diff(drawn) > 0).all()
    assert drawn[0] >= 0
    assert drawn[-1] < total


def test_all_clients_take_part_equally_often() -> None:
    counts = np.bincount(np.concatenate([participants(3, number, 50, 10) for number in range(500)]), minlength=50)
    assert abs(counts - 100).max() < 5 * 100**0.5


@given(masters, rounds, clients, st.integers(1, 2**16))
def test_directions_are_those_of_the_specification(master: int, number: int, client: int, pool: int) -> None:
    """k = D(D(master, 1), round, client, step) mod K, and s = D(D(master, 4), round, step), D being `fold_in`."""
    drawn = pool_directions(master, number, client, 3, pool)
    assert drawn.tolist() == [fold_in(fold_in(master, 1), number, client, step) % pool for step in range(3)]
    seeds = common_seeds(master, number, np.arange(3))
    assert seeds.tolist() == [fold_in(fold_in(master, 4), number, step) for step in range(3)]
    assert tuple(pool_seeds(master, 5).tolist()) == SeedModel.from_pool("", master, 5).seeds


@given(masters, rounds, clients, st.integers(1, 60), st.integers(1, 12))
def test_batches_have_all_examples_before_any_comes_again(
    master: int, number: int, client: int, examples: int, batch: int
) -> None:
    drawn = batches(master, number, client, examples, 20, batch)
    assert drawn.shape == (20, batch)
    others = [
        batches(*place, examples, 20, batch) for place in ((master + 1, number, client), (master, number ^ 1, client))
    ]
    others.append(batches(master, number, client ^ 1, examples, 20, batch))
    assert examples < 5 or not any(np.array_equal(drawn, other) for other in others)
    flat = drawn.reshape(-1)
    for start in range(0, len(flat), examples):
        once = flat[start : start + examples].tolist()
        assert len(set(once)) == len(once)
        assert set(once) <= set(range(examples))


@given(masters, st.lists(st.floats(0, 1), min_size=1, max_size=30).filter(any))
def test_important_directions_follow_their_probabilities(master: int, weights: list[float]) -> None:
    likely = np.array(weights) / sum(weights)
    drawn = important_directions(master, 1, 2, 2000, likely)
    shares = np.bincount(drawn, minlength=len(weights)) / 2000
    assert (shares[likely == 0] == 0).all()
    assert np.abs(shares - likely).max() < 5 * 0.5 / 2000**0.5
