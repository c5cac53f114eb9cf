"""Noise added to gradients: its moments, and what it depends on."""

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raytrain.optim.gradient_noise import add_gradient_noise
from raytrain.run.rows import read_jsonl
from raytrain.sync.averaging import ExactAverager
from raytrain.testing import ThreadGroup, ThreadTransport, tiny, train_here
from raytrain.training.build import build_replica
from raytrain.training.evaluation import evaluate
from raytrain.training.loader import IndexedLoader
from raytrain.training.loop import train
from raytrain.training.recipe import TrainRecipe
from raytrain.training.segment import loop_config


def noise(seed: int = 0, step: int = 0, variance: float = 0.3, decay: float = 0.55) -> dict[str, Tensor]:
    module = nn.ModuleDict({"a": nn.Linear(200, 100), "b": nn.Linear(200, 100), "frozen": nn.Linear(3, 3)})
    for name in "ab":
        for parameter in module[name].parameters():
            parameter.grad = torch.zeros_like(parameter)
    add_gradient_noise(module, seed, step, variance, decay)
    return {name: value.grad for name, value in module.named_parameters() if value.grad is not None}


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.floats(1e-3, 10), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_it_has_mean_zero_and_the_variance_of_the_paper(seed: int, step: int, variance: float, decay: float) -> None:
    drawn = noise(seed, step, variance, decay)["a.weight"].double() / (variance / (1 + step) ** decay) ** 0.5
    assert abs(drawn.mean()) < 6 / 20000**0.5
    assert abs(drawn.var() - 1) < 6 * (2 / 20000) ** 0.5


def test_it_follows_from_the_seed_the_step_and_the_name() -> None:
    one = noise()
    assert all(torch.equal(value, noise()[name]) for name, value in one.items())
    others = [one["b.weight"], noise(seed=1)["a.weight"], noise(step=1, decay=0.0)["a.weight"]]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([one["a.weight"].flatten(), other.flatten()]))[0, 1]) < 6 / 20000**0.5
    assert one.keys() == {"a.weight", "a.bias", "b.weight", "b.bias"}


def recipe(**changes: Any) -> TrainRecipe:
    base = {"kind": "train", "task": "raytrain.testing:tiny", "precision": "float64", "seed": 3, "steps": 8}
    more = {"optimizer.gradient_noise": 0.1, "schedule.name": "constant", "log.loggers": [], "log.every": 1}
    return TrainRecipe.parse(base).with_overrides({**more, "evaluation.every": 0, **changes})


class Silent:
    """A watch that does nothing."""

    def __init__(self, task: Any, transport: Any) -> None:
        self.measure = partial(evaluate, task, examples=task.data("valid"), batch=5, averager=ExactAverager(transport))

    def stop_requested(self) -> bool:
        return False

    def evaluate(self, replica: Any) -> dict[str, float]:
        return self.measure(module=replica.module)

    def on_step(self, *_: Any) -> None: ...
    def save(self, *_: Any) -> None: ...
    def save_metrics(self, *_: Any) -> None: ...


@pytest.mark.parametrize("members", [2, 3])
def test_any_number_of_workers_adds_the_same(members: int) -> None:
    one_at_a_time = threading.Lock()  # threads share the generator that draws the first weights

    def final(transport: ThreadTransport, noisy: float = 0.1) -> list[Tensor]:
        settings = recipe(**{"optimizer.gradient_noise": noisy})
        task = tiny(settings.task)
        with one_at_a_time:
            replica = build_replica(settings, task, ExactAverager(transport))
        plan = replace(loop_config(settings), batch=6 // len(transport.members))
        train(replica, task, IndexedLoader(task, task.data("train"), plan.seed), plan, Silent(task, transport))
        return [value.detach() for value in replica.module.parameters()]

    (alone,) = ThreadGroup(1).run(final)
    (without,) = ThreadGroup(1).run(partial(final, noisy=0.0))
    together = ThreadGroup(members).run(final)
    assert all(all(map(torch.equal, together[0], other)) for other in together)
    for one, other in zip(alone, together[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert not all(map(torch.allclose, alone, without))


def test_a_resumed_run_draws_what_the_uninterrupted_one_would(tmp_path: Path) -> None:
    straight = train_here(recipe(), tmp_path / "straight")
    train_here(recipe(steps=5), tmp_path / "resumed")
    resumed = train_here(recipe(), tmp_path / "resumed")

    def losses(run: Any) -> list[tuple[int, float]]:
        return [(row["step"], row["loss"]) for row in read_jsonl(run.metrics) if "loss" in row]

    assert losses(resumed) == losses(straight)
    assert len(losses(straight)) == 8
