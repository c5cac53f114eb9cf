"""Partitions: disjoint and complete, or they say that they draw; equal to those of flwr-datasets where it has them."""

import tracemalloc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.partition import (
    DirichletOptions,
    Partition,
    PartitionOptions,
    ShardsOptions,
    dirichlet,
    domain,
    iid,
    label_counts,
    make_partition,
    shards,
)
from raytrain.errors import RecipeError


class Labelled(list[int]):
    """Examples that are their labels; a label is a domain too."""

    def label(self, index: int) -> int:
        return self[index]

    def domain(self, index: int) -> str:
        return f"speaker {self[index]}"


def labelled(total: int, labels: int = 5, seed: int = 0) -> Labelled:
    return Labelled(np.random.default_rng(seed).integers(labels, size=total).tolist())


def made(name: str, examples: Any, clients: int, seed: int = 0, **options: Any) -> Partition:
    return make_partition(name, examples, clients, seed=seed, **options)


def all_of(partition: Partition) -> list[list[int]]:
    return [sorted(partition.indices(client).tolist()) for client in range(partition.clients)]


@settings(max_examples=60)
@given(
    st.sampled_from(
        [("iid", s) for s in ("equal", "zipf", "lognormal")] + [("dirichlet", "equal"), ("shards", "equal")]
    ),
    st.integers(1, 20),
    st.integers(0, 60),
    st.integers(1, 3),
    st.integers(0, 2**63),
)
def test_every_example_belongs_to_one_client(
    kind: tuple[str, str], clients: int, more: int, minimum: int, seed: int
) -> None:
    name, sizes = kind
    examples = labelled(2 * clients * minimum + more)
    options = {"sizes": sizes, "minimum": minimum, **({"alpha": 0.1} if name == "dirichlet" else {})}
    partition = made(name, examples, clients, seed, **options)
    found = all_of(partition)
    assert sorted(sum(found, [])) == list(range(len(examples)))
    assert not partition.with_replacement
    assert [partition.size(client) for client in range(clients)] == list(map(len, found))
    assert min(map(len, found)) >= minimum
    labels = label_counts(partition, examples, clients)
    assert [sum(column) for column in zip(*labels.values(), strict=True)] == list(map(len, found))
    assert {name: sum(counts) for name, counts in labels.items()} == dict(Counter(map(str, examples)))
    assert list(label_counts(partition, range(len(examples)), 1)) == ["examples"]
    again = made(name, examples, clients, seed, **options)
    assert [again.indices(client).tolist() for client in reversed(range(clients))] == found[::-1]
    if sizes == "equal" and name == "iid":
        assert max(map(len, found)) - min(map(len, found)) <= 1


@settings(max_examples=30)
@given(
    st.sampled_from(["iid", "dirichlet", "shards"]),
    st.sampled_from(["equal", "zipf", "lognormal"]),
    st.integers(0, 2**63),
    st.lists(st.integers(0, 999_999), min_size=1, max_size=5),
)
def test_more_clients_than_examples_draw_on_their_own(name: str, sizes: str, seed: int, asked: list[int]) -> None:
    examples = labelled(50)
    partition = made(name, examples, 1_000_000, seed, sizes=sizes, minimum=2)
    assert partition.with_replacement
    alone = {client: made(name, examples, 1_000_000, seed, sizes=sizes, minimum=2).indices(client) for client in asked}
    for client in asked:
        own = partition.indices(client)
        assert own.tolist() == alone[client].tolist()
        assert len(own) == partition.size(client) >= 2
        assert own.min() >= 0
        assert own.max() < 50
        if name == "shards":
            assert len({examples[index] for index in own}) <= 2


def test_what_is_drawn_has_the_mean_size_and_the_labels_that_it_should() -> None:
    examples = labelled(50)
    for sizes in ("equal", "zipf", "lognormal"):
        partition = made("iid", examples, 2000, sizes=sizes, spread=0.5, size=30)
        assert np.mean([partition.size(client) for client in range(2000)]) == pytest.approx(30, rel=0.05)
    for alpha, most in ((0.05, 2.5), (100.0, 5.0)):
        partition = made("dirichlet", examples, 2000, alpha=alpha, size=30)
        kinds = [len({examples[index] for index in partition.indices(client)}) for client in range(200)]
        assert np.mean(kinds) == pytest.approx(most, abs=1)


def test_an_idle_client_costs_four_bytes_at_most() -> None:
    examples = labelled(50)
    tracemalloc.start()
    drawn = made("dirichlet", examples, 1_000_000, sizes="zipf")
    drawn.indices(999_999)
    of_draws, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert of_draws < 100_000
    tracemalloc.start()
    divided = made("iid", range(200_000), 200_000)
    of_division, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert of_division < 4 * divided.clients + 4 * 200_000 + 100_000  # of each client, and of each example


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    """(partitioner, examples, shuffled by a seed) -> the partitions of flwr-datasets."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()

    def partitions(partitioner: Any, examples: Labelled, shuffled: int | None = None) -> list[list[int]]:
        columns = {"label": list(examples), "speaker": [f"speaker {label}" for label in examples]}
        data = datasets.Dataset.from_dict({**columns, "place": list(range(len(examples)))})
        partitioner.dataset = data if shuffled is None else data.shuffle(shuffled)
        return [sorted(partitioner.load_partition(client)["place"]) for client in range(partitioner.num_partitions)]

    yield partitions
    datasets.enable_progress_bars()


@pytest.mark.filterwarnings("ignore:Specifying null_placement:FutureWarning")  # datasets to pyarrow
@pytest.mark.parametrize("seed", [0, 7])
def test_partitions_are_those_of_flwr_datasets(theirs: Any, seed: int) -> None:
    from flwr_datasets import partitioner as flwr

    examples = labelled(403, seed=seed)
    for name, ours, peer, shuffled in (
        ("iid", iid(PartitionOptions(name="iid"), examples, 20, seed), flwr.IidPartitioner(20), seed),
        (
            "dirichlet",
            dirichlet(DirichletOptions(name="dirichlet", alpha=0.5), examples, 20, seed),
            flwr.DirichletPartitioner(20, "label", 0.5, min_partition_size=1, shuffle=False, seed=seed),
            None,
        ),
        (
            "domain",
            domain(PartitionOptions(name="domain"), examples, 0, seed),
            flwr.NaturalIdPartitioner("speaker"),
            None,
        ),
    ):
        assert all_of(ours) == theirs(peer, examples, shuffled), name
    even = labelled(400, seed=seed)
    ours = shards(ShardsOptions(name="shards", labels=2), even, 20, seed)
    peer = flwr.ShardPartitioner(20, "label", num_shards_per_partition=2, shuffle=False, seed=seed)
    assert all_of(ours) == theirs(peer, even)


def test_labels_of_pairs_are_their_second_parts() -> None:
    labels = labelled(60)
    for pairs in ([([0.0], label) for label in labels], [(0, torch.tensor(label)) for label in labels]):
        assert all_of(made("dirichlet", pairs, 7)) == all_of(made("dirichlet", labels, 7))
        assert label_counts(made("iid", pairs, 1), pairs, 1) == label_counts(made("iid", labels, 1), labels, 1)
    for others in ([(0, 1.5)], [(0, 1, 2)], [{"x": 0}]):
        assert label_counts(made("iid", others, 1), others, 1) == {"examples": [1]}


def test_domains_with_few_examples_take_no_part() -> None:
    examples = Labelled([3, 1, 1, 3, 3, 2])
    assert all_of(made("domain", examples, 0)) == [[1, 2], [5], [0, 3, 4]]
    assert all_of(made("domain", examples, 2, minimum=2)) == [[1, 2], [0, 3, 4]]


@pytest.mark.parametrize(
    ("name", "examples", "clients", "options", "message"),
    [
        (
            "dirichlet",
            [1, 2],
            1,
            {},
            "partition.name: expected examples with labels, as pairs of an input and a whole number, or with a method",
        ),
        ("shards", [1, 2], 1, {}, "partition.name: expected examples with labels, as pairs of"),
        ("domain", [1, 2], 0, {}, "partition.name: expected examples with domains; the task's have none; take iid or"),
        (
            "iid",
            labelled(10),
            4,
            {"minimum": 3},
            "partition.minimum: expected at most 2, of 10 examples for 4 clients; ",
        ),
        ("shards", labelled(10), 5, {"labels": 3}, "partition.labels: expected at most 2 shards each of 10 examples "),
        ("dirichlet", labelled(10), 5, {"sizes": "zipf"}, "partition.sizes: expected equal with dirichlet, whose prop"),
        (
            "domain",
            labelled(90),
            7,
            {},
            "clients.count: expected 5, one for each domain with 1 examples or more, or 0;",
        ),
        (
            "domain",
            labelled(9),
            0,
            {"minimum": 8},
            r"clients.count: expected 0, .* with 8 .* 0; got 0; there are \d in",
        ),
    ],
)
def test_a_partition_that_cannot_be_is_said(
    name: str, examples: Any, clients: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=f"^{message}"):
        made(name, examples, clients, **options)
