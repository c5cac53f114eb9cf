"""What a search leaves of its best model: the folder of a run that can be used, and the recipe that trains it again."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raytrain.errors import RecipeError
from raytrain.files import write_atomic
from raytrain.kinds import load_kind
from raytrain.overrides import apply_overrides
from raytrain.recipe import Recipe, read_toml
from raytrain.registry import resolve
from raytrain.run.checkpoint import CheckpointStore
from raytrain.run.directory import RunDirectory
from raytrain.serialization import unpack
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.training.build import build_task
from raytrain.training.recipe import TrainRecipe
from raytrain.training.trained_model import TrainedModel
from search.journal.ancestry import Phase

WINNER = "winner.toml"
BEST = "best"
FRONT = "front"


def winner_recipe(base: Recipe, phases: Sequence[Phase]) -> Recipe:
    """Return the recipe that trains a model again.

    Args:
        base: the recipe whose fields were searched.
        phases: what the model was trained with, the oldest first.
    """
    first, *later = phases
    changes = [apply_overrides(_beginning(phase), phase.changes) for phase in later]
    return base.with_overrides({"seed": first.seed, **first.changes, **({"phases": changes} if later else {})})


def _beginning(phase: Phase) -> dict[str, Any]:
    reset = {"reset_optimizer": True} if phase.reset_optimizer else {}
    return {"from": phase.from_step, "seed": phase.seed, **reset}


def write_winner(folder: Path, recipe: TrainRecipe, packed: bytes, step: int, metrics: Mapping[str, float]) -> Path:
    """Write the winner's recipe, and the folder of a run that holds the winner alone; return its checkpoint.

    Args:
        folder: of the search.
        recipe: that trains the winner.
        packed: the winner's state.
        step: optimizer steps that it was trained for.
        metrics: as measured there.

    Raises:
        CheckpointError: there is no room.
    """
    state: Any = unpack(packed)
    run = RunDirectory(folder / BEST)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    run.write_recipe(recipe.to_toml())
    store = CheckpointStore(run.checkpoints, 1, ExactAverager(LocalTransport()))
    store.clean()
    progress = {**state["progress"], "best": metrics[build_task(recipe).metric], "best_step": step}
    store.save(state["replicas"][0], progress)
    checkpoint = store.save_metrics(progress, metrics)
    write_atomic(folder / WINNER, recipe.to_toml().encode())
    return checkpoint


def copy_winner(folder: Path, recipe: Recipe, run: str) -> str:
    """Write the winner's recipe, and a copy of its run; return the copy's checkpoint.

    Args:
        folder: of the search.
        recipe: that trains the winner.
        run: the winner's folder in it.
    """
    best = folder / BEST
    shutil.rmtree(best, ignore_errors=True)
    shutil.copytree(folder / run, best)
    write_atomic(folder / WINNER, recipe.to_toml().encode())
    checkpoint = Path(json.loads(RunDirectory(best).result.read_bytes())["checkpoint"])
    return str(best / checkpoint.relative_to(folder / run)) if checkpoint.is_relative_to(folder / run) else ""


def write_front(folder: Path, recipes: Mapping[int, Recipe]) -> None:
    """Write the recipes that train the members of a Pareto front again, `front/3.toml` for member 3.

    Args:
        folder: of the search.
        recipes: member -> recipe.
    """
    front = folder / FRONT
    shutil.rmtree(front, ignore_errors=True)
    front.mkdir()
    for member, recipe in recipes.items():
        write_atomic(front / f"{member}.toml", recipe.to_toml().encode())


def load_winner(folder: Path, overrides: Mapping[str, Any]) -> TrainedModel:
    """Load the best model of the search in `folder`.

    Args:
        folder: the search's.
        overrides: changes to the winner's recipe, such as other data, all of which is then held out.

    Raises:
        RecipeError: the changes do not fit the recipe, or the search has left no model yet.
        CheckpointError: it is damaged, or the changes make another model.
    """
    best = folder / BEST
    if not RunDirectory(best).recipe.is_file():
        raise RecipeError(f"{folder}: this search has left no model yet; it does when it ends, or is interrupted")
    raw, _ = read_toml(str(best), [])
    found: TrainedModel = resolve({}, load_kind(raw["kind"]).load, "kind")(best, overrides)
    return found
