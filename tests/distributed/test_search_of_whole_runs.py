"""Searches whose trials are whole runs: of another kind than `train`, or of several workers each."""

import json
from pathlib import Path
from typing import Any

import pytest

from raytrain.errors import RecipeError
from raytrain.kinds import RunOptions, load_kind
from raytrain.recipe import read_toml
from raytrain.registry import resolve
from raytrain.run.directory import RunDirectory
from raytrain.training.callbacks import STOP_CHECK_SECONDS
from search.launch.base import check_search
from search.launch.run import run_search
from search.launch.whole_run import WholeRun
from search.launch.winner import load_winner
from search.recipe import SearchRecipe
from search.scheduling.work import Snapshot, Work

FEDERATED: dict[str, Any] = {
    "kind": "federate",
    "task": "raytrain.testing:tiny",
    "clients": {"count": 6, "per_round": 3, "actors": 1, "cpus": 0.5},
    "rounds": 2,
    "protocol": {"pool": 64, "local_steps": 4, "batch": 4},
}
TRAIN: dict[str, Any] = {
    "kind": "train",
    "task": "raytrain.testing:tiny",
    "steps": 20,
    "workers": 2,
    "sync": {"name": "delayed-averaging", "every": 4, "delay": 2},
    "checkpoint": {"every": 5},
}
SPACE = {"optimizer": {"lr": {"type": "float", "low": 1e-3, "high": 1e-1, "scale": "log"}}}


def recipe(base: dict[str, Any], **search: Any) -> SearchRecipe:
    section = {"name": "random", "trials": 2, "space": SPACE, "metric": "loss", "mode": "min", **search}
    return SearchRecipe.parse({"kind": "search", "base": base, "search": section})


def run_again(file: Path, folder: Path) -> dict[str, float]:
    """Run a recipe by the kind that it names, and return its metrics."""
    raw, _ = read_toml(str(file), [])
    kind = load_kind(raw["kind"])
    result = resolve({}, kind.run, "kind")(kind.recipe_class().parse(raw), RunOptions(folder, address="local"))
    return dict(result.metrics)


@pytest.mark.usefixtures("ray_cluster")
def test_a_federated_recipe_is_searched_through_its_kind(tmp_path: Path) -> None:
    result = run_search(recipe(FEDERATED), RunOptions(tmp_path / "run"))
    assert (result.status, result.figures["trials"], result.figures["failed"]) == ("done", 2, 0)
    results = [json.loads((tmp_path / "run" / "runs" / str(trial) / "result.json").read_text()) for trial in (0, 1)]
    assert result.best["value"] == min(one["metrics"]["loss"] for one in results)
    assert run_again(tmp_path / "run" / "winner.toml", tmp_path / "again") == dict(result.metrics)
    assert load_winner(tmp_path / "run", {}).module is not None


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_of_two_workers_that_is_stopped_goes_on(workplace: Path) -> None:
    (workplace / "mine.py").write_text(
        "import time\nfrom pathlib import Path\n\n"
        "def stop(replica):\n"
        "    if replica.progress.step == 8 and not (mark := Path(__file__).with_name('mark')).exists():\n"
        "        mark.touch()\n"
        f"        Path({str(workplace)!r}, 'search', 'runs', '3', 'stop').touch()\n"
        f"        time.sleep({1.5 * STOP_CHECK_SECONDS})\n"
    )
    base = check_search(recipe({**TRAIN, "callbacks": ["mine:stop"]})).base
    trial = WholeRun(base, workplace / "search")
    work = Work("3.0.0", 3, 3, Snapshot(), 20, {"optimizer.lr": 0.01}, seed=5)
    paused = trial.train(work, None)
    assert (paused.state, paused.step) == (b"runs/3", 0)
    end = trial.train(work, paused.state)
    assert (end.state, end.step) == (b"runs/3", 20)
    file = workplace / "whole.toml"
    file.write_text(base.with_overrides({"seed": 5, "optimizer.lr": 0.01}).to_toml())
    assert run_again(file, workplace / "whole") == dict(end.metrics)
    trial.stop()
    assert RunDirectory(workplace / "search" / "runs" / "3").stop_requested()
    assert trial.train(work, None).step == 0, "what begins after it was asked to stop does nothing"


@pytest.mark.parametrize("missing", ["metric", "mode"])
def test_a_base_of_another_kind_needs_a_metric(missing: str) -> None:
    with pytest.raises(RecipeError) as error:
        check_search(recipe(FEDERATED, **{missing: ""}))
    assert str(error.value) == (
        f"search.{missing}: required with a base recipe of the kind federate; search.metric is one of the metrics in "
        "the result of its runs, search.mode is min or max"
    )
