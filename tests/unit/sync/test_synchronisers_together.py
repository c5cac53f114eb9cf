"""Every synchroniser with everything that a model may have at once, stopped and killed at any step.

Each feature has tests of its own elsewhere; these are of what comes between them. Workers are threads, runs are whole:
from the recipe to the last checkpoint.
"""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raytrain.recipe import options_parameter
from raytrain.registry import resolve
from raytrain.run.checkpoint import list_checkpoints, load_part, read_manifest
from raytrain.run.directory import RunDirectory
from raytrain.run.rows import read_jsonl
from raytrain.sync.options import ALL_SYNCHRONISERS, SCALAR_EXCHANGES
from raytrain.tasks.task import Task, TaskOptions
from raytrain.tensors import bits_of
from raytrain.testing import ONE_AT_A_TIME, repeatable_rows, train_with_threads
from raytrain.training import callbacks as watch
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import Replica

STEPS = 12
SPREADS = torch.tensor([30.0, 1.0, 0.1, 0.01])
"""Standard deviations of what the BatchNorm sees: differences of one variance are larger than another variance."""


class EverythingOptions(TaskOptions):
    """Options of the task.

    Attributes:
        norm: whether the model has a BatchNorm.
        mask: whether it holds a mask of -inf.
        tied: whether its head is its embedding.
        frozen: whether a part of it does not train.
        dtype: of parameters and buffers.
        uneven: whether examples have weights, of which some are 0.
    """

    norm: bool = True
    mask: bool = True
    tied: bool = True
    frozen: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    uneven: bool = True


class Everything(nn.Module):
    def __init__(self, options: EverythingOptions) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4).requires_grad_(not options.frozen)
        self.norm = nn.BatchNorm1d(4, momentum=0.5) if options.norm else nn.Identity()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        if options.tied:
            self.head.weight = self.embedding.weight
        shut = -torch.inf if options.mask else 0.0
        self.register_buffer("mask", torch.full((4, 4), shut).triu(1))

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        hidden = self.norm(x) + self.first(self.embedding(token))
        scores = hidden[:, :, None] * hidden[:, None, :] + self.mask
        return self.head(torch.einsum("nij,nj->ni", scores.softmax(-1), hidden))


def everything(options: EverythingOptions) -> Task:
    """Return the task of telling a token from the one before it, with inputs that matter to the norm alone."""

    def model(seed: int) -> nn.Module:
        with ONE_AT_A_TIME:
            torch.manual_seed(seed)
            return Everything(options).to(getattr(torch, options.dtype))

    def data(split: str) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(len(split))
        x = torch.randn(40, 4, generator=generator) * SPREADS
        x[10:20] *= 30.0  # so that running variances rise and fall
        tokens = torch.randint(6, (40,), generator=generator)
        return [{"x": row, "token": token, "weight": (token % 3).float()} for row, token in zip(x, tokens, strict=True)]

    def losses(module: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(
            module(batch["x"], batch["token"]).float(), (batch["token"] + 1) % 6, reduction="none"
        )

    weights = (lambda batch: batch["weight"]) if options.uneven else None
    return Task(model=model, data=data, losses=losses, weights=weights)


@dataclass
class Seen:
    """What a callback does and keeps.

    Attributes:
        folder: of the run.
        ask: the step after which the first worker is asked to stop, for one step; 0: never.
        replicas: by rank.
    """

    folder: Path = Path()
    ask: int = 0
    replicas: dict[int, Replica] = field(default_factory=dict)

    def __call__(self, replica: Replica) -> None:
        self.replicas[replica.rank] = replica
        if replica.rank == 0 and replica.progress.step == self.ask:
            RunDirectory(self.folder).request_stop()
        if replica.rank == 0 and replica.progress.step == self.ask + 1:
            (self.folder / "stop").unlink(missing_ok=True)


SEEN = Seen()


def train(plan: TrainRecipe, folder: Path, ask: int = 0) -> RunDirectory:
    SEEN.folder, SEEN.ask = folder, ask
    SEEN.replicas.clear()
    run = train_with_threads(plan, folder)
    assert run.failure() is None
    return run


def saved(path: Path) -> dict[str, Tensor]:
    model: dict[str, Tensor] = load_part(path, 0)["model"]
    return model


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(bits_of(one[name]), bits_of(other[name])) for name in one)


def history(run: RunDirectory) -> list[dict[str, Any]]:
    return repeatable_rows(run.metrics)


def options_of(name: str) -> set[str]:
    """Return the options of a synchroniser."""
    return {*options_parameter(resolve(ALL_SYNCHRONISERS, name, "sync.name")).model_fields}


def recipe(name: str, sync: dict[str, Any], task: dict[str, Any], **fields: Any) -> TrainRecipe:
    """Return the recipe of a run; of `sync` what this synchroniser has as an option."""
    known = options_of(name)
    optimizer = (
        {"name": "zo-sgd", "lr": 1e-3} if name in SCALAR_EXCHANGES else {"name": "sgd", "lr": 0.05, "momentum": 0.9}
    )
    return TrainRecipe.parse(
        {
            "kind": "train",
            "task": {"name": f"{__name__}:everything", **task},
            "steps": STEPS,
            "batch": 4,
            "optimizer": optimizer,
            "sync": {"name": name, **{key: value for key, value in sync.items() if key in known}},
            "evaluation": {"every": 4},
            "checkpoint": {"every": 1, "keep": STEPS + 1},
            "log": {"every": 1, "loggers": []},
            "callbacks": [f"{__name__}:SEEN"],
            **fields,
        }
    )


@st.composite
def recipes(draw: st.DrawFn, name: str) -> TrainRecipe:
    every = draw(st.integers(1, 5))
    sync = {
        "every": every,
        "delay": draw(st.integers(0, every)),
        "compression": draw(st.sampled_from([None, "int8", "bfloat16"])),
        "buffers": draw(st.sampled_from(["mean", "mean", "local"])),
        "penalty": draw(st.sampled_from(["none", "constant", "gap-aware", "secant"])),
        "stop_every": draw(st.integers(1, 4)),
        "check_every": 3,
    }
    task = {key: draw(st.booleans()) for key in ("norm", "mask", "tied", "frozen", "uneven")}
    task["dtype"] = draw(st.sampled_from(["float32", "bfloat16"]))
    return recipe(name, sync, task, workers=draw(st.integers(1, 3)), seed=draw(st.integers(0, 9)))


def steps_to_stop(plan: TrainRecipe) -> int:
    """Return after how many steps at most all workers have heard of a wish to stop."""
    sync: Any = plan.sync
    if plan.sync.name in SCALAR_EXCHANGES:
        return int(sync.stop_every)
    every = getattr(sync, "every", 0)
    late = {"delayed-averaging": getattr(sync, "delay", 0), "cocod": every, "co2": every}
    return int(every + late.get(plan.sync.name, 0) + 1)


every_synchroniser = pytest.mark.parametrize("name", [name for name in ALL_SYNCHRONISERS if name != "fsdp"])


@pytest.fixture(autouse=True)
def looks_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have runs look for a wish to stop at every step."""
    monkeypatch.setattr(watch, "STOP_CHECK_SECONDS", 0.0)


@every_synchroniser
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_everything_at_once(name: str, dtype: str) -> None:
    for codec in (None, "int8")[: 1 + ("compression" in options_of(name) and dtype == "float32")]:
        sync = {"every": 3, "delay": 2, "compression": codec, "stop_every": 3, "check_every": 3}
        check(recipe(name, sync, {"dtype": dtype}, workers=3), killed=5, asked=4)


@every_synchroniser
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_with_some_of_it_wherever_a_run_is_ended(name: str, data: st.DataObject) -> None:
    plan = data.draw(recipes(name))
    check(plan, killed=data.draw(st.integers(1, STEPS - 1)), asked=data.draw(st.integers(1, STEPS - 1)))


def check(plan: TrainRecipe, killed: int, asked: int) -> None:
    """Check that replicas end equal, that all on the way is sound, and that a run that is ended and goes on is equal.

    Args:
        plan: of the run.
        killed: the step of the last checkpoint that a kill leaves.
        asked: the step after which it is asked to stop.
    """
    with TemporaryDirectory() as folder:
        whole = train(plan, Path(folder) / "whole")
        ends = [replica.module.state_dict() for _, replica in sorted(SEEN.replicas.items())]
        assert all(same(end, ends[0]) for end in ends)
        check_whole(plan, whole)

        shutil.copytree(whole.path, Path(folder) / "killed")
        for path in list_checkpoints(Path(folder) / "killed" / "checkpoints"):
            if read_manifest(path).step > killed:
                shutil.rmtree(path)
        check_equal(whole, train(plan, Path(folder) / "killed"))

        stopped = train(plan, Path(folder) / "stopped", ask=asked)
        reached = read_manifest(list_checkpoints(stopped.checkpoints)[-1]).step
        assert reached <= asked + 1 + steps_to_stop(plan)
        check_equal(whole, train(plan, Path(folder) / "stopped"))


def check_whole(plan: TrainRecipe, run: RunDirectory) -> None:
    """Check what every checkpoint and every evaluation of a run has to be."""
    options: Any = plan.task
    first = everything(options).model(plan.seed).state_dict()
    for path in list_checkpoints(run.checkpoints):
        model = saved(path)
        still = ["mask", *(("first.weight", "first.bias") if options.frozen else ())]
        assert same({key: model[key] for key in still}, {key: first[key] for key in still})
        if options.norm:
            assert (model["norm.running_var"] > 0).all()
            assert model["norm.running_var"].isfinite().all()
    measured = [row["valid"]["loss"] for row in read_jsonl(run.metrics) if "valid" in row]
    assert len(measured) == STEPS // 4
    assert all(map(math.isfinite, measured))


def check_equal(one: RunDirectory, other: RunDirectory) -> None:
    """Check that two runs came to the same, to the bit, and logged the same on the way."""
    ends = [list_checkpoints(run.checkpoints)[-1] for run in (one, other)]
    assert ends[0].name == ends[1].name
    assert same(saved(ends[0]), saved(ends[1]))
    assert history(one) == history(other)
