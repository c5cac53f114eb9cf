"""Where the loop takes its batches from."""

from typing import Protocol

import numpy as np

from raytrain.sampler import Sampler
from raytrain.task import Batch, Examples, Task


class Feed(Protocol):
    """Batches in the order of training: positions 0, 1, 2, ... for ever, of which each replica takes its share."""

    def take(self, position: int, count: int, parts: int) -> list[tuple[Batch, int]]:
        """Return the examples at `count` positions from `position` on, as micro-batches.

        Args:
            position: the first.
            count: how many.
            parts: into how many micro-batches of nearly equal size they are collated.

        Returns:
            (batch, number of its examples), on the CPU.
        """
        ...

    def named(self, position: int, count: int) -> str:
        """Return what the examples are called, for an error message."""
        ...


class Indexed:
    """Examples by index, in the seeded order of the sampler, collated where they are needed.

    Args:
        task: how to collate.
        examples: the split.
        seed: of the order.
    """

    def __init__(self, task: Task, examples: Examples, seed: int) -> None:
        self._task = task
        self._examples = examples
        self._sampler = Sampler(len(examples), seed)

    def take(self, position: int, count: int, parts: int) -> list[tuple[Batch, int]]:
        """Collate what the sampler has at these positions."""
        indices = self._sampler.indices(position, count)
        return [
            (self._task.collate([self._examples[index] for index in part.tolist()]), len(part))
            for part in np.array_split(indices, parts)
        ]

    def named(self, position: int, count: int) -> str:
        """Return the indices."""
        return f"the training examples {self._sampler.indices(position, count).tolist()}"
