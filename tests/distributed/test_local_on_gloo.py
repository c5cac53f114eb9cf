"""Local updates: threads, gloo processes and Ray workers train alike, and a killed run resumes to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.checkpoint import listed, load
from raytrain.kinds import Order
from raytrain.recipe import merged
from raytrain.rundir import rows
from raytrain.testing import PEER_LOST, train_here, train_with_gloo, train_with_threads
from raytrain.train_recipe import TrainRecipe

TINY = {
    "kind": "train",
    "task": {"name": "raytrain.testing:tiny", "norm": True},
    "workers": 2,
    "steps": 50,
    "batch": 4,
    "optimizer": {"lr": 0.02},
    "schedule": {"warmup": 5},
    "evaluation": {"every": 20},
    "checkpoint": {"every": 10, "keep": 9},
    "log": {"every": 1, "to": []},
    "sync": {"name": "cocod", "every": 7, "timeout_seconds": 20},
}
METHODS = ["local-sgd", "slowmo", "diloco", "cocod", "late", "co2"]


def recipe(**changes: Any) -> TrainRecipe:
    return TrainRecipe.parse(merged(TINY, {name.replace("__", "."): value for name, value in changes.items()}))


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load(listed(folder / "checkpoints")[-1], 0)["model"]


def equal(one: Path, other: Path) -> bool:
    first, second = final(one), final(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def history(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(folder / "metrics.jsonl")]


@pytest.mark.parametrize("method", METHODS)
def test_threads_equal_gloo_processes_to_the_bit(tmp_path: Path, method: str) -> None:
    run = train_with_threads(recipe(sync__name=method), tmp_path / "threads")
    assert run.failure() is None
    assert train_with_gloo(recipe(sync__name=method), tmp_path / "gloo") == [0, 0]
    assert equal(tmp_path / "threads", tmp_path / "gloo")
    assert history(tmp_path / "threads") == history(tmp_path / "gloo")


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(tmp_path: Path, method: str) -> None:
    train_with_threads(recipe(sync__name=method, steps=150), tmp_path / "run")
    losses = [row["valid"]["loss"] for row in history(tmp_path / "run") if "valid" in row]
    assert losses[-1] < 0.7 * losses[0]


def faulty(workplace: Path, *faults: str) -> dict[str, Any]:
    plan = "".join(f".at({fault})" for fault in faults)
    (workplace / "faults.py").write_text(
        "from pathlib import Path\nfrom raytrain.testing import FaultPlan\n"
        f"plan = FaultPlan(Path({str(workplace)!r})){plan}\n"
    )
    return {"callbacks": ["faults:plan"]}


def test_a_worker_killed_during_an_exchange_is_noticed_and_the_run_resumes_to_the_bit(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints are taken in the middle of rounds too, with an exchange under way."""
    monkeypatch.setenv("PYTHONPATH", str(workplace))
    broken = recipe(**faulty(workplace, "1, 17, 'kill'", "0, 43, 'kill'"))
    assert train_with_gloo(broken, workplace / "broken") == [PEER_LOST, -9]
    assert train_with_gloo(broken, workplace / "broken") == [-9, PEER_LOST]
    assert train_with_gloo(broken, workplace / "broken") == [0, 0]
    assert [row["from_step"] for row in rows(workplace / "broken" / "attempts.jsonl")] == [0, 10, 40]
    train_with_threads(recipe(), workplace / "whole")
    assert equal(workplace / "broken", workplace / "whole")
    assert history(workplace / "broken") == history(workplace / "whole")


def test_a_run_resumes_with_another_number_of_workers(tmp_path: Path) -> None:
    train_with_threads(recipe(steps=20), tmp_path / "run")
    run = train_here(recipe(workers=1), tmp_path / "run")
    assert run.failure() is None
    run = train_with_threads(recipe(workers=3, steps=70), tmp_path / "run")
    assert run.failure() is None
    assert listed(run.checkpoints)[-1].name == "step-00000070"


def test_ray_workers_equal_gloo_processes_to_the_bit(ray_cluster: None, tmp_path: Path) -> None:
    from raytrain.launch import run

    result = run(recipe(resources__cpus=1), Order(tmp_path / "ray"))
    assert train_with_gloo(recipe(), tmp_path / "gloo") == [0, 0]
    assert equal(tmp_path / "ray", tmp_path / "gloo")
    assert history(tmp_path / "ray") == history(tmp_path / "gloo")
    assert result.bytes_sent > 0
