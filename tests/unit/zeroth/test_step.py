"""Training without gradients through the same loop: each stepper moves as it says, on any number of workers."""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raytrain.errors import CheckpointError, RecipeError
from raytrain.optim.arguments import optimizer_options
from raytrain.optim.optimizers import make_optimizer
from raytrain.optim.options import ZEROTH_ORDER
from raytrain.optim.state import load_state_by_name, state_by_name
from raytrain.overrides import apply_overrides
from raytrain.registry import resolve
from raytrain.run.checkpoint import load_part, step_name
from raytrain.run.directory import RunDirectory
from raytrain.run.rows import read_jsonl
from raytrain.seeds.directions import Directions
from raytrain.seeds.prng import noise, parameter_id
from raytrain.seeds.records import TRAJECTORY_MAGIC, read_trajectory, trajectory_steps
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.options import ScalarOptions
from raytrain.sync.scalars import scalars
from raytrain.sync.transport import LocalTransport
from raytrain.tasks.task import Task
from raytrain.testing import (
    ThreadGroup,
    ThreadTransport,
    TinyOptions,
    tiny,
    train_here,
    train_with_gloo,
    train_with_threads,
)
from raytrain.training.build import resolve_recipe
from raytrain.training.evaluation import evaluate
from raytrain.training.recipe import TrainRecipe
from raytrain.zeroth.objective import make_closure
from raytrain.zeroth.optimizers import ZOSGD, ZerothOrderOptimizer, ZOConservative, directions_of
from raytrain.zeroth.perturbed import PerturbedModel
from raytrain.zeroth.replay import replay_trajectory
from raytrain.zeroth.step import ZeroOrderStep
from raytrain.zeroth.trajectory import Trajectory


def recipe(optimizer: str = "zo-sgd", **more: Any) -> TrainRecipe:
    hybrid = {"zo.first_order": ["out.bias"], "zo.trajectory": False} if "hybrid" in optimizer else {}
    fields = {
        **hybrid,
        "kind": "train",
        "task": "raytrain.testing:tiny",
        "optimizer": {"name": optimizer, "lr": 0.02 if "sign" in optimizer or "adam" in optimizer else 0.05},
        "schedule.name": "constant",
        "steps": 60,
        "batch": 10,
        "evaluation.every": 0,
        "checkpoint.every": 20,
        "log": {"every": 20, "loggers": []},
    }
    return TrainRecipe.parse(apply_overrides({}, {**fields, **more}))


def weights(run: RunDirectory) -> dict[str, Tensor]:
    assert run.failure() is None
    newest = max(run.checkpoints.glob("[!.]*"))
    model: dict[str, Tensor] = load_part(newest, 0)["model"]
    return model


def equal(one: RunDirectory, other: RunDirectory) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("optimizer", ZEROTH_ORDER)
def test_every_stepper_learns_and_its_trajectory_retraces_it_to_the_bit(optimizer: str, tmp_path: Path) -> None:
    plan = recipe(optimizer, **{"zo.num_perturbations": 2, "evaluation.every": 20, "optimizer.groups": GROUPS})
    run = train_here(plan, tmp_path / "run")
    losses = [row["valid"]["loss"] for row in read_jsonl(run.metrics) if "valid" in row]
    plain, task = resolve_recipe(plan, run)
    module = task.model(plain.seed)
    before = evaluate(task, module, task.data("valid"), 13, ExactAverager(LocalTransport()))["loss"]
    assert losses[-1] < 0.8 * before
    if "hybrid" in optimizer:
        assert not run.trajectory.exists()
        return
    assert replay_trajectory(run.trajectory, module) == 60
    named = dict(module.named_parameters())
    assert all(torch.equal(named[name], value) for name, value in weights(run).items() if name in named)
    assert run.trajectory.stat().st_size < 60 * 2 * 26 + 1500


@pytest.mark.parametrize(
    ("slope", "rate", "way"),
    [(2.0, 0.1, 1.0), (-2.0, 0.1, -1.0), (2.0, 10.0, 0.0), (2.0, math.inf, 0.0)],
    ids=["against", "along", "not at all", "not finite"],
)
@torch.no_grad()
def test_a_conservative_step_goes_where_the_loss_is_least(slope: float, rate: float, way: float) -> None:
    """Of w^2 at w = 1 along z, 1 or -1, the slope is 2 z; where it is said to be -2 z, it is better to go back."""
    module = nn.Linear(1, 1, bias=False)
    module.weight.fill_(1.0)
    optimizer = ZOConservative(module.parameters(), lr=1.0)
    probe = PerturbedModel(module, Directions.of(dict(module.named_parameters())))
    for seed in range(4):
        z = float(noise("rademacher", seed, parameter_id("weight"), 0, 1)[0])
        decided = optimizer.select([(seed, slope * z)], rate, probe, lambda: module(torch.ones(1, 1)).square().sum())
        assert decided == [(seed, slope * z * way)]


def test_a_loss_is_the_mean_over_all_examples_of_its_micro_batches() -> None:
    task = tiny(TinyOptions(name="tiny"))
    module, examples = task.model(0).double(), task.data("train")[:9]
    cut = [task.collate(examples[start:stop]) for start, stop in ((0, 2), (2, 3), (3, 9))]
    parts = make_closure(task, module, [(one, task.weights(one)) for one in cut], (0, 0, 0), None, "")
    whole = task.collate(examples)
    values, weight = task.losses(module, whole), task.weights(whole)
    torch.testing.assert_close(parts(), (values * weight).sum() / weight.sum())


CALLED: list[bool] = []
"""For each call of the loss of `watched`, whether the model was in training mode."""


def watched() -> Task:
    def losses(module: nn.Module, batch: Tensor) -> Tensor:
        CALLED.append(module.training)
        return module(batch)[:, 0].square()

    return Task(
        model=lambda seed: nn.Linear(3, 1),
        data=lambda split: list(torch.randn(20, 3, generator=torch.Generator().manual_seed(1))),
        losses=losses,
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "fields", "calls"),
    [
        ("zo-sgd", {"zo.num_perturbations": 3}, 6),
        ("zo-sgd", {"zo.num_perturbations": 3, "zo.estimator": "forward"}, 4),
        ("zo-sgd", {"zo.num_perturbations": 3, "batch": 5, "accumulate": 2}, 12),
        ("zo-sgd-conservative", {"zo.num_perturbations": 2}, 9),
        ("forward-gradient", {"zo.num_perturbations": 3}, 3),
    ],
)
def test_a_step_has_as_many_passes_as_it_says(
    optimizer: str, fields: dict[str, Any], calls: int, training: bool, tmp_path: Path
) -> None:
    found = []
    for length in (2, 5):
        CALLED.clear()
        more = {"task": f"{__name__}:watched", "steps": length, "zo.train_mode": training, **fields}
        assert train_here(recipe(optimizer, **more), tmp_path / str(length)).failure() is None
        found.append(len(CALLED))
        assert set(CALLED[: 2 * calls]) == {training}
    assert found[1] - found[0] == 3 * calls


GROUPS = [{"match": "out.bias", "lr_scale": 0.25}]


@pytest.mark.parametrize(
    "options",
    [
        {"zo.distribution": "gaussian"},
        {"zo.estimator": "forward"},
        {"zo.sparsity": 0.5},
        {"zo.train_mode": True, "task.dropout": 0.2},
        {"batch": 4, "accumulate": 3},
        {"zo.outlier_threshold": 3.0},
        {"precision": "float64"},
        {"precision": "bfloat16"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_trains_and_retraces(options: dict[str, Any], tmp_path: Path) -> None:
    plan = recipe(**options)
    run = train_here(plan, tmp_path / "run")
    module = resolve_recipe(plan, run)[1].model(plan.seed)
    if plan.precision == "float64":
        module.double()
    replay_trajectory(run.trajectory, module)
    named, found = dict(module.named_parameters()), weights(run)
    assert all(torch.equal(named[name], value) for name, value in found.items() if name in named)
    logged = [row for row in read_jsonl(run.metrics) if "projected_gradient" in row]
    assert logged
    assert all(math.isfinite(row["loss"]) and row["projected_gradient"] > 0 for row in logged)


def test_a_hybrid_moves_some_by_their_gradients_and_the_others_along_directions(tmp_path: Path) -> None:
    """One step of AdamW is of the size of its rate, whatever the gradient; the others move as zo-sgd moves them."""
    fields = {"task": f"{__name__}:two_layers", "steps": 1, "optimizer.lr": 0.01}
    plain = weights(train_here(recipe(**fields), tmp_path / "plain"))
    more = {"optimizer.first_order_lr": 0.125, "optimizer.weight_decay": 0.0, "zo.first_order": ["last.*"]}
    both = weights(train_here(recipe("zo-hybrid", **fields, **more), tmp_path / "both"))
    first = two_layers().model(0).state_dict()
    torch.testing.assert_close((both["last.weight"] - first["last.weight"]).abs(), torch.full((1, 3), 0.125))
    moved, alike = both["first.weight"] - first["first.weight"], plain["first.weight"] - first["first.weight"]
    assert torch.equal(moved.sign().abs(), torch.ones(3, 2))
    assert torch.equal(moved.sign() * alike.sign(), (moved.sign() * alike.sign())[0, 0].expand(3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_that_lose_small_moves_are_spoken_of(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    name = "narrow" if dtype == torch.bfloat16 else "two_layers"
    assert train_here(recipe(task=f"{__name__}:{name}", steps=2), tmp_path / "run").failure() is None
    spoken = ["parameters in bfloat16 round away updates" in text for text in caplog.messages]
    assert spoken == ([True] if dtype == torch.bfloat16 else [])


def narrow() -> Task:
    """Return the task of two layers, in bfloat16."""
    return Task(
        model=lambda seed: TwoLayers().bfloat16(),
        data=lambda split: list(torch.randn(20, 2, generator=torch.Generator().manual_seed(1)).bfloat16()),
        losses=lambda module, batch: (module(batch) - 2).float().square(),
    )


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.first(x)))
        return y[:, 0]


def two_layers() -> Task:
    """Return a task with a first and a last layer."""
    return Task(
        model=lambda seed: TwoLayers(),
        data=lambda split: list(torch.randn(20, 2, generator=torch.Generator().manual_seed(1))),
        losses=lambda module, batch: (module(batch) - 2).square(),
    )


@pytest.mark.parametrize("optimizer", ["zo-sgd", "zo-adam", "zo-hybrid"])
def test_a_resumed_run_is_the_uninterrupted_one(optimizer: str, tmp_path: Path) -> None:
    whole = train_here(recipe(optimizer, **{"zo.outlier_threshold": 2.0}), tmp_path / "whole")
    train_here(recipe(optimizer, **{"zo.outlier_threshold": 2.0, "steps": 35}), tmp_path / "parts")
    parts = train_here(recipe(optimizer, **{"zo.outlier_threshold": 2.0}), tmp_path / "parts")
    assert equal(whole, parts)
    if "hybrid" not in optimizer:
        assert whole.trajectory.read_bytes() == parts.trajectory.read_bytes()


@pytest.mark.parametrize("sync", ["scalars", "one-byte"])
def test_threads_and_processes_make_the_same_moves(sync: str, tmp_path: Path) -> None:
    plan = recipe(sync=sync, workers=2, **{"sync.check_every": 10})
    threads = train_with_threads(plan, tmp_path / "threads")
    assert train_with_gloo(plan, tmp_path / "gloo") == [0, 0]
    assert equal(threads, RunDirectory(tmp_path / "gloo"))
    assert threads.trajectory.read_bytes() == RunDirectory(tmp_path / "gloo").trajectory.read_bytes()


def test_a_worker_more_takes_up_where_the_others_were(tmp_path: Path) -> None:
    train_with_threads(recipe(sync="one-byte", workers=2, steps=40), tmp_path / "run")
    run = train_with_threads(recipe(sync="one-byte", workers=3, steps=60), tmp_path / "run")
    _, records = read_trajectory(run.trajectory)
    assert [len(step.projected_gradients) for step in trajectory_steps(records)] == [2] * 40 + [3] * 20
    plan = recipe()
    module = resolve_recipe(plan, run)[1].model(plan.seed)
    assert replay_trajectory(run.trajectory, module) == 60
    named = dict(module.named_parameters())
    assert all(torch.equal(named[name], value) for name, value in weights(run).items() if name in named)


def test_seeds_are_those_of_the_step_the_worker_and_the_place(tmp_path: Path) -> None:
    one = train_here(recipe(**{"zo.num_perturbations": 2, "steps": 1}), tmp_path / "one")
    _, records = read_trajectory(one.trajectory)
    assert [int(seed) for seed in records["seed"]] == [
        ZeroOrderStep.direction_seed(0, 0, 0, 0),
        ZeroOrderStep.direction_seed(0, 0, 0, 1),
    ]
    two = train_with_threads(recipe(sync="scalars", workers=2, steps=1, batch=5), tmp_path / "two")
    _, records = read_trajectory(two.trajectory)
    assert [int(seed) for seed in records["seed"]] == [
        ZeroOrderStep.direction_seed(0, 0, 0, 0),
        ZeroOrderStep.direction_seed(0, 0, 1, 0),
    ]


@pytest.mark.parametrize("name", ["zo-sgd", "zo-sgd-sign", "zo-sgd-momentum", "zo-adam"])
def test_a_stepper_takes_the_step_of_torch_on_the_mean_of_slope_times_direction(name: str) -> None:
    """Written out with the numbers of prng.py: sign, factor, mean, lr_scale and two steps in a row."""
    fields = {"name": name, "lr": 0.01, "groups": [{"match": "bias", "lr_scale": 4.0}]}
    options = TrainRecipe.parse({"kind": "train", "task": "raytrain.testing:tiny", "optimizer": fields}).optimizer
    module, twin = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()
    twin.load_state_dict(module.state_dict())
    optimizer = make_optimizer(resolve(ZEROTH_ORDER, name, "optimizer.name"), options, module)
    assert isinstance(optimizer, ZerothOrderOptimizer)
    optimizer.bind(directions_of(module, optimizer, distribution="rademacher", sparsity=0.0, blockwise=False))
    groups = [{"params": [twin.weight], "lr": 0.01}, {"params": [twin.bias], "lr": 0.04}]
    momentum = 0.9 if "momentum" in name else 0.0
    theirs = torch.optim.Adam(groups) if name == "zo-adam" else torch.optim.SGD(groups, momentum=momentum)
    for slopes in ([(3, 0.5), (2**63, -2.0)], [(8, 0.25), (9, 0.0)]):
        optimizer.apply(slopes, 0.01)
        for key, parameter, length in (("weight", twin.weight, 1.0), ("bias", twin.bias, 2.0)):
            parts = [
                (float(np.sign(slope)) if "sign" in name else slope)
                * torch.from_numpy(noise("rademacher", seed, parameter_id(key), 0, parameter.numel())).double()
                for seed, slope in slopes
            ]
            # With sqrt(lr_scale) in a direction, what a slope says of the gradient is that much too large there.
            parameter.grad = torch.stack(parts).mean(0).view_as(parameter) / length
        theirs.step()
        for ours, wanted in zip(module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["zo-sgd-momentum", "zo-adam"])
def test_what_a_stepper_holds_does_not_depend_on_the_type_of_the_parameters(name: str, dtype: torch.dtype) -> None:
    """Averages in the parameter's type would stand still at half of what they average, and squares vanish."""
    fields = {"kind": "train", "task": "raytrain.testing:tiny", "optimizer": {"name": name, "lr": 0.01}}
    options = TrainRecipe.parse(fields).optimizer

    def stepper(dtype: torch.dtype) -> tuple[nn.Module, ZerothOrderOptimizer]:
        module = nn.Linear(5, 3).to(dtype)
        optimizer = make_optimizer(resolve(ZEROTH_ORDER, name, "optimizer.name"), options, module)
        assert isinstance(optimizer, ZerothOrderOptimizer)
        optimizer.bind(directions_of(module, optimizer, distribution="rademacher", sparsity=0.0, blockwise=False))
        return module, optimizer

    (module, narrow), (plain, exact) = stepper(dtype), stepper(torch.float32)
    for step in range(40):
        if step == 20:
            saved = state_by_name(narrow, module)
            module, narrow = stepper(dtype)
            load_state_by_name(narrow, module, saved, options)
        for optimizer in (narrow, exact):
            optimizer.apply([(2 * step, 1e-4), (2 * step + 1, -3e-5)], 1e-3)
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert one.dtype == dtype
        assert torch.isfinite(one).all()
        kept, wanted = narrow.state[one], exact.state[other]
        assert all(kept[key].dtype == torch.float32 and torch.equal(kept[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", ["zo-sgd-momentum", "zo-adam", "zo-hybrid"])
def test_a_run_goes_on_in_another_type(name: str, precision: str, tmp_path: Path) -> None:
    """What a stepper holds takes the type that it would have from the first step."""
    fields = {"zo.trajectory": False, "steps": 4, "checkpoint.every": 2}
    other = {"float32": "float64", "float64": "float32"}[precision]
    train_here(recipe(name, **fields, precision=precision), tmp_path / "run")
    run = train_here(recipe(name, **{**fields, "steps": 8}, precision=other), tmp_path / "run")
    assert {value.dtype for value in weights(run).values() if value.is_floating_point()} == {getattr(torch, other)}
    saved = load_part(max(run.checkpoints.glob("[!.]*")), 0)["optimizer"]["state"]
    assert {entry.dtype for one in saved.values() for entry in one.values() if entry.dim()} == {getattr(torch, other)}


def test_a_loss_draws_the_same_dropout_in_every_call_and_another_one_in_every_step() -> None:
    task = tiny(TinyOptions(name="tiny", dropout=0.5))
    module, batch = task.model(0).double().train(), torch.utils.data.default_collate(task.data("train")[:20])

    def loss(step: int) -> float:
        with torch.no_grad():
            made = make_closure(task, module, [(batch, torch.ones(20))], (0, 0, step), None, "")
            once, again = float(made()), float(made())
        assert once == again
        return once

    assert len({loss(step) for step in range(3)}) == 3


STARTS = itertools.count()


def uneven() -> Task:
    """Return a task whose workers start from weights that differ."""

    def model(seed: int) -> nn.Module:
        torch.manual_seed(next(STARTS))
        return nn.Linear(3, 4)

    return Task(
        model=model,
        data=lambda split: list(torch.randn(20, 3, generator=torch.Generator().manual_seed(1))),
        losses=lambda module, batch: (module(batch) - 2).square().mean(1),
    )


def test_a_mask_is_that_of_the_first_workers_weights(tmp_path: Path) -> None:
    more = {"task": f"{__name__}:uneven", "zo.sparsity": 0.5, "sync.check_every": 5}
    run = train_with_threads(recipe(sync="scalars", workers=2, **more), tmp_path / "run")
    assert run.failure() is None
    assert len(weights(run)) == 2


class Steep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, 1)
        self.calls = 0


def steep() -> Task:
    """Return a task whose loss is not finite, or far out, in some calls."""

    def losses(module: nn.Module, batch: Tensor) -> Tensor:
        assert isinstance(module, Steep)
        module.calls += 1
        here = module.layer(batch.float()[:, None])[:, 0].square()
        return here * (math.nan if 60 <= module.calls % 100 < 62 else 1e6 if 80 <= module.calls % 100 < 81 else 1)

    return Task(
        model=lambda seed: Steep(),
        data=lambda split: [torch.tensor(float(place)) for place in range(20)],
        losses=losses,
    )


def test_what_is_not_finite_or_far_out_is_reported_and_not_applied(tmp_path: Path) -> None:
    more = {"task": f"{__name__}:steep", "log.every": 1, "zo.outlier_threshold": 20.0, "optimizer.lr": 1e-4}
    run = train_here(recipe(**more, batch=4), tmp_path / "run")
    skipped = [row["step"] for row in read_jsonl(run.metrics) if row.get("skipped")]
    assert len(skipped) >= 2
    _, records = read_trajectory(run.trajectory)
    assert {step.step for step in trajectory_steps(records) if not step.projected_gradients} == {
        step - 1 for step in skipped
    }
    assert np.isfinite(records["projected_gradient"]).all()
    module = resolve_recipe(recipe(**more), run)[1].model(0)
    assert replay_trajectory(run.trajectory, module) == 60
    assert all(torch.equal(value, weights(run)[name]) for name, value in module.named_parameters())


FAR_OUT = (4, 40)
"""Calls of the loss: the first is watched, and a step has two."""


def early() -> Task:
    """Return a task whose loss is far out in the second step, and later again."""

    def losses(module: nn.Module, batch: Tensor) -> Tensor:
        assert isinstance(module, Steep)
        module.calls += 1
        return (module.layer(batch.float()[:, None])[:, 0] - 3).square() * (1e9 if module.calls in FAR_OUT else 1)

    return Task(
        model=lambda seed: Steep(), data=lambda split: [torch.tensor(float(place)) for place in range(8)], losses=losses
    )


def test_what_is_far_out_in_the_second_step_is_not_applied_and_does_not_become_ordinary(tmp_path: Path) -> None:
    more = {"task": f"{__name__}:early", "log.every": 1, "optimizer.lr": 1e-6, "batch": 8}
    run = train_here(recipe(**more), tmp_path / "run")
    skipped = [row["step"] for row in read_jsonl(run.metrics) if row.get("skipped")]
    assert {2, FAR_OUT[1] // 2} <= set(skipped)
    assert run.failure() is None
    assert np.abs(read_trajectory(run.trajectory)[1]["projected_gradient"]).max() < 1e4


@pytest.mark.parametrize("blocks", [1, 2])
def test_ordinary_is_what_most_recent_slopes_are(blocks: int) -> None:
    module = nn.Linear(2, 1)
    optimizer = make_optimizer(ZOSGD, optimizer_options("zo-sgd")(name="zo-sgd"), module)
    space = Directions.of(dict(module.named_parameters()), blocks={"bias": blocks - 1})
    zeroth = ZeroOrderStep(PerturbedModel(module, space), optimizer, None, 1, 1e-3, "central", False, "", 10.0, False)

    def usable(*sizes: float) -> int:
        """Count them, of the last block; slopes of another one are of another size."""
        own = [(blocks * place + blocks - 1, size) for place, size in enumerate(sizes)]
        other = [(blocks * place, 1e-7) for place in range(blocks - 1)]
        return len(zeroth._reject_outliers([*other, *own])) - len(other)

    assert usable(1.0, -1e12, math.nan, 0.0) == 2
    assert usable(-9.0) == 1
    assert usable(-1e3, 1.0, 1.0) == 2
    assert sum(usable(1e3) for _ in range(60)) > 20  # they have grown
    assert sum(usable(1e-3) for _ in range(60)) == 60


def broken() -> Task:
    """Return a task whose loss is never finite."""
    return Task(
        model=lambda seed: nn.Linear(1, 1),
        data=lambda split: [torch.tensor(1.0)],
        losses=lambda module, batch: module(batch[:, None])[:, 0] * math.nan,
    )


def test_a_run_without_usable_slopes_is_given_up(tmp_path: Path) -> None:
    run = train_here(recipe(task=f"{__name__}:broken"), tmp_path / "run")
    failure = run.failure()
    assert failure is not None
    assert failure.message.startswith(
        "no perturbation of steps 1 to 20 gave a usable projected gradient, and the objective is nan; a lower "
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sync": "ddp"}, "sync.name: expected scalars or one-byte with zo-sgd; got ddp"),
        ({"optimizer": "adamw", "sync": "one-byte"}, "sync.name: expected one of the others with adamw; got one-byte"),
        ({"freeze.random_half": True}, "freeze.random_half: expected none with zo-sgd, which makes no backward pass"),
        (
            {"optimizer.name": "zo-sgd-conservative", "optimizer.lr": 1e-3, "workers": 2},
            "workers: expected 1 with zo-sgd-conservative, which decides by a loss; got 2",
        ),
        (
            {"optimizer.name": "zo-hybrid", "optimizer.lr": 1e-3, "zo.first_order": ["out.*"]},
            "optimizer.name: zo-hybrid takes workers = 1, zo.trajectory = false",
        ),
        (
            {"optimizer.name": "forward-gradient", "zo.objective": "accuracy"},
            "zo.objective: expected none with forward-gradient, which differentiates it",
        ),
        ({"zo.first_order": ["out.*"]}, "zo.first_order: expected none with zo-sgd"),
        (
            {"zo.outlier_threshold": 0.5},
            "outlier_threshold: expected 0 or at least 1, a standard deviation of projected gradients; got 0.5",
        ),
        (
            {"zo.num_perturbations": 40_000, "workers": 2},
            "zo.num_perturbations: expected at most 65535 of all workers with a trajectory; got 2 times 40000; set",
        ),
        ({"compile": "aot_eager"}, "compile: expected none with zo-sgd"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_starts(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        TrainRecipe.parse(
            apply_overrides(
                {}, {"kind": "train", "task": "raytrain.testing:tiny", "optimizer.name": "zo-sgd", **fields}
            )
        )
    assert message in str(caught.value)


def test_replicas_count_by_the_weight_of_their_losses() -> None:
    """Of a linear loss per replica, w_1 = 3 and w_2 = 1: moves are by the mean of weighted slope times direction."""
    loads, gradients = (3.0, 1.0, 0.0), torch.tensor([[1.0, 2.0, -0.5], [-4.0, 0.25, 1.0], [9.0, 9.0, 9.0]])
    count, lr = 4, 0.5

    def replica(transport: ThreadTransport) -> Tensor:
        module = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(module.weight)
        optimizer = make_optimizer(ZOSGD, optimizer_options("zo-sgd")(name="x", lr=lr), module)
        space = directions_of(module, optimizer, distribution="rademacher", sparsity=0.0, blockwise=False)
        optimizer.bind(space)
        sync = scalars(ExactAverager(transport), ScalarOptions(name="scalars"))
        sync.attach(module)
        sync.set_weight(loads[transport.rank])
        zeroth = ZeroOrderStep(
            PerturbedModel(module, space), optimizer, sync, count, 1e-3, "central", False, "", 0.0, True
        )
        own = gradients[transport.rank]
        zeroth.step(lambda: module(own[None])[0, 0], module, 7, (0, transport.rank), 1.0)
        return module.weight.detach()[0]

    found = ThreadGroup(3).run(replica)
    expected = torch.zeros(3, dtype=torch.float64)
    for rank, gradient in enumerate(gradients.double()):
        for k in range(count):
            z = noise("rademacher", ZeroOrderStep.direction_seed(7, 0, rank, k), parameter_id("weight"), 0, 3)
            along = torch.from_numpy(z).double()
            expected -= lr * loads[rank] / sum(loads) * (gradient @ along) * along / count
    assert all(torch.equal(one, found[0]) for one in found)
    torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=2e-3)


def accurate() -> Task:
    """Return a task with a measure that has no gradient."""

    def scores(module: nn.Module, batch: Any) -> Tensor:
        return module(batch["x"])[:, 0]

    def data(split: str) -> list[dict[str, Tensor]]:
        x = torch.randn(64, 3, generator=torch.Generator().manual_seed(len(split)))
        return [{"x": row, "y": (row.sum() > 0).float()} for row in x]

    return Task(
        model=lambda seed: nn.Linear(3, 1),
        data=data,
        losses=lambda module, batch: nn.functional.binary_cross_entropy_with_logits(
            scores(module, batch), batch["y"], reduction="none"
        ),
        measure=lambda module, batch: {
            "accuracy": (float(((scores(module, batch) > 0) == (batch["y"] > 0)).sum()), len(batch["y"]))
        },
        metric="accuracy",
        better="higher",
    )


def test_an_objective_without_a_gradient(tmp_path: Path) -> None:
    torch.manual_seed(3)
    more = {"task": f"{__name__}:accurate", "zo.objective": "accuracy", "zo.eps": 0.3, "batch": 32}
    run = train_here(recipe(**more, steps=80, **{"zo.num_perturbations": 4, "optimizer.lr": 0.1}), tmp_path / "run")
    assert run.failure() is None
    assert next(row["valid"]["accuracy"] for row in read_jsonl(run.metrics) if "valid" in row) > 0.8
    run = train_here(recipe(**(more | {"zo.objective": "f1"})), tmp_path / "no")
    failure = run.failure()
    assert failure is not None
    assert "zo.objective: expected one of the task's metrics accuracy; got 'f1'" in failure.message


@pytest.mark.parametrize(
    ("objective", "value"), [("", None), ("-loss", None), ("accuracy", -0.75), ("-accuracy", 0.75)]
)
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_an_objective_is_raised_or_with_a_minus_lowered(objective: str, value: float | None, metric: str) -> None:
    task = replace(accurate(), metric=metric, better="lower" if metric == "loss" else "higher")
    module, batch = task.model(0), torch.utils.data.default_collate(task.data("train"))
    task = replace(
        task,
        measure=lambda module, batch: {"loss": (float(task.losses(module, batch).sum()), 64), "accuracy": (48, 64)},
    )
    with torch.no_grad():
        found = make_closure(task, module, [(batch, torch.ones(64))], (0, 0, 0), None, objective)()
        expected = task.losses(module, batch).mean().item() if value is None else value
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_what_is_better_if_it_is_less_is_not_raised() -> None:
    with pytest.raises(RecipeError, match="zo.objective: lower values of loss are better; expected '-loss', to minim"):
        make_closure(accurate(), nn.Linear(3, 1), [], (0, 0, 0), None, "loss")


def test_a_trajectory_of_another_model_is_refused(tmp_path: Path) -> None:
    plan = recipe(steps=3)
    run = train_here(plan, tmp_path / "run")
    for name in ("frozen.weight", "version"):
        module = resolve_recipe(plan, run)[1].model(0)
        module.state_dict()[name].add_(1)
        for first in (0, 2):
            with pytest.raises(CheckpointError, match="expected frozen weights and buffers with digest"):
                replay_trajectory(run.trajectory, module, first)
    with pytest.raises(CheckpointError, match="expected the 4 steps that the model contains; got 3"):
        replay_trajectory(run.trajectory, resolve_recipe(plan, run)[1].model(0), 4)
    other = resolve_recipe(plan, run)[1].model(1)
    with pytest.raises(CheckpointError, match="expected weights and directions with digest"):
        replay_trajectory(run.trajectory, other)
    (tmp_path / "no").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="this is not a trajectory"):
        read_trajectory(tmp_path / "no")


def test_a_trajectory_that_was_cut_off_keeps_what_is_whole(tmp_path: Path) -> None:
    with Trajectory(tmp_path / "t", {"base": "x"}, 0) as trajectory:
        trajectory.append(0, 0.5, [(2**64 - 1, -1.5)])
        trajectory.append(2, 0.25, [(5, 1.0), (6, 2.0)])
        trajectory.append(3, 0.25, [(7, 1.0), (8, 2.0)])
    data = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(data[:-3])
    about, records = read_trajectory(tmp_path / "t")
    assert about == {"base": "x"}
    assert [(step.step, step.lr, step.projected_gradients) for step in trajectory_steps(records)] == [
        (0, 0.5, [(2**64 - 1, -1.5)]),
        (2, 0.25, [(5, 1.0), (6, 2.0)]),
    ]
    assert data.startswith(TRAJECTORY_MAGIC)
    assert json.loads(data.split(b"\n")[1])["base"] == "x"


def test_slopes_of_zero_are_no_failure(tmp_path: Path) -> None:
    more = {"task": f"{__name__}:flat", "log.every": 30, "batch": 4}
    run = train_here(recipe(**more), tmp_path / "run")
    assert run.failure() is None
    assert [row["skipped"] for row in read_jsonl(run.metrics) if "skipped" in row] == [0, 0]


@pytest.mark.parametrize("power", [-40, -20, 20, 40])
@pytest.mark.parametrize("blocks", [False, True])
def test_a_byte_holds_slopes_of_any_size(power: int, blocks: bool, tmp_path: Path) -> None:
    """With a loss 2^p times as large and a rate as much smaller, a run is the same to the bit."""
    ends = []
    for factor in (1.0, 2.0**power):
        more = {"task": f"{__name__}:scaled", "log.every": 1, "batch": 4, "steps": 30}
        SCALE[0] = factor
        rate = {"optimizer.lr": 0.01 / factor, "zo.blockwise": blocks, "zo.outlier_threshold": 5.0}
        run = train_here(recipe(**more, sync="one-byte", **rate), tmp_path / str(factor))
        ends.append(weights(run))
        logged = [row for row in read_jsonl(run.metrics) if "saturated" in row]
        assert len(logged) == 30
        assert sum(row["saturated"] + row["zeros"] for row in logged) == 0
    assert not torch.equal(ends[0]["0.weight"], scaled().model(0).state_dict()["0.weight"])
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


SCALE = [1.0]
"""What the loss of `scaled` is multiplied by."""


def scaled() -> Task:
    """Return the task of three layers, which are blocks, and a loss of a size to be given."""

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))

    return replace(watched(), model=model, losses=lambda module, batch: (module(batch)[:, 0] - 1).square() * SCALE[0])


def flat() -> Task:
    """Return a task whose loss is what it is."""
    return Task(
        model=lambda seed: nn.Linear(1, 1),
        data=lambda split: [torch.tensor(1.0)] * 4,
        losses=lambda module, batch: module(batch[:, None])[:, 0] * 0 + 1,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"zo.distribution": "gaussian"},
            "expected distribution = 'rademacher' as at the start of the run; got 'gaussian'",
        ),
        ({"zo.sparsity": 0.5}, "expected sparsity = 0.0 as at the start of the run; got 0.5"),
        (
            {"freeze.match": ["out.bias"]},
            "expected the same trainable parameters, types and scales of directions as at the start of the run; "
            "freeze.match, adapter, precision or a group's lr_scale may have changed",
        ),
        (
            {"precision": "float64"},
            "expected the same trainable parameters, types and scales of directions as at the start of the run; "
            "freeze.match, adapter, precision or a group's lr_scale may have changed",
        ),
        (
            {"optimizer.groups": [{"match": "out.bias", "lr_scale": 0.25}]},
            "expected groups = [] as at the start of the run; got [{'match': 'out.bias', 'lr_scale': 0.25, 'decay_1d': "
            "None, 'lr': None}]",
        ),
    ],
)
def test_a_run_that_moves_in_another_way_is_not_written_as_if_it_did_not(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    train_here(recipe(steps=20), tmp_path / "run")
    failure = train_here(recipe(steps=40, **change), tmp_path / "run").failure()
    assert failure is not None
    assert failure.message.startswith(f"zo.trajectory: {message}; set zo.trajectory = false")


def test_a_rate_that_all_share_changes_no_direction(tmp_path: Path) -> None:
    """Although 0.7 * 0.05 / 0.05 and 0.7 * 0.02 / 0.02 differ in their last bit."""
    groups = {"optimizer.groups": [{"match": "out.bias", "lr_scale": 0.7}]}
    train_here(recipe(steps=20, **groups), tmp_path / "run")
    run = train_here(recipe(steps=40, **groups, **{"optimizer.lr": 0.02}), tmp_path / "run")
    assert len(weights(run)) > 0
    module = resolve_recipe(recipe(**groups), run)[1].model(recipe().seed)
    assert replay_trajectory(run.trajectory, module) == 40
    assert all(torch.equal(value, weights(run)[name]) for name, value in module.named_parameters())


def test_a_rate_that_changes_how_long_directions_are_is_seen(tmp_path: Path) -> None:
    groups = {"optimizer.groups": [{"match": "out.bias", "lr": 0.05}]}
    train_here(recipe(steps=20, **groups), tmp_path / "run")
    failure = train_here(recipe(steps=40, **groups, **{"optimizer.lr": 0.02}), tmp_path / "run").failure()
    assert failure is not None
    assert "types and scales of directions" in failure.message


def test_steps_that_were_not_written_down_are_missed(tmp_path: Path) -> None:
    train_here(recipe(steps=20), tmp_path / "run")
    train_here(recipe(steps=40, **{"zo.trajectory": False}), tmp_path / "run")
    run = train_here(recipe(steps=60), tmp_path / "run")
    failure = run.failure()
    assert failure is not None
    assert failure.message.startswith(f"zo.trajectory: expected step 21 in {run.trajectory}; it is missing; ")
    with Trajectory(tmp_path / "t", {**read_trajectory(run.trajectory)[0]}, 0) as holed:
        holed.append(1, 0.5, [(1, 1.0)])
    with pytest.raises(CheckpointError, match="expected step 1 of the run next; it is missing"):
        replay_trajectory(tmp_path / "t", resolve_recipe(recipe(), run)[1].model(0))
    Trajectory(tmp_path / "bare", {"base": "x"}, 0).close()
    with pytest.raises(RecipeError, match="expected distribution = None as at the start of the run; got 'gaussian'"):
        Trajectory(tmp_path / "bare", {"zo": {"distribution": "gaussian"}, "optimizer": {}}, 1)


@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_probes_leave_the_means_of_a_batch_norm(estimator: str, tmp_path: Path) -> None:
    more = {"zo.train_mode": True, "zo.estimator": estimator, "task.norm": True, "steps": 40}
    whole = train_here(recipe(**more), tmp_path / "whole")
    assert weights(whole)["norm.num_batches_tracked"] == 0
    train_here(recipe(**{**more, "steps": 20}), tmp_path / "parts")
    assert equal(whole, train_here(recipe(**more), tmp_path / "parts"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"zo.blockwise": True}, "zo.blockwise: the model has no repeated blocks; set zo.blockwise ="),
        (
            {"optimizer.name": "zo-hybrid", "zo.first_order": ["oot.*"], "zo.trajectory": False},
            "zo.first_order: 'oot.*' matches no trainable parameter; there are out.weight, ",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_said(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    failure = train_here(recipe(**more), tmp_path / "run").failure()
    assert failure is not None
    assert message in failure.message


RETRACE = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from raytrain.zeroth.replay import replay_trajectory
from raytrain.testing import TinyModel, TinyOptions
for name in sys.argv[1:]:
    module = TinyModel(TinyOptions(name="tiny"))
    module.load_state_dict(load_file(f"{name}/first"))
    replay_trajectory(Path(name) / "trajectory.bin", module)
    save_file(module.state_dict(), f"{name}/last")
"""


def test_a_trajectory_is_retraced_to_the_bit_by_a_processor_without_vector_instructions(tmp_path: Path) -> None:
    """Torch fuses products with sums where it may, and then rounds once where it rounds twice elsewhere."""
    names = [name for name in ZEROTH_ORDER if "hybrid" not in name]
    for name in names:
        run = train_here(recipe(name, steps=20), tmp_path / name)
        save_file(resolve_recipe(recipe(name), run)[1].model(0).state_dict(), run.path / "first")
    subprocess.run(
        [sys.executable, "-c", RETRACE, *names],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
    )
    for name in names:
        last = load_file(tmp_path / name / "last")
        assert all(torch.equal(value, last[key]) for key, value in weights(RunDirectory(tmp_path / name)).items())


def test_a_checkpoint_and_the_tail_of_the_trajectory_give_the_model(tmp_path: Path) -> None:
    run = train_here(recipe(steps=40, **{"checkpoint.keep": 5}), tmp_path / "run")
    module = resolve_recipe(recipe(), run)[1].model(0)
    module.load_state_dict(load_part(run.checkpoints / step_name(20), 0)["model"])
    assert replay_trajectory(run.trajectory, module, 20) == 40
    assert all(torch.equal(value, weights(run)[name]) for name, value in module.named_parameters())
    run = train_here(recipe("zo-adam", steps=20), tmp_path / "adam")
    with pytest.raises(CheckpointError, match="zo-adam with sparsity = 0 can only be replayed from its first step"):
        replay_trajectory(run.trajectory, module, 10)
