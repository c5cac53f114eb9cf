"""Our population based training as a scheduler of Ray Tune, in Ray's own example."""

import json
import runpy
from pathlib import Path

import pytest

from raytrain.errors import RecipeError
from search.launch.tune import PBTScheduler

EXAMPLE = Path(__file__).parents[2] / "search" / "examples" / "under_tune.py"


@pytest.mark.usefixtures("ray_cluster")
def test_it_takes_the_place_of_rays_own_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kinds of values that Ray's own cannot move: small whole numbers, and words."""
    monkeypatch.chdir(tmp_path)
    results = runpy.run_path(str(EXAMPLE))["results"]
    lineage = tmp_path / "lineage.jsonl"
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
    scheduler = PBTScheduler({"lr": {"type": "float", "low": 1e-4, "high": 0.02}}, interval=5)
    scheduler.set_search_properties("accuracy", None)
    with pytest.raises(RecipeError, match=r"^PBTScheduler: set metric and mode, here or in TuneConfig$"):
        scheduler.on_trial_add(None, None)
