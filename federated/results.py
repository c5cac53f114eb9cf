"""Of a run that ended or still goes on, read from its folder: how it ended, and its model."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from federated.build import Federation, task_of, working_model_of
from federated.checkpoint import newest_state
from federated.recipe import FederateRecipe
from federated.records import SEEDS
from federated.rounds import STATES
from federated.server import Server
from raytrain.errors import CheckpointError
from raytrain.recipe import read_toml
from raytrain.run.directory import RunDirectory, rows
from raytrain.run.result import Result
from raytrain.seeds.seed_model import SeedModel
from raytrain.tasks.task import Task
from raytrain.training.trained_model import TrainedModel


def result_of(federation: Federation, server: Server, run: RunDirectory, error: str) -> Result:
    """Return how a run ended.

    Args:
        federation: of the run.
        server: as it is now.
        run: the folder.
        error: why it failed; "": it did not.
    """
    recorded, task = rows(run.metrics), federation.task
    evaluations = [row for row in recorded if "valid" in row]
    rounds = [row for row in recorded if "valid" not in row]
    last: dict[str, Any] = rounds[-1] if rounds else {}
    start = {f"{task.metric}_at_start": row["valid"][task.metric] for row in evaluations if not row["step"]}
    figures = {"rounds": server.model.version, **{name: last.get(name, 0) for name in ("bytes_down", "bytes_up")}}
    figures |= {name: sum(row[name] for row in rounds) for name in ("heard", "missing", "refused")}
    figures["bytes_of_fedavg"] = 2 * federation.parameter_bytes() * last.get("payloads", 0)
    return Result(
        status="failed" if error else "done" if server.is_done() else "interrupted",
        metrics=evaluations[-1]["valid"] if evaluations else {},
        references={**start, **task.references()},
        seconds=last.get("seconds", 0.0),
        checkpoint=str(newest) if (newest := newest_state(run.path / STATES)) else "",
        figures=figures,
        error=error,
    )


def load_model(folder: Path, overrides: Mapping[str, Any]) -> TrainedModel:
    """Load the newest model of the run in `folder` that was evaluated.

    Args:
        folder: the run's.
        overrides: changes to its recipe, such as other data, all of which is then held out.

    Raises:
        RecipeError: the changes do not fit the recipe, or make another model.
        CheckpointError: there is no model yet, or it is damaged.
    """
    changed = load_recipe(folder, overrides).task.on_other_data(load_recipe(folder, {}).task)
    recipe = load_recipe(folder, {f"task.{name}": value for name, value in changed.items()} | dict(overrides))
    path = folder / SEEDS
    if not path.is_file():
        raise CheckpointError(f"{folder}: there is no model yet: no {SEEDS}")
    model, task = SeedModel.load(path), task_of(recipe)
    return TrainedModel(
        task,
        task_name=recipe.task.name,
        step=model.version,
        module=partial(_module, recipe, task, model),
        adapted=recipe.adapter.name != "none",
        batch=recipe.evaluation.batch,
    )


def load_recipe(folder: Path, overrides: Mapping[str, Any]) -> FederateRecipe:
    """Return the recipe of the run in `folder`, with changes.

    Raises:
        RecipeError: the changes do not fit it.
    """
    raw, _ = read_toml(str(RunDirectory(folder).recipe), [])
    return FederateRecipe.parse(raw).with_overrides(overrides)


@torch.no_grad()
def _module(recipe: FederateRecipe, task: Task, model: SeedModel) -> nn.Module:
    """Return the module with a model's weights, which are made of the first weights as the run made them."""
    torch.set_num_threads(recipe.threads())
    return working_model_of(recipe, task).set_to_seeds(model)
