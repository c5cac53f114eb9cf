"""A training loop of the user's own takes the steps of `raytrain train`, to the bit."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raytrain.errors import RecipeError
from raytrain.run.checkpoint import list_checkpoints, load_part
from raytrain.run.rows import read_jsonl
from raytrain.sync.loop import CO2, DDP, CoCoD, DelayedAveraging, DiLoCo, LocalSGD, LoopSynchroniser, SlowMo
from raytrain.sync.options import SYNCHRONISERS
from raytrain.sync.transport import LocalTransport, Transport
from raytrain.testing import ThreadGroup, train_here, train_with_threads
from raytrain.training.build import build_task
from raytrain.training.loader import train_loader
from raytrain.training.recipe import TrainRecipe
from raytrain.training.zero_order import ZeroOrder
from raytrain.zeroth.objective import make_closure
from raytrain.zeroth.optimizers import ZOSGD, ZOAdam

CLASSES = [CO2, DDP, CoCoD, DelayedAveraging, DiLoCo, LocalSGD, SlowMo]
STEPS = 17
BATCH = 4
SYNCS: list[tuple[type[LoopSynchroniser], dict[str, Any]]] = [
    *((each, {}) for each in CLASSES if each is not DelayedAveraging),
    (DelayedAveraging, {"delay": 2}),
    (LocalSGD, {"compression": "int8", "buffers": "local"}),
]


def recipe(**fields: Any) -> TrainRecipe:
    task = {"name": "raytrain.testing:tiny", "norm": True}
    fixed = {"steps": STEPS, "batch": BATCH, "clip": 0, "schedule": {"name": "constant"}, "log": {"loggers": []}}
    return TrainRecipe.parse({"kind": "train", "task": task, **fixed, **fields})


def trained(run: Path) -> dict[str, Any]:
    model: dict[str, Any] = load_part(list_checkpoints(run / "checkpoints")[-1], 0)["model"]
    return model


def equal(module: nn.Module, saved: dict[str, Any]) -> bool:
    state = module.state_dict()
    return state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in saved)


@pytest.mark.parametrize(("method", "options"), SYNCS)
def test_it_takes_the_steps_of_a_recipe(
    tmp_path: Path, method: type[LoopSynchroniser], options: dict[str, Any]
) -> None:
    every = {} if method is DDP else {"sync_every": 5}
    sync = {"name": method.name, **({} if method is DDP else {"every": 5}), **options}
    told = recipe(workers=2, sync=sync, optimizer={"name": "sgd", "lr": 0.25, "momentum": 0.9, "weight_decay": 0})
    task = build_task(told)

    def own_loop(transport: Transport) -> nn.Module:
        model = task.model(told.seed).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.9, fused=True)
        loader = train_loader(task, told.task, told.seed)
        with method(model, optimizer, transport=transport, **every, **options) as kept:
            for step in range(STEPS):
                [(batch, _)] = loader.load(BATCH * (2 * step + transport.rank), BATCH, 1)
                batch = {name: value.float() for name, value in batch.items()}
                weights = task.weights(batch)
                kept.weight = weights.sum().item()
                optimizer.zero_grad()
                ((task.losses(model, batch) * weights).sum() / weights.sum()).backward()
                optimizer.step()
            with kept.synced_parameters():
                shared = [value.clone() for value in model.parameters()]
        assert len(shared) == len(list(model.parameters()))
        return model

    replicas = ThreadGroup(2).run(own_loop)
    saved = trained(train_with_threads(told, tmp_path / "run").path)
    assert [equal(replica, saved) for replica in replicas] == [True, True]


def test_every_synchroniser_of_the_table_but_fsdp_has_a_class() -> None:
    """Which replaces parameters before an optimizer of them can exist."""
    assert {each.name for each in CLASSES} == SYNCHRONISERS.keys() - {"fsdp"}


def test_a_run_resumes_in_the_middle_of_a_round() -> None:
    def replica(transport: Transport, parts: list[int]) -> nn.Module:
        model = nn.Linear(2, 1)
        nn.init.ones_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer, states = torch.optim.SGD(model.parameters(), lr=0.001), None
        for part, steps in enumerate(parts):
            sync = DiLoCo(model, optimizer, sync_every=4, transport=transport)
            if states:
                sync.load_state_dict(states, states)
            with sync:
                for step in range(steps):
                    optimizer.zero_grad()
                    (model(torch.full((1, 2), 1.0 + step + sum(parts[:part]))) - 1).square().sum().backward()
                    optimizer.step()
                states = sync.state_dict()
                with sync.synced_parameters():
                    anchor = {name: value.clone() for name, value in model.state_dict().items()}
            model.load_state_dict(anchor)
        return model

    whole, halves = replica(LocalTransport(), [10]), replica(LocalTransport(), [6, 4])
    assert equal(whole, halves.state_dict())


def test_all_replicas_stop_together() -> None:
    def replica(transport: Transport) -> int:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with LocalSGD(model, optimizer, sync_every=3, transport=transport) as sync:
            for step in range(20):
                if sync.should_stop:
                    return step
                if transport.rank == 1 and step == 4:
                    sync.request_stop()
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
        return 20

    assert ThreadGroup(2).run(replica) == [7, 7]


def test_hooks_end_with_the_block_and_closures_are_refused() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with DDP(model, optimizer), pytest.raises(TypeError, match="DDP: optimizer.step takes no closure here"):
        optimizer.step(lambda: 0.0)
    optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match="mine"), LocalSGD(model, optimizer):
        raise ValueError("mine")
    with pytest.raises(RecipeError, match=r"DiLoCo.outer_lr: expected greater than 0; got -1"):
        DiLoCo(model, optimizer, outer_lr=-1)
    with pytest.raises(RecipeError, match=r"DiLoCo.outer_rate: no such field; did you mean outer_lr\?"):
        DiLoCo(model, optimizer, outer_rate=1)


@pytest.mark.parametrize("name", ["zo-sgd", "zo-adam"])
def test_zeroth_order_steps_are_those_of_a_recipe(tmp_path: Path, name: str) -> None:
    zo = {"eps": 1e-3, "num_perturbations": 2}
    told = recipe(task="digits", optimizer={"name": name, "lr": 1e-3}, zo=zo, seed=3)
    told = told.with_overrides({"task.widths": [4], "task.norm": "none"})
    task = build_task(told)
    model = task.model(told.seed)
    make = {"zo-sgd": ZOSGD, "zo-adam": ZOAdam}[name]
    zeroth = ZeroOrder(model, make(model.parameters(), lr=1e-3), seed=told.seed, transport=LocalTransport(), **zo)
    loader, losses = train_loader(task, told.task, told.seed), []
    random.seed(5)
    for step in range(STEPS):
        [(batch, _)] = loader.load(BATCH * step, BATCH, 1)
        random.seed(step)
        losses.append(zeroth.step(make_closure(task, model, [(batch, torch.ones(BATCH))], (), None, ""))["loss"])
        assert random.random() == random.Random(step).random(), "the loop's own draws go on"
    run = train_here(told.with_overrides({"log.every": 1}), tmp_path / "run")
    rows = [row["loss"] for row in read_jsonl(run.metrics) if "loss" in row]
    assert losses == rows
    assert equal(model, trained(run.path))


def test_zeroth_order_options_are_checked() -> None:
    model = nn.Linear(2, 1)
    optimizer = ZOSGD(model.parameters(), lr=1e-3)
    with pytest.raises(RecipeError, match=r"ZeroOrder.eps: expected greater than 0; got 0"):
        ZeroOrder(model, optimizer, eps=0)
    with pytest.raises(RecipeError, match=r"ZeroOrder.objective: expected none; the closure"):
        ZeroOrder(model, optimizer, objective="accuracy")
    with pytest.raises(RecipeError, match=r"sync.name: no such name 'one-bit'; did you mean one-byte\?"):
        ZeroOrder(model, optimizer, sync="one-bit")
