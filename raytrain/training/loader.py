"""Batch loaders of the training loop."""

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

MicroBatches = list[tuple[Batch, int]]
"""The micro-batches of a step, each with the number of its examples, on the CPU."""


@dataclass(frozen=True, slots=True)
class StepRange:
    """Steps of a replica and the positions of their examples, known in advance so that batches can be prefetched.

    Attributes:
        seed: of the recipe.
        rank: of the replica.
        first_position: of the first step.
        stride: positions from one step to the next.
        steps: number of steps.
        local_batch: examples in a step.
        accumulate: micro-batches in a step.
    """

    seed: int
    rank: int
    first_position: int
    stride: int
    steps: int
    local_batch: int
    accumulate: int

    def every_nth(self, offset: int, n: int) -> "StepRange":
        """Return the range of step `offset` and every n-th step after it."""
        steps = len(range(offset, self.steps, n))
        return replace(self, first_position=self.position(offset), stride=n * self.stride, steps=steps)

    def position(self, step: int) -> int:
        """Return the first position of a step, counted from 0."""
        return self.first_position + step * self.stride

    def after(self, position: int) -> "StepRange":
        """Return the rest of the range, after the step that starts at `position`."""
        done = (position - self.first_position) // self.stride + 1
        return replace(self, first_position=self.position(done), steps=self.steps - done)


class BatchLoader(Protocol):
    """Loads the examples at positions 0, 1, 2, ..., which replicas divide among themselves, as micro-batches."""

    def load(self, position: int, count: int, accumulate: int) -> MicroBatches:
        """Return the examples at `count` positions from `position` on, as micro-batches.

        Args:
            position: first position.
            count: number of examples.
            accumulate: number of micro-batches, of nearly equal size.
        """
        ...

    def describe(self, position: int, count: int) -> str:
        """Return a description of the examples for an error message."""
        ...


class LoaderFactory(Protocol):
    """Creates the batch loader of a worker."""

    def __call__(self, task: Task, options: TaskOptions, step_range: StepRange) -> AbstractContextManager[BatchLoader]:
        """Return the loader of a replica, which works inside the `with` block.

        Args:
            task: to train.
            options: of the task, with the source of its examples.
            step_range: steps that the replica will load.
        """
        ...


class IndexedLoader:
    """Loads examples by index, in the seeded order of the sampler.

    Random draws of examples and collation depend on the seed and the position alone.

    Args:
        task: with its collation.
        examples: of the split.
        seed: of the order.
    """

    def __init__(self, task: Task, examples: Examples, seed: int) -> None:
        self._task = task
        self._examples = examples
        self._sampler = Sampler(len(examples), seed)

    def load(self, position: int, count: int, accumulate: int) -> MicroBatches:
        """Load and collate the examples at these positions."""
        seed_everything_at(self._sampler.seed, position, count, accumulate)
        indices = self._sampler.indices(position, count).tolist()
        return collate_micro_batches(self._task, (self._examples[index] for index in indices), count, accumulate)

    def describe(self, position: int, count: int) -> str:
        """Return the indices."""
        return f"the training examples {self._sampler.indices(position, count).tolist()}"


class GeneratorLoader:
    """Loads examples from a user's generator function, seed -> iterator, whatever the position.

    After the end of an iterator, as at the end of a game, the next one gets another seed, which also seeds torch, numpy
    and random.

    Args:
        task: with its collation.
        options: of the function.
        make: the function.
        seeds: entropy of its seeds.
    """

    def __init__(self, task: Task, options: Options, make: Callable[..., Iterable[Any]], seeds: Sequence[int]) -> None:
        self._task = task
        self._options = options
        self._make = make
        self._seeds = np.random.default_rng(seeds)
        self._examples = self._endless()

    def load(self, position: int, count: int, accumulate: int) -> MicroBatches:  # noqa: ARG002 - they come as they come
        """Collate the next `count` examples."""
        return collate_micro_batches(self._task, self._examples, count, accumulate)

    def describe(self, position: int, count: int) -> str:  # noqa: ARG002 - they come as they come
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


def collate_micro_batches(task: Task, examples: Iterator[Any], count: int, accumulate: int) -> MicroBatches:
    """Return the next `count` examples as micro-batches, sorted by length where the task has one."""
    taken = list(islice(examples, count))
    if task.length and accumulate > 1:
        taken.sort(key=task.length)
    places = np.array_split(range(count), accumulate)
    return [(task.collate([taken[place] for place in part]), len(part)) for part in places]


def train_loader(task: Task, options: TaskOptions, seed: int) -> IndexedLoader:
    """Return the loader of the task's training examples.

    Raises:
        RecipeError: there are none.
    """
    examples = task.data("train")
    if len(examples) == 0:
        raise RecipeError(f"task.name: {options.name} has no examples to train on: Task.data('train') is empty")
    return IndexedLoader(task, examples, seed)


@contextmanager
def local_loader(task: Task, options: TaskOptions, step_range: StepRange) -> Iterator[BatchLoader]:
    """Yield the loader of a worker that prepares its batches itself.

    Raises:
        RecipeError: the recipe asks for a source that works in other processes.
    """
    if not isinstance(options.source, LocalSource):
        raise RecipeError(
            f"task.source.name: {options.source.name!r} needs Ray, which is not here; start the run with "
            "`raytrain train`, or set task.source=local"
        )
    yield train_loader(task, options, step_range.seed)
