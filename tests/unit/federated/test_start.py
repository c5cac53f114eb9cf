"""A federated run that begins with the model of a run of `raytrain train`."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from federated.build import Federation, initial_module, task_of
from federated.flower.strategy_run import StrategyRun
from federated.gradients import trainable_parameters
from federated.recipe import FederateRecipe
from federated.records import SEEDS
from federated.results import load_federated_model
from raytrain.errors import CheckpointError, RecipeError
from raytrain.models.adapters import merge_adapter
from raytrain.testing import train_here
from raytrain.training.recipe import TrainRecipe
from raytrain.training.results import load_best

SEEDED: dict[str, Any] = {
    "kind": "federate",
    "task": "raytrain.testing:tiny",
    "clients": {"count": 6, "per_round": 3},
    "protocol": {"name": "fedkseed", "local_steps": 5, "pool": 40, "batch": 4},
    "rounds": 2,
}
AVERAGED = {
    **SEEDED,
    "protocol": {"name": "flower", "local_steps": 5, "batch": 4},
    "strategy": {"name": "FedAvg"},
    "optimizer": {"name": "sgd", "lr": 0.05},
}


def trained(folder: Path, **more: Any) -> Path:
    raw = {"kind": "train", "task": "raytrain.testing:tiny", "steps": 3, "seed": 5, "log": {"loggers": []}, **more}
    recipe = TrainRecipe.parse(raw)
    run = train_here(recipe, folder)
    run.recipe.write_text(recipe.to_toml())
    return folder


def same(one: nn.Module, other: nn.Module) -> bool:
    weights = other.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("fields", [SEEDED, AVERAGED], ids=["seeds", "gradients"])
def test_a_run_begins_with_the_best_model_of_another(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = trained(tmp_path / "run")
    recipe = FederateRecipe.parse({**fields, "start": str(folder)})
    best, task = load_best(folder, {}).module(), task_of(recipe)
    assert same(initial_module(recipe, task), best)
    assert not same(task.model(recipe.seed), best)
    if not recipe.seeded:
        arrays, expected = StrategyRun(recipe).arrays, trainable_parameters(best)
        assert all(torch.equal(torch.from_numpy(arrays[name]), value) for name, value in expected.items())
        return
    federation = Federation.of(recipe)
    assert same(federation.model.module, best)
    other = Federation.of(FederateRecipe.parse(fields))
    assert federation.server().model.origin != other.server().model.origin, "clients without it are refused"


def test_an_adapter_is_merged_into_the_start(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", adapter={"name": "lora", "r": 2, "target_modules": ["out"]})
    recipe = FederateRecipe.parse({**SEEDED, "start": str(folder)})
    best = load_best(folder, {}).module()
    merge_adapter(best)
    assert same(initial_module(recipe, task_of(recipe)), best)


def test_a_start_without_a_model_of_the_task_is_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", task={"name": "raytrain.testing:tiny", "norm": True})
    recipe = FederateRecipe.parse({**SEEDED, "start": str(folder)})
    with pytest.raises(RecipeError, match=rf"^start: expected a run with the model of this task; {folder} has another"):
        initial_module(recipe, task_of(recipe))
    with pytest.raises(RecipeError, match="nowhere"):
        initial_module(recipe.with_overrides({"start": str(tmp_path / "nowhere")}), task_of(recipe))
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError, match="there is no complete checkpoint yet"):
        initial_module(recipe, task_of(recipe))


def test_a_run_leaves_the_threads_of_a_process_to_its_own_recipe(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    first = FederateRecipe.parse({**SEEDED, "clients": {"count": 6, "per_round": 3, "cpus": 1}, "rounds": 1})
    federation = Federation.of(first)
    federation.seed_model(federation.server()).save(tmp_path / SEEDS)
    (tmp_path / "recipe.toml").write_text(first.to_toml())
    try:
        torch.set_num_threads(2)
        initial_module(FederateRecipe.parse({**SEEDED, "start": str(tmp_path)}), task_of(first))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("fields", [SEEDED, AVERAGED], ids=["seeds", "gradients"])
def test_a_head_of_prototypes_is_that_of_the_run_s_own_examples(
    models: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    for name, texts in (("own.tsv", "good\t1\nbad\t0\n"), ("other.tsv", "awful\t0\nlovely\t1\n")):
        (tmp_path / name).write_text(texts * 20)
    task = {"name": "classify", "path": str(tmp_path / "own.tsv"), "model": str(models / "bert"), "shots": 2}
    recipe = FederateRecipe.parse({**fields, "task": {**task, "head_init": "prototypes", "classes": [0, 1]}})
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    if recipe.seeded:
        federation = Federation.of(recipe)
        federation.seed_model(federation.server()).save(tmp_path / SEEDS)
    else:
        StrategyRun(recipe).save_model(tmp_path)
    own, other = (
        load_federated_model(tmp_path, changes).module() for changes in ({}, {"task.path": str(tmp_path / "other.tsv")})
    )
    assert same(own, other)
    assert same(own, initial_module(recipe, task_of(recipe)))


def test_a_run_with_other_partitions_or_perturbations_is_another_one(tmp_path: Path) -> None:
    Federation.of(FederateRecipe.parse(SEEDED)).server().save(tmp_path)
    for change, name in (({"partition.sizes": "zipf"}, "participation"), ({"zo.eps": 0.5}, "origin")):
        other = Federation.of(FederateRecipe.parse_with(SEEDED, change)).server()
        with pytest.raises(RecipeError, match=f"expected a run with {name} = "):
            other.resume(tmp_path)
