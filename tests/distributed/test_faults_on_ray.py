"""Workers that Ray started train as threads and gloo processes do; faults that can be survived are, others are told."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.errors import RecipeError, TrainingError
from raytrain.kinds import RunOptions
from raytrain.overrides import apply_overrides
from raytrain.run.checkpoint import list_checkpoints, load_part
from raytrain.run.rows import read_jsonl
from raytrain.testing import repeatable_rows, train_with_gloo, train_with_threads
from raytrain.training.recipe import TrainRecipe

TINY = {
    "kind": "train",
    "task": {"name": "raytrain.testing:tiny"},
    "steps": 60,
    "batch": 4,
    "workers": 2,
    "evaluation": {"every": 20},
    "checkpoint": {"every": 10},
    "log": {"every": 1, "loggers": []},
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
    return TrainRecipe.parse(apply_overrides({**TINY, "callbacks": ["faults:plan"]}, fields))


def faults(workplace: Path) -> list[str]:
    from faults import plan

    return plan.happened()


def check_equal(one: Path, other: Path) -> None:
    """Check that two runs are equal to the bit, and their logs but for the clock."""
    first, second = (load_part(list_checkpoints(folder / "checkpoints")[-1], 0)["model"] for folder in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert repeatable_rows(one / "metrics.jsonl") == repeatable_rows(other / "metrics.jsonl")


def test_killed_and_hanging_workers_are_started_again_and_equal_threads(ray_cluster: None, workplace: Path) -> None:
    from raytrain.launch.train import run_on_ray

    broken = recipe(workplace, "1, 15, 'kill'", "0, 35, 'hang'", sync__timeout_seconds=20)
    result = run_on_ray(broken, RunOptions(workplace / "broken"))
    assert (result.status, result.restarts) == ("done", 2)
    assert (result.figures["steps"], result.figures["samples"]) == (60, 480)
    assert result.figures["bytes_sent"] > 0
    assert faults(workplace) == ["hang at rank 0, step 35", "kill at rank 1, step 15"]
    train_with_threads(broken.with_overrides({"callbacks": []}), workplace / "whole")
    check_equal(workplace / "broken", workplace / "whole")
    notes = read_jsonl(workplace / "broken" / "restarts.jsonl")
    assert notes[0]["workers"]["1"] == "its process died: killed, out of memory, or crashed"
    assert notes[1]["workers"]["0"].startswith("it hung, and was ended; its stack is in ")
    (stack,) = (workplace / "broken").glob("hang-worker-0-*.txt")
    assert notes[1]["workers"]["0"].endswith(str(stack))
    assert "testing.py" in stack.read_text()
    assert [row["from_step"] for row in read_jsonl(workplace / "broken" / "attempts.jsonl")] == [0, 10, 30]


def test_many_checkpoints_of_local_updates_cost_no_waiting_and_equal_those_of_threads(
    ray_cluster: None, workplace: Path
) -> None:
    """Ray takes one report in each of its polls, for which a run that saves faster would wait: it gets the last one."""
    from raytrain.launch.train import run_on_ray

    sync = {
        "name": "delayed-averaging",
        "every": 7,
        "delay": 5,
        "compression": "int8",
        "buffers": "local",
        "timeout_seconds": 60,
    }
    settings = TrainRecipe.parse({**recipe(workplace, checkpoint__every=1, task__norm=True).to_dict(), "sync": sync})
    result = run_on_ray(settings, RunOptions(workplace / "run"))
    assert (result.status, result.restarts) == ("done", 0)
    assert result.figures["bytes_sent"] > 0
    train_with_threads(settings, workplace / "threads")
    check_equal(workplace / "run", workplace / "threads")
    seen = json.loads((workplace / "run" / "checkpoints" / "checkpoint_manager_snapshot.json").read_text())
    assert seen["current_report_index"] == 1
    assert [kept["checkpoint_dir_name"] for kept in seen["checkpoint_results"]] == ["step-00000060"]


def test_a_sharded_worker_that_fails_too_often_ends_the_run_which_goes_on_to_the_bit(
    ray_cluster: None, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from raytrain.launch.train import run_on_ray

    broken = recipe(workplace, "1, 25, 'kill'", max_failures=0, sync__name="fsdp")
    with pytest.raises(TrainingError) as caught:
        run_on_ray(broken, RunOptions(workplace / "run"))
    assert str(caught.value).startswith("the workers failed more often than max_failures allows; ")
    assert str(caught.value).endswith(f"the last complete checkpoint is {workplace}/run/checkpoints/step-00000020")
    shown = capsys.readouterr().err
    assert "worker 1: its process died: killed, out of memory, or crashed" in shown
    assert f"continue with: raytrain train {workplace}/run --resume" in shown
    result = run_on_ray(broken, RunOptions(workplace / "run", resume=True))
    notes = read_jsonl(workplace / "run" / "restarts.jsonl")
    assert (result.status, result.figures["steps"], result.restarts) == ("done", 60, 1), notes
    assert train_with_gloo(broken.with_overrides({"callbacks": []}), workplace / "whole") == [0, 0]
    check_equal(workplace / "run", workplace / "whole")


def test_an_error_in_the_users_code_is_shown_and_not_tried_again(ray_cluster: None, workplace: Path) -> None:
    from raytrain.launch.train import run_on_ray

    with pytest.raises(TrainingError) as caught:
        run_on_ray(recipe(workplace, "1, 25, 'fail'"), RunOptions(workplace / "run"))
    assert "RuntimeError: a fault on purpose at rank 1, step 25" in str(caught.value)
    assert "testing.py" in str(caught.value)
    assert str(caught.value).endswith(f"the last complete checkpoint is {workplace}/run/checkpoints/step-00000020")
    assert len(read_jsonl(workplace / "run" / "attempts.jsonl")) == 1
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
        (
            "A worker health check has been hanging for 21.53 seconds. Marking the worker as dead.\nWorker info: "
            "Worker(hostname='node-b')\nSet the RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S environment variable to incr",
            "it did not answer for 21 s: stopped (SIGSTOP) or swapped out, or its machine is too busy (on node-b)",
        ),
    ],
)
def test_a_fault_on_another_machine_says_where(text: str, what: str) -> None:
    from raytrain.launch.train import describe_failure

    assert describe_failure(RuntimeError(text)).startswith(what)
    assert describe_failure(RuntimeError(text)).endswith(" (on node-b)")
    assert "(on" not in describe_failure(RuntimeError(text.replace("node-b", socket.gethostname())))


def test_a_machine_that_is_too_busy_for_ray_is_said_after_a_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray waits 30 s for its own processes, and then raises an `Exception` of no class of its own."""
    import ray

    from raytrain.launch.session import _start_ray

    tried = []

    def slow(*words: Any, **options: Any) -> None:
        tried.append(words)
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", slow)
    with pytest.raises(
        RecipeError, match=r"^cannot start Ray on this machine: it did not start in time, twice; the ma"
    ):
        _start_ray(None)
    assert tried == [("local",), ("local",)]
