"""Of a run that ended or still goes on, read from its folder: how it ended, and its model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from federated.build import initial_module, task_of, working_model_of
from federated.checkpoint import newest_state
from federated.gradients import load_arrays
from federated.recipe import FederateRecipe
from federated.records import PARAMETERS, SEEDS
from federated.rounds import STATES
from raytrain.errors import CheckpointError
from raytrain.recipe import read_toml
from raytrain.run.directory import RunDirectory
from raytrain.run.result import Result
from raytrain.run.rows import read_jsonl
from raytrain.seeds.seed_model import SeedModel
from raytrain.tasks.task import Task
from raytrain.training.trained_model import TrainedModel

COUNTED = ("heard", "missing", "refused", "late")
"""Clients and reports in the row of a round."""


def result_of(run: RunDirectory, task: Task, parameter_bytes: int, *, done: bool, error: str) -> Result:
    """Return how a run ended.

    Args:
        run: the folder.
        task: of the run.
        parameter_bytes: of the parameters that the run moves, which FedAvg would send both ways.
        done: whether all rounds are.
        error: why it failed; "": it did not.
    """
    recorded = read_jsonl(run.metrics)
    evaluations = [row for row in recorded if "valid" in row]
    rounds = [row for row in recorded if "valid" not in row and all(type(row.get(name)) is int for name in COUNTED)]
    last: dict[str, Any] = rounds[-1] if rounds else {}
    at_start: dict[str, Any] = next((row["valid"] for row in evaluations if not row["step"]), {})
    start = {f"{name}_at_start": at_start[name] for name in ("loss", task.metric) if name in at_start}
    figures = {"rounds": last.get("step", 0), **{name: last.get(name, 0) for name in ("bytes_down", "bytes_up")}}
    figures |= {name: sum(row[name] for row in rounds) for name in COUNTED}
    figures["bytes_of_fedavg"] = 2 * parameter_bytes * last.get("payloads", 0)
    newest = newest_state(run.path / STATES)
    return Result(
        status="failed" if error else "done" if done else "interrupted",
        metrics=evaluations[-1]["valid"] if evaluations else {},
        references={**start, **task.references()},
        seconds=last.get("seconds", 0.0),
        checkpoint=str(newest) if newest else "",
        figures=figures,
        error=error,
    )


def load_federated_model(folder: Path, overrides: Mapping[str, Any]) -> TrainedModel:
    """Load the newest model of the run in `folder` that was evaluated.

    Args:
        folder: the run's.
        overrides: changes to its recipe, such as other data, all of which is then held out.

    Raises:
        RecipeError: the changes do not fit the recipe, or make another model.
        CheckpointError: there is no model yet, or it is damaged.
    """
    changed = load_federated_recipe(folder, overrides).task.for_evaluation(load_federated_recipe(folder, {}).task)
    recipe = load_federated_recipe(folder, {f"task.{name}": value for name, value in changed.items()} | dict(overrides))
    task = task_of(recipe)
    start = task  # what the first weights follow from: with a head of prototypes, the run's own examples
    if task.init_head and not recipe.start and changed:
        start = task_of(load_federated_recipe(folder, {}))
    version, module = _seeded(folder, recipe, start) if recipe.seeded else _averaged(folder, recipe, start)
    return TrainedModel(
        task,
        task_name=recipe.task.name,
        step=version,
        module=module,
        adapted=recipe.adapter.name != "none",
        batch=recipe.evaluation.batch,
    )


def load_federated_recipe(folder: Path, overrides: Mapping[str, Any]) -> FederateRecipe:
    """Return the recipe of the run in `folder`, with changes.

    Raises:
        RecipeError: the changes do not fit it.
    """
    raw, _ = read_toml(str(RunDirectory(folder).recipe), [])
    return FederateRecipe.parse(raw).with_overrides(overrides)


def _seeded(folder: Path, recipe: FederateRecipe, task: Task) -> tuple[int, Callable[[], nn.Module]]:
    """Return the version of a model of seeds, and what makes it of the first weights, as the run did."""
    model = SeedModel.load(_there(folder / SEEDS))

    def module() -> nn.Module:
        torch.set_num_threads(recipe.threads())
        return working_model_of(recipe, task).set_to_seeds(model)

    return model.version, module


def _averaged(folder: Path, recipe: FederateRecipe, task: Task) -> tuple[int, Callable[[], nn.Module]]:
    """Return the version of a model of averaged parameters, and what puts them into the module."""
    path = _there(folder / PARAMETERS)
    try:
        with safe_open(path, "np") as file:
            version = int((file.metadata() or {})["version"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError, LookupError, ValueError) as error:
        raise CheckpointError(f"{path}: expected the parameters of a run: {error}") from error

    def module() -> nn.Module:
        made = initial_module(recipe, task)
        load_arrays(made, arrays)
        return made

    return version, module


def _there(path: Path) -> Path:
    """Return the file of a model.

    Raises:
        CheckpointError: it is not there.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: there is no model yet: no {path.name}")
    return path
