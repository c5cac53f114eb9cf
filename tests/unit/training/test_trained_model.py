"""What a run left, as its result."""

from dataclasses import replace
from pathlib import Path

import pytest

from raytrain.tasks.task import Task
from raytrain.testing import TinyOptions, tiny, train_here
from raytrain.training.recipe import TrainRecipe
from raytrain.training.results import collect_result


def unlucky(options: TinyOptions) -> Task:
    """Return a task that finds nothing to compare with."""

    def references() -> dict[str, float]:
        return {"ratio": 1 / 0}

    return replace(tiny(options), references=references)


def test_a_run_is_done_even_if_there_is_nothing_to_compare_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("raytrain.testing.tiny", unlucky)
    recipe = TrainRecipe.parse({"kind": "train", "task": "raytrain.testing:tiny", "steps": 2, "log": {"loggers": []}})
    result = collect_result(recipe, train_here(recipe, tmp_path / "run"), None)
    assert (result.status, result.figures["steps"], result.references) == ("done", 2, {})
    assert result.metrics["loss"] > 0
    assert capsys.readouterr().err.startswith(
        "raytrain: Task.references failed: ZeroDivisionError: division by zero (test_trained_model.py, line "
    )
