"""One byte a probe: processes stay equal to the bit, a dead one is replaced by more; weights of losses travel too."""

from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.overrides import apply_overrides
from raytrain.run.checkpoint import list_checkpoints, load_part, read_manifest
from raytrain.run.directory import RunDirectory
from raytrain.run.rows import read_jsonl
from raytrain.seeds.records import read_trajectory, trajectory_steps
from raytrain.testing import PEER_LOST_STATUS, train_here, train_with_gloo, train_with_threads
from raytrain.training.build import resolve_recipe
from raytrain.training.recipe import TrainRecipe
from raytrain.zeroth.replay import replay_trajectory

CHECK, STOP = 50, 8
BROADCAST_BYTES = 4 * (8 * 4 + 8 + 8 + 1 + 9 + 3) + 2 * 2  # the tiny model's parameters, and its buffer


def recipe(workers: int, **more: Any) -> TrainRecipe:
    fields = {
        "kind": "train",
        "task": "raytrain.testing:tiny",
        "optimizer": {"name": "zo-sgd", "lr": 0.02},
        "workers": workers,
        "steps": 500,
        "batch": 10,
        "evaluation.every": 0,
        "checkpoint.every": 100,
        "log": {"every": 100, "loggers": []},
        "sync": {"name": "one-byte", "check_every": CHECK, "stop_every": STOP, "timeout_seconds": 20},
    }
    return TrainRecipe.parse(apply_overrides({}, {**fields, **more}))


def retraced(plan: TrainRecipe, run: RunDirectory) -> bool:
    """Return whether the trajectory gives what the run saved, to the bit."""
    module = resolve_recipe(plan, run)[1].model(plan.seed)
    replay_trajectory(run.trajectory, module)
    saved = load_part(list_checkpoints(run.checkpoints)[-1], 0)["model"]
    return all(torch.equal(value, saved[name]) for name, value in module.named_parameters())


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_are_equal_after_500_steps_of_a_byte_each(workers: int, tmp_path: Path) -> None:
    plan = recipe(workers)
    assert train_with_gloo(plan, tmp_path / "run") == [0] * workers  # which compares a hash every 50 steps
    run = RunDirectory(tmp_path / "run")
    assert run.failure() is None
    sent = read_manifest(list_checkpoints(run.checkpoints)[-1]).progress["bytes_sent"]
    slopes = 4 + 499  # the first of four bytes, from which all know how large slopes are
    assert sent == BROADCAST_BYTES + (workers - 1) * (slopes + 4 * 500 + 500 // STOP + 8 * (500 // CHECK))
    assert retraced(plan, run)
    assert measured(run) < 0.3  # 1.7 before


@pytest.mark.parametrize("workers", [2, 4])
def test_a_byte_a_probe_trains_as_well_as_exact_numbers_and_as_one_worker_with_all_probes(
    workers: int, tmp_path: Path
) -> None:
    """The examples of a step and the number of its directions are the same in all three."""
    plan = recipe(workers)
    byte = measured(train_with_threads(plan, tmp_path / "byte"))
    exact = measured(train_with_threads(plan.with_overrides({"sync.name": "scalars"}), tmp_path / "exact"))
    assert byte == pytest.approx(exact, rel=0.02)
    alone = plan.with_overrides({"workers": 1, "batch": 10 * workers, "zo.num_perturbations": workers})
    assert byte == pytest.approx(measured(train_here(alone, tmp_path / "alone")), rel=0.1)


def measured(run: RunDirectory) -> float:
    """Return the last held-out loss."""
    loss: float = [row["valid"]["loss"] for row in read_jsonl(run.metrics) if "valid" in row][-1]
    return loss


def test_a_worker_dies_and_more_go_on_from_what_was_saved(workplace: Path) -> None:
    (workplace / "killed.py").write_text(
        "from pathlib import Path\nfrom raytrain.testing import FaultPlan\n"
        f"plan = FaultPlan(Path({str(workplace)!r})).at(1, 250, 'kill')\n"
    )
    plan, folder = recipe(2, callbacks=["killed:plan"]), workplace / "run"
    assert sorted(train_with_gloo(plan, folder)) == [-9, PEER_LOST_STATUS]
    joined = plan.with_overrides({"workers": 3})
    assert train_with_gloo(joined, folder) == [0, 0, 0]
    run = RunDirectory(folder)
    assert run.failure() is None
    _, records = read_trajectory(run.trajectory)
    sizes = {step.step: len(step.projected_gradients) for step in trajectory_steps(records)}
    assert {max(sizes[step] for step in span if step in sizes) for span in (range(200), range(200, 500))} == {2, 3}
    assert sizes[200] == 3  # it saves every 100 steps, and died in step 250
    assert retraced(joined, run)
