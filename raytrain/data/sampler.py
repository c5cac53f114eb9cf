"""Seeded shuffling of examples as a function: position -> index.

Training visits positions 0, 1, 2, ...; position p belongs to epoch p // size, and every epoch is a permutation of all
examples. As the order is a function and not a list, a shard is a range of positions, resuming needs one integer, and no
epoch of a hundred million examples is held in memory.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEISTEL_ROUNDS = (
    8  # with 8, neighbours and marginals of 10 examples pass a chi-square test; with 6 they do not (measured)
)


@dataclass(frozen=True, slots=True)
class Sampler:
    """A different permutation of `size` examples for each epoch of each seed.

    The permutation is a Feistel network on pairs (left, right) with left < a, right < b and a * b the smallest
    rectangle that holds `size`; pairs beyond `size` are permuted again until they are inside (cycle walking). Each
    round is invertible, so it is a bijection for any size.

    Attributes:
        size: number of examples, at least 1.
        seed: any integer; equal seeds give equal orders.

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", methods 2 and 3.

    >>> sorted(Sampler(size=5, seed=0).indices(0, 5).tolist())
    [0, 1, 2, 3, 4]
    """

    size: int
    seed: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: expected at least 1 example; got {self.size}")

    def indices(self, start: int, count: int) -> NDArray[np.int64]:
        """Return the examples at positions start .. start + count - 1, shape (count,), each in [0, size)."""
        positions = np.arange(start, start + count, dtype=np.int64)
        epoch, offset = np.divmod(positions, self.size)
        return self._permute(offset, epoch)

    def _permute(self, offset: NDArray[np.int64], epoch: NDArray[np.int64]) -> NDArray[np.int64]:
        tall = max(1, int(np.ceil(np.sqrt(self.size))))
        wide = -(-self.size // tall)
        key = _mix(epoch.astype(np.uint64) + np.uint64(self.seed * 0x9E3779B97F4A7C15 % 2**64))
        place = _feistel(offset, key, tall, wide)
        while (outside := place >= self.size).any():
            place[outside] = _feistel(place[outside], key[outside], tall, wide)
        return place


def _feistel(place: NDArray[np.int64], key: NDArray[np.uint64], tall: int, wide: int) -> NDArray[np.int64]:
    left, right = np.divmod(place, wide)
    for turn in range(0, FEISTEL_ROUNDS, 2):
        left = (left + _draw(right, key, turn, tall)) % tall
        right = (right + _draw(left, key, turn + 1, wide)) % wide
    return left * wide + right


def _draw(half: NDArray[np.int64], key: NDArray[np.uint64], turn: int, below: int) -> NDArray[np.int64]:
    """Return pseudo-random integers in [0, below), a function of all arguments."""
    mixed = _mix(half.astype(np.uint64) ^ (key + np.uint64((turn + 1) * 0xD1B54A32D192ED03 % 2**64)))
    return (mixed % np.uint64(below)).astype(np.int64)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits (the finalizer of SplitMix64; Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
