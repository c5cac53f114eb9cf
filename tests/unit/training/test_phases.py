"""Phases of a training, and what a replica inherits of a state of another recipe."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.errors import CheckpointError, RecipeError
from raytrain.run.checkpoint import list_checkpoints, load_part
from raytrain.serialization import pack
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.testing import repeatable_rows, train_here
from raytrain.training.build import build_task, trainable
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import Replica, inherit, load_state, state_of

RAW: dict[str, Any] = {
    "kind": "train",
    "steps": 12,
    "batch": 8,
    "task": {"name": "digits", "model": "mlp", "widths": [8, 8], "dropout": 0.1},
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "log": {"loggers": []},
}


def recipe(**changes: Any) -> TrainRecipe:
    return TrainRecipe.parse_with(RAW, {name.replace("__", "."): value for name, value in changes.items()})


def model_of(folder: Path, of: TrainRecipe) -> dict[str, torch.Tensor]:
    run = train_here(of, folder)
    assert run.failure() is None
    return load_part(list_checkpoints(run.checkpoints)[-1], 0)["model"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@settings(max_examples=5)
@given(cuts=st.sets(st.integers(1, 11), max_size=3))
def test_phases_that_change_nothing_change_nothing(cuts: set[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("runs")
    phased = recipe(phases=[{"from": cut} for cut in sorted(cuts)])
    assert equal(model_of(folder / "phased", phased), model_of(folder / "whole", recipe()))


CHANGED: list[dict[str, Any]] = [
    {"from": 5, "optimizer": {"lr": 0.02}, "batch": 4, "seed": 7},
    {"from": 8, "optimizer": {"name": "adamw", "lr": 1e-3}, "task.dropout": 0.4},
]


RESHAPED: list[dict[str, Any]] = [{"from": 5, "task.widths": [12, 6]}]
THAWED: list[dict[str, Any]] = [{"from": 5, "freeze.match": []}]


@pytest.mark.parametrize(
    ("phases", "newest"), [*((CHANGED, newest) for newest in (3, 5, 6, 8)), (RESHAPED, 5), (THAWED, 5), (THAWED, 8)]
)
def test_a_run_with_phases_goes_on_from_any_checkpoint(
    phases: list[dict[str, Any]], newest: int, tmp_path: Path
) -> None:
    frozen = {"match": ["1.*"]} if phases is THAWED else {}
    phased = recipe(phases=phases, freeze=frozen, checkpoint__every=1, checkpoint__keep=20)
    whole = model_of(tmp_path / "run", phased)
    for path in list_checkpoints(tmp_path / "run" / "checkpoints")[newest:]:
        shutil.rmtree(path)
    assert equal(model_of(tmp_path / "run", phased), whole)


def test_a_phase_that_resets_the_optimizer_differs_from_one_that_does_not(tmp_path: Path) -> None:
    def rows(**more: Any) -> list[Any]:
        run = recipe(phases=[{"from": 5, **more}], optimizer={"name": "adamw", "lr": 0.01})
        return repeatable_rows(train_here(run, tmp_path / str(len(more))).metrics)

    plain, reset = rows(), rows(reset_optimizer=True)
    first = next(place for place, (one, other) in enumerate(zip(plain, reset, strict=True)) if one != other)
    assert reset[first]["step"] > 5


def test_fields_keep_their_values_in_later_phases() -> None:
    stages = recipe(phases=CHANGED).stages()
    assert [(stage.begin, stage.end) for stage in stages] == [(0, 5), (5, 8), (8, 12)]
    assert [stage.recipe.batch for stage in stages] == [8, 4, 4]
    assert [stage.recipe.optimizer.name for stage in stages] == ["sgd", "sgd", "adamw"]
    assert [stage.recipe.task.dropout for stage in stages] == [0.1, 0.1, 0.4]
    assert TrainRecipe.parse(recipe(phases=CHANGED).to_dict()).stages() == stages, "as a run's folder has it"


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([{"batch": 4}], "phases.0.from: expected a step from 1 to 11; got None"),
        ([{"from": 12}], "phases.0.from: expected a step from 1 to 11; got 12"),
        ([{"from": 3}, {"from": 3}], "phases.1.from: expected a step from 4 to 11; got 3"),
        ([{"from": 3, "workers": 2}], "phases.0.workers: the same for the whole run; set it outside of phases"),
        (
            [{"from": 3, "log": {"every": 2}}],
            "phases.0.log.every: the same for the whole run; set it outside of phases",
        ),
        ([{"from": 3, "reset_optimizer": 1}], "phases.0.reset_optimizer: expected true or false; got 1"),
        ([{"from": 3, "btch": 2}], "phases.0.btch: no such field; did you mean batch?"),
        ([{"from": 3, "optimizer": {"lr": -1}}], "phases.0.optimizer.lr: "),
    ],
)
def test_wrong_phases(phases: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(phases=phases)
    assert str(error.value).startswith(message)


def test_a_trajectory_has_one_beginning() -> None:
    with pytest.raises(RecipeError, match=r"phases: expected zo.trajectory = false, because"):
        recipe(optimizer={"name": "zo-sgd"}, phases=[{"from": 3}])


def trained(of: TrainRecipe) -> Replica:
    """A replica after some steps."""
    replica = fresh(of)
    torch.manual_seed(1)
    for parameter in replica.module.parameters():
        parameter.grad = torch.randn_like(parameter)
    replica.optimizer.step()
    return replica


def fresh(of: TrainRecipe) -> Replica:
    return trainable(of, build_task(of), ExactAverager(LocalTransport()), new=True)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_all_that_fits_is_inherited_as_it_is_loaded(name: str, ema: float) -> None:
    same = recipe(optimizer={"name": name}, ema=ema)
    state = state_of(trained(same))
    heir, loaded = fresh(same), fresh(same)
    assert inherit(heir, state, state, "here") == []
    load_state(loaded, state, state, "here")
    assert pack(state_of(heir)) == pack(state_of(loaded)) == pack(state)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("widths", [[8, 16], [8, 4], [6, 8]])
def test_weights_of_another_shape_are_inherited_in_part(widths: list[int], ema: float) -> None:
    state = state_of(trained(recipe(ema=ema)))
    heir = fresh(recipe(task__widths=widths, ema=ema))
    begun = {name: tensor.clone() for name, tensor in state_of(heir)["model"].items()}
    new = inherit(heir, state, state, "here")
    model, momenta = state_of(heir)["model"], state_of(heir)["optimizer"]["state"]
    assert new
    assert new == sorted(name for name in model if model[name].shape != state["model"][name].shape)
    for name, tensor in model.items():
        saved = state["model"][name]
        inherited = torch.zeros(tensor.shape, dtype=torch.bool)
        inherited[tuple(slice(size) for size in saved.shape)] = True
        block = tuple(slice(size) for size in tensor.shape)
        assert tensor[inherited].equal(saved[block].flatten())
        assert tensor[~inherited].equal(begun[name][~inherited])
    assert momenta.keys() == state["optimizer"]["state"].keys() - set(new)


def test_an_optimizer_of_another_name_starts_new() -> None:
    state = state_of(trained(recipe()))
    heir = fresh(recipe(optimizer={"name": "adamw"}))
    assert inherit(heir, state, state, "here") == []
    assert state_of(heir)["optimizer"]["state"] == {}
    assert equal(state_of(heir)["model"], state["model"])


def test_a_run_is_not_resumed_with_another_optimizer(tmp_path: Path) -> None:
    """Only a phase may begin with another one: a run that is resumed with it is a mistake."""
    state = state_of(trained(recipe()))
    with pytest.raises(CheckpointError, match=r"optimizer is sgd, and the recipe's is adamw; set optimizer.name=sgd"):
        load_state(fresh(recipe(optimizer={"name": "adamw"})), state, state, "here")
