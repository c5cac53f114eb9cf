"""Where the loop takes its batches from."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np

from raytrain.data.sampler import Sampler
from raytrain.data.source import GeneratorSource, LocalSource
from raytrain.errors import RecipeError, TrainingError
from raytrain.recipe import Options
from raytrain.tasks.task import Batch, Examples, Task, TaskOptions
from raytrain.tensors import seed_everything_at

Batches = list[tuple[Batch, int]]
"""The micro-batches of a step, each with the number of its examples, on the CPU."""


@dataclass(frozen=True, slots=True)
class Walk:
    """The positions that one replica takes its examples from, known before it takes them.

    Attributes:
        seed: the recipe's.
        rank: the replica's.
        first: where its first step begins.
        stride: how much further each next step begins.
        steps: how many there are.
        count: examples in each.
        parts: micro-batches that they are cut into.
    """

    seed: int
    rank: int
    first: int
    stride: int
    steps: int
    count: int
    parts: int

    def lane(self, place: int, lanes: int) -> "Walk":
        """Return the walk over step `place` of this one and every `lanes`-th after it."""
        steps = len(range(place, self.steps, lanes))
        return replace(self, first=self.position(place), stride=lanes * self.stride, steps=steps)

    def position(self, step: int) -> int:
        """Return where step `step` begins, counted from 0."""
        return self.first + step * self.stride

    def after(self, position: int) -> "Walk":
        """Return the rest of the walk, after the step that begins at `position`."""
        done = (position - self.first) // self.stride + 1
        return replace(self, first=self.position(done), steps=self.steps - done)


class Feed(Protocol):
    """Batches in the order of training: positions 0, 1, 2, ... for ever, of which each replica takes its share."""

    def take(self, position: int, count: int, parts: int) -> Batches:
        """Return the examples at `count` positions from `position` on, as micro-batches.

        Args:
            position: the first.
            count: how many.
            parts: into how many micro-batches of nearly equal size they are collated.
        """
        ...

    def named(self, position: int, count: int) -> str:
        """Return what the examples are called, for an error message."""
        ...


class Feeds(Protocol):
    """How a worker gets its feed."""

    def __call__(self, task: Task, options: TaskOptions, walk: Walk) -> AbstractContextManager[Feed]:
        """Return the feed of one replica, which works inside the `with` block.

        Args:
            task: what is trained.
            options: its options in the recipe, the source of the examples among them.
            walk: what the replica will take.
        """
        ...


class Indexed:
    """Examples by index, in the seeded order of the sampler, collated where they are needed.

    What an example or a batch draws at random depends on the seed and the position alone.

    Args:
        task: how to collate.
        examples: the split.
        seed: of the order.
    """

    def __init__(self, task: Task, examples: Examples, seed: int) -> None:
        self._task = task
        self._examples = examples
        self._sampler = Sampler(len(examples), seed)

    def take(self, position: int, count: int, parts: int) -> Batches:
        """Collate what the sampler has at these positions."""
        seed_everything_at(self._sampler.seed, position, count, parts)
        indices = self._sampler.indices(position, count).tolist()
        return collated(self._task, (self._examples[index] for index in indices), count, parts)

    def named(self, position: int, count: int) -> str:
        """Return the indices."""
        return f"the training examples {self._sampler.indices(position, count).tolist()}"


class Generated:
    """Examples as a function of the user's makes them, seed -> iterator, whatever the position.

    When an iterator comes to its end, as at the end of a game, the next one begins with another seed. The generators of
    torch, numpy and random are seeded with it too.

    Args:
        task: how to collate.
        options: of the function.
        make: the function.
        seeds: what its seeds are drawn from.
    """

    def __init__(self, task: Task, options: Options, make: Callable[..., Iterable[Any]], seeds: Sequence[int]) -> None:
        self._task = task
        self._options = options
        self._make = make
        self._seeds = np.random.default_rng(seeds)
        self._examples = self._endless()

    def take(self, position: int, count: int, parts: int) -> Batches:  # noqa: ARG002 - they come as they come
        """Collate the next `count` examples."""
        return collated(self._task, self._examples, count, parts)

    def named(self, position: int, count: int) -> str:  # noqa: ARG002 - they come as they come
        """Return the name of the function."""
        return f"examples of {self._options.name}"

    def _endless(self) -> Iterator[Any]:
        while True:
            seed = int(self._seeds.integers(2**32))  # no more, for numpy's sake
            seed_everything_at(seed)
            given = (seed,) if type(self._options) is GeneratorSource else (seed, self._options)
            empty = True
            for example in self._make(*given):
                empty = False
                yield example
            if empty:
                raise TrainingError(f"{self._options.name} made no example from the seed {seed}")


def collated(task: Task, examples: Iterator[Any], count: int, parts: int) -> Batches:
    """Return the next `count` examples as micro-batches, of examples of like size where the task knows that."""
    taken = list(islice(examples, count))
    if task.length and parts > 1:
        taken.sort(key=task.length)
    places = np.array_split(range(count), parts)
    return [(task.collate([taken[place] for place in part]), len(part)) for part in places]


def indexed(task: Task, options: TaskOptions, seed: int) -> Indexed:
    """Return the task's own training examples.

    Raises:
        RecipeError: there are none.
    """
    examples = task.data("train")
    if len(examples) == 0:
        raise RecipeError(f"task.name: {options.name} has no examples to train on: Task.data('train') is empty")
    return Indexed(task, examples, seed)


@contextmanager
def local_feed(task: Task, options: TaskOptions, walk: Walk) -> Iterator[Feed]:
    """Yield the feed of a worker that prepares its batches itself.

    Raises:
        RecipeError: the recipe asks for a source that works in other processes.
    """
    if not isinstance(options.source, LocalSource):
        raise RecipeError(
            f"task.source.name: {options.source.name!r} needs Ray, which is not here; start the run with "
            "`raytrain train`, or set task.source=local"
        )
    yield indexed(task, options, walk.seed)
