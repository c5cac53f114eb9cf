"""Which examples each client has.

Examples are divided among clients, each going to one of them. Where there are more clients than examples, each client
draws some with replacement, when it is asked: a client that is not asked costs nothing.

Where flwr-datasets has the same partitioner, the same seed gives the same examples.
"""

import heapq
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from federated.options import DirichletOptions, PartitionOptions, ShardsOptions
from federated.sampling import Indices
from federated.tables import PARTITIONS
from raytrain.data.sampler import Sampler
from raytrain.errors import RecipeError
from raytrain.recipe import explain_errors, options_parameter
from raytrain.registry import resolve
from raytrain.seeds.prng import fold_in
from raytrain.tasks.task import Examples


class Partition(Protocol):
    """The examples of clients."""

    @property
    def clients(self) -> int:
        """Return how many clients there are."""
        ...

    @property
    def with_replacement(self) -> bool:
        """Return whether clients draw with replacement, so that an example may be at several or at none."""
        ...

    def size(self, client: int) -> int:
        """Return the number of examples of a client."""
        ...

    def indices(self, client: int) -> Indices:
        """Return the examples of a client."""
        ...


class Division:
    """Every example belongs to one client.

    Args:
        owners: the client of each example; -1: none.
        clients: how many there are.
    """

    with_replacement = False

    def __init__(self, owners: NDArray[np.int64], clients: int) -> None:
        self.clients = clients
        sizes = np.bincount(owners[owners >= 0], minlength=clients)
        self._ends = np.cumsum(sizes).astype(np.uint32)
        self._order = np.argsort(owners, kind="stable")[int((owners < 0).sum()) :].astype(np.uint32)

    def size(self, client: int) -> int:
        """Return the number of examples of a client."""
        return int(self._ends[client]) - self._start(client)

    def indices(self, client: int) -> Indices:
        """Return the examples of a client, in ascending order."""
        return self._order[self._start(client) : int(self._ends[client])].astype(np.int64)

    def _start(self, client: int) -> int:
        return int(self._ends[client - 1]) if client else 0


@dataclass(frozen=True, slots=True)
class Draws:
    """Every client draws with replacement, from a generator of its own.

    Attributes:
        clients: how many there are.
        options: of sizes.
        seed: of the generators.
        mean: weight of a client, by which `options.size` is divided.
        choose: (generator, how many) -> examples.
    """

    clients: int
    options: PartitionOptions
    seed: int
    mean: float
    choose: Callable[[np.random.Generator, int], Indices]
    with_replacement: bool = True

    def size(self, client: int) -> int:
        """Return the number of examples of a client."""
        weight = float(_weights(self.options, self.seed, self.clients, range(client, client + 1))[0])
        return max(self.options.minimum, round(self.options.size * weight / self.mean))

    def indices(self, client: int) -> Indices:
        """Return the examples of a client."""
        return self.choose(_generator(self.seed, client), self.size(client))


def make_partition(name: str, examples: Examples, clients: int, *, seed: int = 0, **options: Any) -> Partition:
    """Return which examples each client has, as of a recipe's section [partition].

    Args:
        name: "iid", "dirichlet", "shards" or "domain", or "module:function" of one like them.
        examples: to divide: pairs of an input and a label, or with the methods of `Labelled`.
        clients: how many there are.
        seed: of all draws.
        options: of the partition.

    Raises:
        RecipeError: the examples cannot be divided so.

    >>> examples = [(number, number % 3) for number in range(90)]
    >>> partition = make_partition("dirichlet", examples, 10, alpha=0.1)
    >>> partition.size(0), partition.indices(0).tolist()[:3]
    (1, [85])
    """
    make = resolve(PARTITIONS, name, "partition.name")
    declared: Any = options_parameter(make, PartitionOptions)
    try:
        parsed = declared.model_validate({"name": name, **options})
    except ValidationError as error:
        raise RecipeError(explain_errors(error, "partition")) from None
    partition: Partition = make(parsed, examples, clients, seed)
    return partition


def iid(options: PartitionOptions, examples: Examples, clients: int, seed: int) -> Partition:
    """Deal shuffled examples to clients.

    With equal sizes these are the partitions of flwr-datasets' IidPartitioner of a data set shuffled with the seed.
    """
    total = len(examples)
    if clients > total:
        return _draws(options, clients, seed, lambda generator, size: generator.integers(total, size=size))
    _check_minimum(options, total, clients)
    weights = _weights(options, seed, clients, range(clients))
    owners = np.empty(total, np.int64)
    owners[np.random.default_rng(seed).permutation(total)] = np.repeat(
        np.arange(clients), _apportioned(total, weights, options.minimum)
    )
    return Division(owners, clients)


def dirichlet(options: DirichletOptions, examples: Examples, clients: int, seed: int) -> Partition:
    """Share each label out among clients by proportions from a symmetric Dirichlet distribution.

    These are the partitions of flwr-datasets' DirichletPartitioner, unless a client has fewer than `minimum` examples:
    it then gets some of those that have most, where flwr-datasets would draw all anew.
    """
    labels, total = labels_of(examples), len(examples)
    of_label = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if clients > total:
        counts = np.array([len(one) for one in of_label])

        def choose(generator: np.random.Generator, size: int) -> Indices:
            likely = generator.gamma(options.alpha, size=len(counts)) * counts
            likely = likely + np.finfo(float).tiny  # all may be 0
            return _of_labels(generator, of_label, generator.choice(len(counts), size, p=likely / likely.sum()))

        return _draws(options, clients, seed, choose)
    _check_equal(options, "dirichlet", "proportions")
    _check_minimum(options, total, clients)
    generator, owners = np.random.default_rng(seed), np.empty(total, np.int64)
    for ours in of_label:
        proportions = generator.dirichlet(np.full(clients, options.alpha))
        edges = (np.cumsum(proportions) * len(ours)).astype(int)
        edges[-1] = len(ours)
        owners[ours] = np.repeat(np.arange(clients), np.diff(edges, prepend=0))
    return Division(_topped_up(owners, clients, options.minimum), clients)


def shards(options: ShardsOptions, examples: Examples, clients: int, seed: int) -> Partition:
    """Sort examples by label, cut them into equal shards, and deal each client some.

    Where the shards come out even these are the partitions of flwr-datasets' ShardPartitioner.
    """
    labels, total = labels_of(examples), len(examples)
    of_label = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if clients > total:

        def choose(generator: np.random.Generator, size: int) -> Indices:
            ours = generator.permutation(len(of_label))[: options.labels]
            return _of_labels(generator, of_label, generator.choice(ours, size))

        return _draws(options, clients, seed, choose)
    _check_equal(options, "shards", "shards")
    _check_minimum(options, total, clients)
    count = clients * options.labels
    if count > total:
        raise RecipeError(
            f"partition.labels: expected at most {total // clients} shards each of {total} examples for {clients} "
            f"clients; got {options.labels}"
        )
    owner_of_shard = np.empty(count, np.int64)
    owner_of_shard[np.random.default_rng(seed).permutation(count)] = np.repeat(np.arange(clients), options.labels)
    owners, edges = np.empty(total, np.int64), np.arange(count + 1) * total // count
    owners[np.argsort(labels, kind="stable")] = np.repeat(owner_of_shard, np.diff(edges))
    return Division(_topped_up(owners, clients, options.minimum), clients)


def domain(options: PartitionOptions, examples: Examples, clients: int, seed: int) -> Partition:  # noqa: ARG001
    """Make each domain of the examples a client, in alphabetical order; those with fewer than `minimum` take no part.

    These are the partitions of flwr-datasets' NaturalIdPartitioner.
    """
    _check_equal(options, "domain", "domains")
    ask = getattr(examples, "domain", None)
    if ask is None:
        raise RecipeError("partition.name: expected examples with domains; the task's have none; take iid or dirichlet")
    names, numbers = np.unique(np.array([ask(index) for index in range(len(examples))]), return_inverse=True)
    large = np.bincount(numbers) >= options.minimum
    found = int(large.sum())
    if found == 0 or clients not in (0, found):
        way = f"; there are {len(names)} in all" if found < len(names) else ""
        raise RecipeError(
            f"clients.count: expected {found}, one for each domain with {options.minimum} examples or more, or 0; "
            f"got {clients}{way}"
        )
    clients_of = np.where(large, np.cumsum(large) - 1, -1)
    return Division(clients_of[numbers], found)


def labels_of(examples: Examples) -> NDArray[Any]:
    """Return the label of each example.

    Raises:
        RecipeError: they have none.
    """
    read = label_reader(examples)
    if read is None:
        raise RecipeError(
            "partition.name: expected examples with labels, as pairs of an input and a whole number, or with a method "
            "label(index); the task's have none; take iid or domain"
        )
    return np.array([read(index) for index in range(len(examples))])


def label_reader(examples: Examples) -> Callable[[int], Any] | None:
    """Return what tells an example's label: a method of the examples, or the second part of a pair; None: nothing."""
    if ask := getattr(examples, "label", None):
        found: Callable[[int], Any] = ask
        return found
    pairs = len(examples) > 0 and _label_of_pair(examples[0]) is not None
    return (lambda index: _label_of_pair(examples[index])) if pairs else None


def _label_of_pair(example: Any) -> int | None:
    """Return the second part of a pair, if it is a whole number: of Python, NumPy or torch."""
    if not isinstance(example, tuple | list) or len(example) != 2:
        return None
    try:
        return operator.index(example[1])
    except TypeError:
        return None


def label_counts(partition: Partition, examples: Examples, clients: int) -> dict[str, list[int]]:
    """Return label -> how many examples of it each of the first clients has; "examples" stands for all without labels.

    Args:
        partition: of the examples.
        examples: all of them.
        clients: how many of the clients.
    """
    label = label_reader(examples)
    counts = [
        Counter(str(label(index)) if label else "examples" for index in partition.indices(client).tolist())
        for client in range(clients)
    ]
    return {name: [one[name] for one in counts] for name in sorted({name for one in counts for name in one})}


def _draws(
    options: PartitionOptions, clients: int, seed: int, choose: Callable[[np.random.Generator, int], Indices]
) -> Draws:
    if options.sizes == "zipf":
        mean = float(np.mean(np.arange(1, clients + 1, dtype=np.float64) ** -options.spread))
    else:
        mean = float(np.exp(options.spread**2 / 2)) if options.sizes == "lognormal" else 1.0
    return Draws(clients, options, seed, mean, choose)


def _weights(options: PartitionOptions, seed: int, clients: int, some: range) -> NDArray[np.float64]:
    """Return how many examples some of the clients have, relative to each other."""
    if options.sizes == "zipf":
        ranks = 1.0 + Sampler(clients, seed).indices(some.start, len(some))
        return np.asarray(ranks**-options.spread, np.float64)
    if options.sizes == "lognormal":
        return np.array([_generator(seed, client, 1).lognormal(sigma=options.spread) for client in some])
    return np.ones(len(some))


def _generator(seed: int, client: int, use: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=fold_in(seed, client, use)))


def _of_labels(generator: np.random.Generator, of_label: list[Indices], labels: Indices) -> Indices:
    """Draw an example of each of these labels."""
    shares = generator.random(len(labels)).tolist()
    drawn = [of_label[label] for label in labels.tolist()]
    return np.array([ours[int(share * len(ours))] for ours, share in zip(drawn, shares, strict=True)], np.int64)


def _apportioned(total: int, weights: NDArray[np.float64], minimum: int) -> NDArray[np.int64]:
    """Return whole numbers that add up to `total`: the minimum, and more by weight, the largest remainders first."""
    exact = minimum + (total - minimum * len(weights)) * weights / weights.sum()
    counts: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    short = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:short]] += 1
    return counts


def _topped_up(owners: NDArray[np.int64], clients: int, minimum: int) -> NDArray[np.int64]:
    """Give clients with fewer than `minimum` examples the last ones of those that have most."""
    sizes = np.bincount(owners, minlength=clients)
    short = np.flatnonzero(sizes < minimum).tolist()
    if not short:
        return owners
    most = [(-int(size), client) for client, size in enumerate(sizes)]
    heapq.heapify(most)
    order, ends = np.argsort(owners, kind="stable"), np.cumsum(sizes)
    for client in short:
        for _ in range(minimum - int(sizes[client])):
            size, giver = most[0]
            heapq.heapreplace(most, (size + 1, giver))
            ends[giver] -= 1
            owners[order[ends[giver]]] = client
    return owners


def _check_minimum(options: PartitionOptions, total: int, clients: int) -> None:
    if clients * options.minimum > total:
        raise RecipeError(
            f"partition.minimum: expected at most {total // clients}, of {total} examples for {clients} clients; "
            f"got {options.minimum}"
        )


def _check_equal(options: PartitionOptions, name: str, reason: str) -> None:
    if options.sizes != "equal":
        raise RecipeError(
            f"partition.sizes: expected equal with {name}, whose {reason} make the sizes, unless there are more "
            f"clients than examples; got {options.sizes}"
        )
