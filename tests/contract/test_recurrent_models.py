"""Recurrent models in whole runs: with synchronisers, in bfloat16, with dropout, averaged, killed and resumed."""

import shutil
from pathlib import Path

import torch

from raytrain.models.recurrent import CELLS
from raytrain.run.checkpoint import list_checkpoints, load_part, read_manifest
from raytrain.run.directory import RunDirectory
from raytrain.testing import repeatable_rows, train_each_with_gloo, train_here
from raytrain.training.recipe import TrainRecipe

SYNC = {"elman": "scalars", "gru": "diloco", "lstm": "ddp"}


def recipe(folder: Path, cell: str, sync: str) -> TrainRecipe:
    optimizer = {"name": "zo-sgd", "lr": 1e-2} if sync == "scalars" else {"name": "adamw", "lr": 1e-2}
    (folder / "text.txt").write_text("To be, or not to be, that is the question. " * 40)
    task = {"name": "text", "path": str(folder / "text.txt"), "model": cell, "layers": 2, "width": 8, "block": 16}
    return TrainRecipe.parse(
        {
            "kind": "train",
            "task": {**task, "dropout": 0.2},
            "steps": 8,
            "batch": 4,
            "workers": 2,
            "precision": "bfloat16",
            "ema": 0.9 if sync == "ddp" else 0.0,
            "optimizer": optimizer,
            "sync": {"name": sync, **({"every": 2} if sync == "diloco" else {})},
            "evaluation": {"every": 4},
            "checkpoint": {"every": 2, "keep": 9},
            "log": {"every": 1, "loggers": []},
        }
    )


def ends(folder: Path) -> dict[str, torch.Tensor]:
    state = load_part(list_checkpoints(RunDirectory(folder).checkpoints)[-1], 0)
    return {**state["model"], **{f"average of {name}": value for name, value in (state.get("ema") or {}).items()}}


def test_a_killed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    plans = {cell: recipe(tmp_path, cell, sync) for cell, sync in SYNC.items()}
    assert train_each_with_gloo([(plan, tmp_path / cell) for cell, plan in plans.items()]) == [0, 0]
    for cell in plans:
        shutil.copytree(tmp_path / cell, tmp_path / f"{cell} killed")
        for path in list_checkpoints(tmp_path / f"{cell} killed" / "checkpoints"):
            if read_manifest(path).step > 4:
                shutil.rmtree(path)
    assert train_each_with_gloo([(plan, tmp_path / f"{cell} killed") for cell, plan in plans.items()]) == [0, 0]
    for cell, plan in plans.items():
        whole, resumed = ends(tmp_path / cell), ends(tmp_path / f"{cell} killed")
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), cell
        rows = repeatable_rows(tmp_path / cell / "metrics.jsonl")
        assert rows == repeatable_rows(tmp_path / f"{cell} killed" / "metrics.jsonl")
        first, last = (row["valid"]["loss"] for row in rows if "valid" in row)
        assert last < first or plan.sync.name == "scalars"


def test_two_workers_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    exact = {"precision": "float32", "task.dropout": 0.0, "ema": 0.0, "optimizer": {"name": "sgd", "lr": 0.1}}
    plans = {cell: recipe(tmp_path, cell, "ddp").with_overrides(exact) for cell in CELLS}
    assert train_each_with_gloo([(plan, tmp_path / cell) for cell, plan in plans.items()]) == [0, 0]
    for cell, plan in plans.items():
        one = ends(train_here(plan.with_overrides({"workers": 1, "batch": 8}), tmp_path / f"{cell} alone").path)
        two = ends(tmp_path / cell)
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
