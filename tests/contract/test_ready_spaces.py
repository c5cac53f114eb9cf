"""The ready search spaces: what they draw is trained for a step by the task that they are for."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search.launch.trial import Trial
from search.recipe import SearchRecipe
from search.scheduling.work import Snapshot, Work


@pytest.fixture
def tasks(tmp_path: Path, models: Path) -> dict[str, dict[str, Any]]:
    """Each task on little data."""
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 40)
    rows = [{"text": f"{word} film", "label": word} for word in ["good", "bad"] * 8]
    (tmp_path / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "digits": {"name": "digits"},
        "text": {"name": "text", "path": str(tmp_path / "text.txt"), "block": 16},
        "classify": {
            "name": "classify",
            "path": str(tmp_path / "films.jsonl"),
            "model": str(models / "bert"),
            "classes": ["bad", "good"],
        },
    }


@pytest.mark.parametrize(
    "space", ["digits:mlp", "digits:cnn", "text:gpt", "text:llama", "text:rnn", "classify:fine_tuning"]
)
def test_what_a_ready_space_draws_trains(space: str, tasks: dict[str, dict[str, Any]]) -> None:
    base = {"kind": "train", "steps": 100, "task": tasks[space.partition(":")[0]]}
    recipe = SearchRecipe.parse({"kind": "search", "base": base, "search": {"space": f"search.spaces.{space}"}})
    trial = Trial(recipe.base, torch.device("cpu"), lambda step: None)
    for seed in range(3):
        changes = dict(recipe.space().sample(np.random.default_rng(seed)).changes)
        end = trial.train(Work("", 0, 0, Snapshot(), 1, changes, seed), None)
        assert end.step == 1
        assert math.isfinite(end.metrics["loss"])
