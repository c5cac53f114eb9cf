"""Our population based training as a scheduler of Ray Tune, in Ray's own example."""

import json
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.examples.pbt_function import pbt_function

from raytrain.errors import RecipeError
from search.launch.tune import PBTScheduler

SPACE: dict[str, Any] = {
    "lr": {"type": "float", "low": 1e-4, "high": 0.02, "scale": "log"},
    "some_other_factor": {"type": "int", "low": 1, "high": 3},
    "word": {"type": "choice", "values": ["one", "two"]},
}


@pytest.mark.usefixtures("ray_cluster")
def test_it_takes_the_place_of_rays_own_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kinds of values that Ray's own cannot move: small whole numbers, and words."""
    monkeypatch.setenv("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    lineage = tmp_path / "lineage.jsonl"
    tuner = tune.Tuner(
        pbt_function,
        run_config=tune.RunConfig(
            name="pbt",
            storage_path=str(tmp_path),
            verbose=0,
            stop={"done": True, "training_iteration": 10},
            checkpoint_config=tune.CheckpointConfig(checkpoint_score_attribute="mean_accuracy", num_to_keep=2),
        ),
        tune_config=tune.TuneConfig(
            scheduler=PBTScheduler(SPACE, interval=5, seed=1, lineage=lineage),
            metric="mean_accuracy",
            mode="max",
            num_samples=4,
            reuse_actors=True,
        ),
        param_space={"lr": 0.0001, "some_other_factor": 1, "checkpoint_interval": 5},
    )
    results = tuner.fit()
    assert results.num_errors == 0
    assert [result.metrics["training_iteration"] for result in results] == [10] * 4
    rows = [json.loads(line) for line in lineage.read_text().splitlines()]
    assert [row["step"] for row in rows if "new" in row] == [0] * 4 + [5] * 4
    assert all(
        row["new"]["some_other_factor"] in (1, 2, 3) and row["new"]["word"] in ("one", "two") for row in rows[:12]
    )
    copies = [row for row in rows if row["action"] == "exploit"]
    assert copies
    assert all(1e-4 <= row["new"]["lr"] <= 0.02 and row["parent"] != row["member"] for row in copies)
    last = {row["member"]: row["new"] for row in rows if "new" in row}
    found = sorted((result.config["lr"], result.config["word"]) for result in results)
    assert found == sorted((values["lr"], values["word"]) for values in last.values())


def test_its_space_is_checked_when_it_is_made() -> None:
    with pytest.raises(RecipeError, match=r"^search.space.lr.type: no such type 'flot'; did you mean float"):
        PBTScheduler({"lr": {"type": "flot"}}, interval=5)


def test_it_has_to_know_what_is_better() -> None:
    scheduler = PBTScheduler(SPACE, interval=5)
    scheduler.set_search_properties("accuracy", None)
    with pytest.raises(RecipeError, match=r"^PBTScheduler: set metric and mode, here or in TuneConfig$"):
        scheduler.on_trial_add(None, None)
