"""What a lottery has left: all of it is in the rows of its draws, each of which is the seed of a model."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lottery.recipe import PRIZES, LotteryRecipe

from raytrain.errors import CheckpointError
from raytrain.recipe import read_toml
from raytrain.registry import resolve
from raytrain.run.directory import Failure, RunDirectory
from raytrain.run.report.panel import Panel, line_chart
from raytrain.run.result import Result
from raytrain.run.rows import read_jsonl
from raytrain.testing import TinyOptions, tiny
from raytrain.training.trained_model import TrainedModel

TASK = tiny(TinyOptions(name="tiny"))


def trained(seed: int) -> TrainedModel:
    """Return a model of a draw."""
    return TrainedModel(TASK, task_name="tiny", step=seed, module=partial(TASK.model, seed))


def lowest(drawn: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Let the draw with the lowest loss win."""
    return min(drawn, key=lambda row: row["valid"]["loss"])


def highest(drawn: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Let the draw with the highest loss win."""
    return max(drawn, key=lambda row: row["valid"]["loss"])


def winner(recipe: LotteryRecipe, run: RunDirectory) -> dict[str, Any]:
    """Return the row of the draw that wins; {} without one."""
    drawn = read_jsonl(run.metrics)
    return resolve(PRIZES, recipe.prize, "prize")(drawn) if drawn else {}


def load_winner(folder: Path, overrides: Mapping[str, Any]) -> TrainedModel:
    """Load the model that won."""
    recipe = LotteryRecipe.parse(read_toml(str(folder), [])[0]).with_overrides(overrides)
    won = winner(recipe, RunDirectory(folder))
    if not won:
        raise CheckpointError(f"{folder}: nothing was drawn yet")
    return trained(won["step"])


def result_of(recipe: LotteryRecipe, run: RunDirectory, failure: Failure | None) -> Result:
    """Return how a lottery ended."""
    drawn, won = read_jsonl(run.metrics), winner(recipe, run)
    status = "failed" if failure else "done" if len(drawn) >= recipe.draws else "interrupted"
    return Result(
        status,
        metrics=won.get("valid", {}),
        figures={"draws": len(drawn)},
        checkpoint=str(run.metrics) if won else "",
        error=failure.message if failure else "",
    )


def panels(run: RunDirectory) -> list[Panel]:
    """Return the losses of the draws."""
    drawn = read_jsonl(run.metrics)
    losses = [row["step"] for row in drawn], [row["valid"]["loss"] for row in drawn]
    chart = line_chart("Draws", {"loss": losses}, x="draw", y="loss")
    return [chart] if chart else []
