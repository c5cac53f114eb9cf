"""Faults in workers that Ray started: what can be survived is, and what cannot is told at once."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.checkpoint import listed, load
from raytrain.errors import TrainingError
from raytrain.kinds import Order
from raytrain.overrides import merged
from raytrain.rundir import RunDirectory, rows
from raytrain.testing import train_with_threads
from raytrain.train_recipe import TrainRecipe

TINY = {
    "kind": "train",
    "task": {"name": "raytrain.testing:tiny"},
    "steps": 60,
    "batch": 4,
    "workers": 2,
    "evaluation": {"every": 20},
    "checkpoint": {"every": 10},
    "log": {"every": 1, "to": []},
    "resources": {"cpus": 1},
    "sync": {"timeout_seconds": 60},  # a busy machine may take many seconds for what happens before the first step
}


def recipe(workplace: Path, *faults: str, **changes: Any) -> TrainRecipe:
    plan = "".join(f".at({fault})" for fault in faults)
    (workplace / "faults.py").write_text(
        "from pathlib import Path\nfrom raytrain.testing import FaultPlan\n"
        f"plan = FaultPlan(Path({str(workplace)!r})){plan}\n"
    )
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    return TrainRecipe.parse(merged({**TINY, "callbacks": ["faults:plan"]}, fields))


def faults(workplace: Path) -> list[str]:
    from faults import plan

    return plan.happened()


def test_killed_and_hanging_workers_are_started_again(ray_cluster: None, workplace: Path) -> None:
    from raytrain.launch import run

    broken = recipe(workplace, "1, 15, 'kill'", "0, 35, 'hang'", sync__timeout_seconds=20)
    result = run(broken, Order(workplace / "broken"))
    assert (result.status, result.restarts) == ("done", 2)
    assert faults(workplace) == ["hang at rank 0, step 35", "kill at rank 1, step 15"]
    whole = train_with_threads(broken.with_overrides({"callbacks": []}), workplace / "whole")
    one, other = (load(listed(path.checkpoints)[-1], 0) for path in (whole, RunDirectory(workplace / "broken")))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    notes = rows(workplace / "broken" / "restarts.jsonl")
    assert notes[0]["workers"]["1"] == "its process died: killed, out of memory, or crashed"
    assert notes[1]["workers"]["0"].startswith("it hung, and was ended; its stack is in ")
    (stack,) = (workplace / "broken").glob("hang-worker-0-*.txt")
    assert notes[1]["workers"]["0"].endswith(str(stack))
    assert "testing.py" in stack.read_text()
    assert [row["from_step"] for row in rows(workplace / "broken" / "attempts.jsonl")] == [0, 10, 30]


def test_many_checkpoints_cost_no_waiting(ray_cluster: None, workplace: Path) -> None:
    """Ray takes one report in each of its polls, for which a run that saves faster would wait: it gets the last one."""
    from raytrain.launch import run

    result = run(recipe(workplace, checkpoint__every=1), Order(workplace / "run"))
    assert (result.status, result.restarts) == ("done", 0)
    seen = json.loads((workplace / "run" / "checkpoints" / "checkpoint_manager_snapshot.json").read_text())
    assert seen["current_report_index"] == 1
    assert [kept["checkpoint_dir_name"] for kept in seen["checkpoint_results"]] == ["step-00000060"]


def test_a_worker_that_fails_too_often_ends_the_run(
    ray_cluster: None, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from raytrain.launch import run

    broken = recipe(workplace, "0, 15, 'kill'", "1, 25, 'kill'", max_failures=1)
    with pytest.raises(TrainingError) as caught:
        run(broken, Order(workplace / "run"))
    assert str(caught.value).startswith("the workers failed more often than max_failures allows; ")
    assert str(caught.value).endswith(f"the last complete checkpoint is {workplace}/run/checkpoints/step-00000020")
    shown = capsys.readouterr().err
    assert "worker 0: its process died: killed, out of memory, or crashed" in shown
    assert f"continue with: raytrain train {workplace}/run --resume" in shown
    result = run(broken, Order(workplace / "run", resume=True))
    notes = rows(workplace / "run" / "restarts.jsonl")
    assert (result.status, result.steps, result.restarts) == ("done", 60, 2), notes


def test_an_error_in_the_users_code_is_shown_and_not_tried_again(ray_cluster: None, workplace: Path) -> None:
    from raytrain.launch import run

    with pytest.raises(TrainingError) as caught:
        run(recipe(workplace, "1, 25, 'fail'"), Order(workplace / "run"))
    assert "RuntimeError: a fault on purpose at rank 1, step 25" in str(caught.value)
    assert "testing.py" in str(caught.value)
    assert str(caught.value).endswith(f"the last complete checkpoint is {workplace}/run/checkpoints/step-00000020")
    assert len(rows(workplace / "run" / "attempts.jsonl")) == 1
    assert '"status": "failed"' in (workplace / "run" / "result.json").read_text()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            "Worker(hostname='node-b')\nThe actor died unexpectedly before",
            "its process died: killed, out of memory, or ",
        ),
        ("Worker(hostname='node-b')\nPeerLostError: x", "it lost another worker (on node-b)"),
        ("Worker(hostname='node-b')\nit is too late", "it is too late (on node-b)"),
    ],
)
def test_a_fault_on_another_machine_says_where(text: str, what: str) -> None:
    from raytrain.launch import cause

    assert cause(RuntimeError(text)).startswith(what)
    assert cause(RuntimeError(text)).endswith(" (on node-b)")
    assert "(on" not in cause(RuntimeError(text.replace("node-b", socket.gethostname())))
