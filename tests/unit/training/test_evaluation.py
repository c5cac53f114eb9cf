from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from raytrain.errors import TrainingError
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.tasks.task import Task
from raytrain.testing import ThreadGroup, TinyOptions, tiny
from raytrain.training.evaluation import evaluate, evaluation_shard

TASK = tiny(TinyOptions(name="tiny", dropout=0.5))


@given(st.integers(0, 1000), st.integers(1, 50))
def test_shares_cover_everything_once(count: int, members: int) -> None:
    shares = [evaluation_shard(count, rank, members) for rank in range(members)]
    assert [index for part in shares for index in part] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 7))
def test_values_are_exact_on_any_number_of_replicas(count: int, members: int, batch: int) -> None:
    """Whole numbers, which floats add up exactly: any error of counting shows."""
    values = [(7 * place % 11, 1 + place % 3) for place in range(count)]
    task = Task(
        model=lambda seed: nn.Linear(1, 1),
        data=lambda split: values,
        losses=lambda module, rows: rows[0].float(),
        weights=lambda rows: rows[1].float(),
    )
    expected = Fraction(sum(value * weight for value, weight in values), sum(weight for _, weight in values))
    answers = ThreadGroup(members).run(
        lambda transport: evaluate(task, nn.Linear(1, 1), values, batch, ExactAverager(transport))
    )
    assert answers == [{"loss": float(expected)}] * members


def test_it_measures_without_dropout_and_leaves_the_mode() -> None:
    module = TASK.model(0).double()
    averager = ExactAverager(LocalTransport())
    assert evaluate(TASK, module, TASK.data("valid"), 4, averager) == evaluate(
        TASK, module, TASK.data("valid"), 4, averager
    )
    assert module.training
    evaluate(TASK, module.eval(), TASK.data("valid"), 4, averager)
    assert not module.training


def test_nothing_random_is_drawn() -> None:
    module = TASK.model(0).double()
    state = torch.get_rng_state()
    evaluate(TASK, module, TASK.data("valid"), 4, ExactAverager(LocalTransport()))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_metric_must_be_measured() -> None:
    task = replace(TASK, measure=lambda module, batch: {"error": (1.0, 1.0)}, metric="accuracy")
    with pytest.raises(TrainingError, match=r"over 13 examples measured error, but the task's metric is 'accuracy'"):
        evaluate(task, TASK.model(0).double(), TASK.data("valid"), 4, ExactAverager(LocalTransport()))
