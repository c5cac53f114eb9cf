"""Workers on this machine, without Ray: what can be survived is, and what cannot is told at once."""

import ipaddress
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from raytrain.errors import RecipeError, TrainingError
from raytrain.kinds import RunOptions
from raytrain.launch.dispatch import run_training
from raytrain.overrides import apply_overrides
from raytrain.run.checkpoint import list_checkpoints, load_part
from raytrain.run.directory import RunDirectory
from raytrain.run.rows import read_jsonl
from raytrain.testing import train_with_threads
from raytrain.testing_command import Command, start_command
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


@pytest.fixture(scope="module", autouse=True)
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TrainRecipe, Path, Command]]:
    """A run with faults that take their time, while the other tests go on."""
    folder = tmp_path_factory.mktemp("broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        faults = ("1, 15, 'kill'", "0, 25, 'hang'", "1, 35, 'stop'", "0, 45, 'leave'")
        settings = recipe(folder, *faults, sync__timeout_seconds=15, max_failures=4)
    (folder / "broken.toml").write_text(settings.to_toml())
    command = start_command(["train", "broken.toml", "--out", "run"], folder, os.environ)
    yield settings, folder / "run", command
    command.kill()


def test_a_worker_that_fails_too_often_ends_the_run(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loggers = [logging.getLogger(name) for name in (None, "torch.distributed.elastic", "torch.multiprocessing.spawn")]
    before = [(each.level, list(each.handlers), each.propagate) for each in loggers]
    broken = recipe(workplace, "0, 15, 'kill'", "1, 25, 'kill'", max_failures=1)
    with pytest.raises(TrainingError) as caught:
        run_training(broken, RunOptions(workplace / "run"))
    assert str(caught.value) == (
        "the workers failed more often than max_failures allows; "
        "worker 1: its process died: killed, out of memory, or crashed (SIGKILL)\n"
        f"the last complete checkpoint is {workplace}/run/checkpoints/step-00000020"
    )
    shown = capfd.readouterr().err
    assert f"continue with: raytrain train {workplace}/run --resume" in shown
    assert "elastic" not in shown, "what torch logs of it is not for the user"
    assert "WARNING" not in shown
    assert [(each.level, each.handlers, each.propagate) for each in loggers] == before
    result = run_training(broken, RunOptions(workplace / "run", resume=True))
    assert (result.status, result.figures["steps"], result.restarts) == ("done", 60, 2)


def test_an_error_in_the_users_code_is_shown_and_not_tried_again(workplace: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        run_training(recipe(workplace, "1, 25, 'fail'"), RunOptions(workplace / "run"))
    assert "RuntimeError: a fault on purpose at rank 1, step 25" in str(caught.value)
    assert "testing.py" in str(caught.value)
    assert str(caught.value).endswith(f"the last complete checkpoint is {workplace}/run/checkpoints/step-00000020")
    assert len(read_jsonl(workplace / "run" / "attempts.jsonl")) == 1
    assert json.loads((workplace / "run" / "result.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"resources__gpus": 1},
            r"^resources.gpus: 2 workers of 1 GPU each do not fit on 0 GPU\(s\); set ",
        ),
        (
            {"resources__custom": {"fast": 1}},
            r"^resources.custom.fast: no machine has it; there are CPU; a machine ",
        ),
        ({"workers": 999}, r"^workers: 999 workers of 1 CPU each do not fit on 1 machine\(s\) with "),
    ],
)
def test_workers_that_do_not_fit_are_refused(workplace: Path, changes: dict[str, Any], message: str) -> None:
    if torch.cuda.is_available() and "resources__gpus" in changes:
        pytest.skip("this machine has a GPU")
    with pytest.raises(RecipeError, match=message):
        run_training(recipe(workplace, **changes), RunOptions(workplace / "run"))
    assert not (workplace / "run").exists()


def listening(processes: list[psutil.Process]) -> Iterator[str]:
    """Yield the addresses at which processes take connections."""
    for process in processes:
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                yield connection.laddr.ip


@pytest.fixture
def outer_interface() -> str:
    """A network interface of this machine that others may reach."""
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET and not ipaddress.ip_address(each.address).is_loopback:
                return name
    pytest.skip("this machine has no network")


def test_nothing_listens_where_others_could_reach_it(
    workplace: Path, outer_interface: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", outer_interface)  # as for a cluster
    (workplace / "slow.py").write_text(
        "import time\nfrom pathlib import Path\ndef wait(replica):\n"
        "    while not Path(__file__).with_name('heard').exists():\n        time.sleep(0.02)\n"
    )
    settings, heard = recipe(workplace, callbacks=["slow:wait"], steps=2), []
    before = set(listening([psutil.Process()]))

    def look() -> None:
        while not (attempts := read_jsonl(workplace / "run" / "attempts.jsonl")):
            time.sleep(0.05)
        workers = [psutil.Process(worker["pid"]) for worker in attempts[0]["workers"]]
        heard.extend(listening(workers))
        heard.extend(set(listening([psutil.Process(), *psutil.Process().children()])) - before)
        (workplace / "heard").touch()

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    assert run_training(settings, RunOptions(workplace / "run")).status == "done"
    looking.join()
    assert heard, "workers exchange over sockets"
    assert all(ipaddress.ip_address(address).is_loopback for address in heard), heard


def test_workers_that_die_hang_stop_or_leave_are_started_again(
    broken: tuple[TrainRecipe, Path, Command], tmp_path: Path
) -> None:
    settings, run, command = broken
    status, _, err = command.finish()
    assert status == 0, err
    killed, hung, stopped, left = [row["workers"] for row in read_jsonl(run / "restarts.jsonl")]
    assert killed == {"1": "its process died: killed, out of memory, or crashed (SIGKILL)"}
    (stack,) = run.glob("hang-worker-0-*.txt")
    assert hung == {"0": f"it hung, and was ended; its stack is in {stack}"}
    assert "testing.py" in stack.read_text()
    assert stopped["1"] == "it was stopped (SIGSTOP), and was ended"
    assert left == {"0": "its process ended with exit status 0 before the training did"}
    assert [row["from_step"] for row in read_jsonl(run / "attempts.jsonl")] == [0, 10, 20, 30, 40]
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["restarts"]) == ("done", 4)
    whole = train_with_threads(settings.with_overrides({"callbacks": []}), tmp_path / "whole")
    one, other = (load_part(list_checkpoints(path.checkpoints)[-1], 0) for path in (whole, RunDirectory(run)))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
