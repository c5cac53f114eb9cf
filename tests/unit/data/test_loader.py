"""Where batches come from, without Ray."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytrain.data.sampler import Sampler
from raytrain.data.source import GeneratorSource
from raytrain.errors import RecipeError, TrainingError
from raytrain.tasks.task import Task
from raytrain.testing import train_here, train_with_threads
from raytrain.training.loader import GeneratorLoader, IndexedLoader, StepRange, local_loader
from raytrain.training.recipe import TrainRecipe

SMALL = st.integers(1, 9)
WALKS = st.builds(
    StepRange,
    seed=st.just(0),
    rank=st.just(0),
    first_position=st.integers(0, 50),
    stride=SMALL,
    steps=SMALL,
    local_batch=SMALL,
    accumulate=SMALL,
)


def positions(walk: StepRange) -> list[int]:
    return [walk.position(step) for step in range(walk.steps)]


@given(WALKS, SMALL)
def test_lanes_deal_out_a_walk(walk: StepRange, lanes: int) -> None:
    dealt = [positions(walk.every_nth(place, lanes)) for place in range(lanes)]
    assert [dealt[step % lanes][step // lanes] for step in range(walk.steps)] == positions(walk)
    assert sum(map(len, dealt)) == walk.steps


@given(WALKS, st.integers(0, 8))
def test_what_is_left_of_a_walk_is_its_rest(walk: StepRange, step: int) -> None:
    step %= walk.steps
    assert positions(walk.after(walk.position(step))) == positions(walk)[step + 1 :]


def task(**changes: Any) -> Task:
    return Task(model=lambda seed: torch.nn.Linear(1, 1), data=lambda split: [], losses=lambda *_: None, **changes)


@given(st.integers(0, 1000), st.integers(1, 12), SMALL)
def test_micro_batches_hold_the_samplers_examples(position: int, count: int, parts: int) -> None:
    feed = IndexedLoader(task(collate=list), [f"example {index}" for index in range(7)], seed=3)
    batches = feed.load(position, count, parts)
    expected = [f"example {index}" for index in Sampler(7, 3).indices(position, count)]
    assert [example for batch, _ in batches for example in batch] == expected
    sizes = [size for _, size in batches]
    assert sizes == [len(batch) for batch, _ in batches]
    assert max(sizes) - min(sizes) <= 1
    assert len(batches) == parts


@given(st.integers(0, 1000), st.integers(1, 12), SMALL)
def test_examples_of_like_size_are_beside_each_other(position: int, count: int, parts: int) -> None:
    feed = IndexedLoader(task(collate=list, length=len), ["12345"[: index % 5] for index in range(30)], seed=3)
    whole = feed.load(position, count, 1)[0][0]
    cut = feed.load(position, count, parts)
    assert whole == ["12345"[: index % 5] for index in Sampler(30, 3).indices(position, count)]
    assert [example for batch, _ in cut for example in batch] == (sorted(whole, key=len) if parts > 1 else whole)
    assert [size for _, size in cut] == [len(part) for part in np.array_split(range(count), parts)]


def test_what_a_batch_draws_depends_on_its_position_alone() -> None:
    feed = IndexedLoader(task(collate=lambda examples: torch.rand(len(examples))), range(100), seed=3)
    (first, _), (second, _) = feed.load(8, 4, 1) + feed.load(12, 4, 1)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(feed.load(8, 4, 1)[0][0], first)


def game(seed: int) -> Iterator[tuple[int, int]]:
    """Yield three moves of a game."""
    return iter([(seed, move) for move in range(3)])


def generated(make: Any, *place: int, **options: Any) -> GeneratorLoader:
    return GeneratorLoader(task(collate=list), GeneratorSource(name="mine:game", **options), make, [5, *place])


def test_games_follow_each_other_with_new_seeds() -> None:
    examples = [move for batch, _ in generated(game).load(0, 9, 2) for move in batch]
    assert [move for _, move in examples] == [0, 1, 2] * 3
    seeds = [seed for seed, _ in examples[::3]]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert generated(game).load(0, 9, 2) == generated(game).load(77, 9, 2)
    assert generated(game, 1).load(0, 9, 2) != generated(game).load(0, 9, 2)


def test_a_generator_may_draw_from_the_global_generators() -> None:
    def noise(seed: int) -> Iterator[float]:
        while True:
            yield torch.rand(()).item()

    feed = generated(noise)
    torch.manual_seed(1)
    assert feed.load(0, 5, 1) == generated(noise).load(0, 5, 1)


def test_a_generator_may_have_options() -> None:
    class Strides(GeneratorSource):
        stride: int = 3

    def count(seed: int, options: Strides) -> Iterator[int]:
        return iter(range(0, 1000, options.stride))

    feed = GeneratorLoader(task(collate=list), Strides(name="mine:count", stride=7), count, [0])
    assert feed.load(0, 3, 1) == [([0, 7, 14], 3)]


def test_a_generator_that_makes_nothing_is_an_error() -> None:
    with pytest.raises(TrainingError, match=r"mine:game made no example from the seed \d+"):
        generated(lambda seed: iter(())).load(0, 1, 1)


def test_a_generator_makes_no_more_than_is_taken() -> None:
    made: list[int] = []

    def numbers(seed: int) -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    feed = generated(numbers)
    feed.load(0, 4, 1)
    feed.load(0, 4, 2)
    assert made == list(islice(range(1000), 8))


@pytest.mark.parametrize("train", [train_here, train_with_threads])
def test_without_ray_there_is_only_the_local_source(train: Any, tmp_path: Path) -> None:
    recipe = TrainRecipe.parse({"kind": "train", "task": {"name": "raytrain.testing:tiny", "source": "ray"}})
    run = train(recipe, tmp_path / "run")
    assert run.failure().message == (
        "task.source.name: 'ray' needs Ray, which is not here; start the run with `raytrain train`, or set "
        "task.source=local"
    )
    assert run.failure().exit_status == RecipeError.exit_status


def test_a_task_without_examples_is_refused() -> None:
    options = TrainRecipe.parse({"kind": "train", "task": "digits"}).task
    with (
        pytest.raises(RecipeError, match=r"^task\.name: digits has no examples to train on"),
        local_loader(task(), options, StepRange(0, 0, 0, 1, 1, 1, 1)),
    ):
        pass
