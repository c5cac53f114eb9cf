"""Which optimizers can step a part of a matrix, and evaluation that asks every replica for as many passes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raytrain.errors import RecipeError
from raytrain.optim.arguments import optimizer_options
from raytrain.optim.optimizers import make_optimizer
from raytrain.optim.options import OPTIMIZERS, is_elementwise
from raytrain.registry import resolve
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.tasks.task import Task
from raytrain.testing import ThreadGroup, ThreadTransport
from raytrain.training.build import build_replica, build_task
from raytrain.training.evaluation import evaluate
from raytrain.training.recipe import TrainRecipe


class Held(nn.Module):
    """Parameters, and nothing to compute with."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.held = nn.ParameterList(nn.Parameter(tensor.clone()) for tensor in tensors)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if is_elementwise(name)])
@settings(max_examples=5, deadline=None)
@given(rows=st.integers(1, 7), at=st.integers(0, 7), seed=st.integers(0, 2**31), decay=st.sampled_from([0.0, 0.1]))
def test_an_elementwise_optimizer_steps_parts_as_the_whole(
    name: str, rows: int, at: int, seed: int, decay: float
) -> None:
    """To rounding, because kernels treat the end of a vector by itself; whatever the cut, empty parts included."""
    torch.manual_seed(seed)
    whole = [torch.randn(rows, 3, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)]

    def cut(tensors: list[Tensor]) -> list[Tensor]:
        return [part for tensor in tensors for part in (tensor[:at], tensor[at:])]

    one, parts = Held(whole), Held(cut(whole))
    constructor = resolve(OPTIMIZERS, name, "optimizer.name")
    options = optimizer_options(name)(name=name, lr=0.1, weight_decay=decay)
    optimizers = [make_optimizer(constructor, options, module) for module in (one, parts)]
    for _ in range(4):
        gradients = [torch.randn_like(tensor) for tensor in whole]
        for module, given_to_it in ((one, gradients), (parts, cut(gradients))):
            for parameter, gradient in zip(module.held, given_to_it, strict=True):
                parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close([part.data for part in parts.held], cut([value.data for value in one.held]))


def recipe(**changes: Any) -> TrainRecipe:
    raw = {"kind": "train", "task": "raytrain.testing:tiny", "workers": 2, "sync": "fsdp"}
    return TrainRecipe.parse(raw | changes)


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(optimizer="lamb")
    assert str(caught.value) == (
        "recipe: sync.name: fsdp cannot shard lamb, whose step depends on whole matrices; expected "
        f"optimizer.name to be one of {', '.join(filter(is_elementwise, OPTIMIZERS))}, or sync.name = ddp"
    )
    with pytest.raises(
        RecipeError, match=r"optimizer.max_grad_norm: expected 0 with sync.name = fsdp, because each worker holds"
    ):
        recipe(optimizer={"name": "adan", "max_grad_norm": 1.0})
    assert recipe(optimizer="lamb", workers=1).optimizer.name == "lamb"


def test_a_worker_that_is_alone_keeps_everything() -> None:
    alone = recipe(workers=1)
    replica = build_replica(alone, build_task(alone), ExactAverager(LocalTransport()))
    assert replica.shards is None
    assert replica.local_parameters is replica.module


def test_sharded_workers_write_no_answers() -> None:
    """They would take unequal numbers of forward passes, in each of which all workers gather the parameters."""
    task = {"name": "instruct", "path": "x", "model": "y", "generate": 4}
    base = {"kind": "train", "task": task, "workers": 2, "optimizer": "adamw"}
    TrainRecipe.parse(base)
    with pytest.raises(
        RecipeError,
        match=r"task.generate: expected 0 with sync.name = fsdp, because answers call the "
        r"model",
    ):
        TrainRecipe.parse({**base, "sync": "fsdp"})


def test_threads_cannot_shard() -> None:
    two = recipe()

    def replica(transport: ThreadTransport) -> None:
        build_replica(two, build_task(two), ExactAverager(transport))

    with pytest.raises(RecipeError) as caught:
        ThreadGroup(2).run(replica)
    assert str(caught.value) == (
        "sync.name: fsdp takes workers that are processes; got ThreadTransport; set sync.name=ddp"
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 7))
def test_an_evaluation_runs_the_model_equally_often_everywhere(count: int, members: int, batch: int) -> None:
    """Or a sharded replica would wait for parameters that nobody gathers with it."""

    def passes(transport: ThreadTransport) -> int:
        module, calls = nn.Linear(1, 1), []
        module.register_forward_hook(lambda *_: calls.append(1))
        task = Task(
            model=lambda seed: module,
            data=lambda split: [],
            losses=lambda model, rows: model(rows.float()[:, None])[:, 0],
        )
        evaluate(task, module, list(range(count)), batch, ExactAverager(transport))
        return len(calls)

    assert len(set(ThreadGroup(members).run(passes))) == 1
