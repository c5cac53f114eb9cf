"""One process, threads and gloo processes train alike, to the bit where sums have one order.

So do the workers of Ray, which `test_faults_on_ray` compares with threads and gloo processes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.overrides import apply_overrides
from raytrain.run.checkpoint import list_checkpoints, load_part, read_manifest
from raytrain.run.directory import RunDirectory
from raytrain.run.rows import read_jsonl
from raytrain.testing import PEER_LOST_STATUS, repeatable_rows, train_here, train_with_gloo, train_with_threads
from raytrain.training.recipe import TrainRecipe

TINY = {
    "kind": "train",
    "task": {"name": "raytrain.testing:tiny"},
    "precision": "float64",
    "steps": 50,
    "batch": 4,
    "optimizer": {"lr": 0.02},
    "schedule": {"warmup": 5},
    "evaluation": {"every": 20},
    "checkpoint": {"every": 10, "keep": 9},
    "log": {"every": 1, "loggers": []},
    "sync": {"bucket_bytes": 200, "timeout_seconds": 20},
}


def recipe(**changes: Any) -> TrainRecipe:
    return TrainRecipe.parse(apply_overrides(TINY, {name.replace("__", "."): value for name, value in changes.items()}))


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_part(list_checkpoints(folder / "checkpoints")[-1], 0)["model"]


def equal(one: Path, other: Path) -> bool:
    first, second = final(one), final(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def history(folder: Path) -> list[dict[str, Any]]:
    """Return the log without what depends on the clock."""
    return repeatable_rows(folder / "metrics.jsonl")


def test_threads_equal_gloo_processes_to_the_bit(tmp_path: Path) -> None:
    train_with_threads(recipe(workers=2), tmp_path / "threads")
    assert train_with_gloo(recipe(workers=2), tmp_path / "gloo") == [0, 0]
    assert equal(tmp_path / "threads", tmp_path / "gloo")
    assert history(tmp_path / "threads") == history(tmp_path / "gloo")


def test_two_gloo_runs_are_equal_to_the_bit(tmp_path: Path) -> None:
    changes = {
        "workers": 2,
        "task__dropout": 0.3,
        "task__norm": True,
        "ema": 0.9,
        "batch": 2,
        "accumulate": 2,
        "precision": "float32",
    }
    for name in ("one", "two"):
        assert train_with_gloo(recipe(**changes), tmp_path / name) == [0, 0]
    assert equal(tmp_path / "one", tmp_path / "two")
    assert history(tmp_path / "one") == history(tmp_path / "two")


def test_two_workers_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    assert train_with_gloo(recipe(workers=2, batch=4), tmp_path / "two") == [0, 0]
    train_here(recipe(workers=1, batch=8), tmp_path / "one")
    one, two = final(tmp_path / "one"), final(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-12)
    for row_of_one, row_of_two in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert row_of_one["samples"] == row_of_two["samples"]
        assert row_of_one.get("valid") == pytest.approx(row_of_two.get("valid"))


@pytest.mark.parametrize(
    "changes", [{}, {"task__dropout": 0.4, "ema": 0.95, "task__norm": True, "precision": "float32"}]
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    straight = recipe(**changes)
    train_here(straight, tmp_path / "straight")
    for steps in (7, 10, 33, 50):
        part = straight.with_overrides({"steps": steps, "schedule.name": "constant"})
        train_here(part, tmp_path / "constant")
    train_here(straight.with_overrides({"schedule.name": "constant"}), tmp_path / "whole")
    assert equal(tmp_path / "constant", tmp_path / "whole")
    assert not equal(tmp_path / "straight", tmp_path / "whole")


def test_all_workers_stop_early_together(tmp_path: Path) -> None:
    still = recipe(workers=3, optimizer__lr=0.0, evaluation__every=5, evaluation__patience=2)
    run = train_with_threads(still, tmp_path / "run")
    assert run.failure() is None
    assert [row["step"] for row in history(tmp_path / "run") if "valid" in row] == [5, 10, 15]
    assert read_manifest(list_checkpoints(run.checkpoints)[-1]).progress["status"] == "stopped early"


def test_a_run_resumes_with_another_number_of_workers(tmp_path: Path) -> None:
    """The sampler's position goes on, so the same examples are in each step."""
    train_with_threads(recipe(workers=2, batch=4, steps=20, schedule__name="constant"), tmp_path / "mixed")
    train_here(recipe(workers=1, batch=8, steps=30, schedule__name="constant"), tmp_path / "mixed")
    train_with_threads(recipe(workers=4, batch=2, schedule__name="constant"), tmp_path / "mixed")
    train_here(recipe(workers=1, batch=8, schedule__name="constant"), tmp_path / "one")
    one, mixed = final(tmp_path / "one"), final(tmp_path / "mixed")
    for name in one:
        torch.testing.assert_close(one[name], mixed[name], rtol=1e-9, atol=1e-12)


def faulty(workplace: Path, *faults: str) -> dict[str, Any]:
    """Write a module with a plan of faults into the current folder, and return the recipe's change that uses it."""
    plan = "".join(f".at({fault})" for fault in faults)
    (workplace / "faults.py").write_text(
        "from pathlib import Path\nfrom raytrain.testing import FaultPlan\n"
        f"plan = FaultPlan(Path({str(workplace)!r})){plan}\n"
    )
    return {"callbacks": ["faults:plan"]}


def test_a_killed_process_is_noticed_and_the_run_resumes_to_the_bit(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(workplace))
    broken = recipe(workers=2, **faulty(workplace, "1, 27, 'kill'", "0, 43, 'kill'"))
    assert train_with_gloo(broken, workplace / "broken") == [PEER_LOST_STATUS, -9]
    assert train_with_gloo(broken, workplace / "broken") == [-9, PEER_LOST_STATUS]
    assert train_with_gloo(broken, workplace / "broken") == [0, 0]
    assert [row["from_step"] for row in read_jsonl(workplace / "broken" / "attempts.jsonl")] == [0, 20, 40]
    train_with_threads(recipe(workers=2), workplace / "whole")
    assert equal(workplace / "broken", workplace / "whole")
    assert history(workplace / "broken") == history(workplace / "whole")


def test_an_error_ends_all_workers_at_once_and_is_told_to_the_command(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after a timeout, and not as the loss of a peer: starting again would not help."""
    monkeypatch.setenv("PYTHONPATH", str(workplace))
    broken = recipe(workers=2, sync__timeout_seconds=60, **faulty(workplace, "1, 27, 'fail'"))
    assert train_with_gloo(broken, workplace / "run") == [0, 0]
    failure = RunDirectory(workplace / "run").failure()
    assert failure.message == "worker 1: RuntimeError: a fault on purpose at rank 1, step 27"
    assert "testing.py" in failure.trace
    assert [path.name for path in list_checkpoints(workplace / "run" / "checkpoints")] == [
        "step-00000010",
        "step-00000020",
    ]
