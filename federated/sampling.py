"""Who takes part, along which directions and on which examples: all from one master seed.

Each draw is of a stream, at a (round, client, step) of its own: so no draw depends on
another one, on the order in which clients are served, or on the process that serves them; and what both sides can draw
is never sent.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from raytrain.data.sampler import Sampler
from raytrain.seeds.prng import fold_in, fold_in_all

Seeds = NDArray[np.uint64]
Indices = NDArray[np.int64]


class Stream(IntEnum):
    """What is drawn: each has a seed of its own, fold_in(master, stream)."""

    DIRECTIONS = 1
    EXAMPLES = 2
    CLIENTS = 3
    COMMON_SEEDS = 4
    IMPORTANCE = 5
    FAULTS = 6
    PARTITION = 7
    EVALUATION = 8


def pool_seeds(master: int, size: int) -> Seeds:
    """Return the seeds of a pool of directions, as `SeedModel.of_pool` has them, shape (size,)."""
    return fold_in_all(master, np.arange(size))


def pool_directions(master: int, round_number: int, client: int, steps: int, pool: int) -> Indices:
    """Draw each step's direction by its index in the pool, with replacement, shape (steps,)."""
    drawn = fold_in_all(fold_in(master, Stream.DIRECTIONS), round_number, client, np.arange(steps))
    return (drawn % np.uint64(pool)).astype(np.int64)


def common_seeds(master: int, round_number: int | Indices, step: Indices) -> Seeds:
    """Return the seeds that all clients of a round probe, like `step`."""
    return fold_in_all(fold_in(master, Stream.COMMON_SEEDS), round_number, step)


def important_directions(
    master: int, round_number: int, client: int, steps: int, probabilities: NDArray[np.float64]
) -> Indices:
    """Draw each step's direction by the probabilities of the pool, shape (steps,)."""
    drawn = fold_in_all(fold_in(master, Stream.IMPORTANCE), round_number, client, np.arange(steps))
    cumulative = np.cumsum(probabilities)
    indices: Indices = np.searchsorted(cumulative, drawn / 2.0**64 * cumulative[-1], side="right")
    return indices.clip(max=len(cumulative) - 1)  # rounding may go one beyond


def participants(master: int, round_number: int, clients: int, count: int) -> Indices:
    """Draw the clients of a round, without replacement and in ascending order, shape (count,)."""
    return np.sort(Sampler(clients, fold_in(fold_in(master, Stream.CLIENTS), round_number)).indices(0, count))


def batches(master: int, round_number: int, client: int, examples: int, steps: int, batch: int) -> Indices:
    """Draw each step's examples among those of a client, all once before any comes again, shape (steps, batch)."""
    order = Sampler(examples, fold_in(fold_in(master, Stream.EXAMPLES), round_number, client))
    return order.indices(0, steps * batch).reshape(steps, batch)


class SeedPool:
    """A fixed number of seeds, which every round draws from.

    Args:
        master: that they follow from.
        size: how many.
    """

    grows = False

    def __init__(self, master: int, size: int) -> None:
        self._seeds = pool_seeds(master, size)

    def size(self, version: int) -> int:  # noqa: ARG002 - it is the same for all
        """Return the number of directions of a model."""
        return len(self._seeds)

    def seeds(self, indices: Indices) -> Seeds:
        """Return the seeds of some directions."""
        return self._seeds[indices]


class NewSeeds:
    """New seeds in each round, which the model keeps.

    Args:
        master: that they follow from.
        steps: how many a round adds.
    """

    grows = True

    def __init__(self, master: int, steps: int) -> None:
        self._master = master
        self._steps = steps

    def size(self, version: int) -> int:
        """Return the number of directions of a model."""
        return version * self._steps

    def seeds(self, indices: Indices) -> Seeds:
        """Return the seeds of some directions."""
        return common_seeds(self._master, indices // self._steps, indices % self._steps)
