"""The command as a user runs it: in a process of its own, with Ctrl-C, kill -9, --resume, and Ray if asked for."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from raytrain.run.checkpoint import list_checkpoints, load_part
from raytrain.run.rows import read_jsonl
from raytrain.testing_command import Command

Start = Callable[..., Command]

QUICK = [
    "workers=2",
    "steps=400",
    "checkpoint.every=40",
    "evaluation.every=0",
    "task.model=mlp",
    "task.norm=batch",
    "task.dropout=0.1",
    "ema=0.95",
    "max_failures=1",
]


def wait_for_step(run: Path, step: int) -> None:
    give_up = time.monotonic() + 300
    while time.monotonic() < give_up:
        if any(row["step"] >= step for row in read_jsonl(run / "metrics.jsonl")):
            return
        time.sleep(0.05)
    raise TimeoutError(f"{run} did not reach step {step}")


def final(run: Path) -> dict[str, torch.Tensor]:
    saved = load_part(list_checkpoints(run / "checkpoints")[-1], 0)
    return {**saved["model"], **{f"average {name}": value for name, value in saved["ema"].items()}}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    words = [sys.executable, "-m", "raytrain", "train", "digits", *QUICK, "--out", "run"]
    ended = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
    return folder / "run"


def equal(one: Path, other: Path) -> bool:
    first, second = final(one), final(other)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_what_is_promised(straight: Path) -> None:
    result = json.loads((straight / "result.json").read_text())
    assert result["status"] == "done"
    figures = result["figures"]
    assert (figures["steps"], figures["samples"]) == (400, 400 * 64)
    assert result["metrics"]["accuracy"] > 0.9
    assert result["references"]["accuracy_of_commonest_digit"] < 0.2
    assert figures["bytes_sent"] > 0
    assert 0 <= figures["overlap_ratio"] <= 1
    assert figures["communication_seconds"] > 0
    last = [row for row in read_jsonl(straight / "metrics.jsonl") if "loss" in row][-1]
    assert figures.items() <= {**last, "steps": last["step"]}.items(), "a row and the result have the same names"
    assert {"recipe.toml", "metrics.jsonl", "result.json", "tensorboard", "checkpoints", "attempts.jsonl"} <= {
        path.name for path in straight.iterdir()
    }
    versions = r"# raytrain \S+, ray \S+, torch \S+, numpy \S+, transformers \S+, datasets \S+, python \S+\n"
    assert re.match(versions, (straight / "recipe.toml").read_text())


def test_ctrl_c_and_sigterm_save_and_resume_goes_on_to_the_bit(start: Start, straight: Path, tmp_path: Path) -> None:
    words = ["train", "digits", *QUICK, "--out", "run"]
    reached = 50
    for attempt, (ask, what) in enumerate([(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)]):
        command = start(tmp_path, *words)
        wait_for_step(tmp_path / "run", reached + 1)
        ask(command.pid, what)
        status, _, err = command.finish()
        assert status == 130, err
        assert "stopping: the workers save and end after the step they are at" in err
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        assert result["status"] == "interrupted"
        reached = result["figures"]["steps"]
        words = re.search(r"continue with: raytrain (.*)", err).group(1).split()
        assert len(read_jsonl(tmp_path / "run" / "attempts.jsonl")) == attempt + 1
    status, _, err = start(tmp_path, *words).finish()
    assert status == 0, err
    assert read_jsonl(tmp_path / "run" / "attempts.jsonl")[2]["from_step"] == reached
    assert equal(straight, tmp_path / "run")


@pytest.mark.parametrize("sync", ["scalars", "one-byte"])
def test_ctrl_c_is_heard_between_exchanges_of_scalars(start: Start, tmp_path: Path, sync: str) -> None:
    words = ["train", "digits", "optimizer=zo-sgd", "optimizer.lr=3e-3", f"sync={sync}", "workers=2", "steps=1000000"]
    command = start(tmp_path, *words, "evaluation.every=0", "checkpoint.every=0", "--out", "run")
    wait_for_step(tmp_path / "run", 2)
    os.killpg(command.pid, signal.SIGINT)
    status, _, err = command.finish()
    assert status == 130, err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted"
    assert list_checkpoints(tmp_path / "run" / "checkpoints")


SLOW = """
import time
from pathlib import Path

if (Path(__file__).parent / "runs").exists():  # the command has imported it before
    Path(__file__).with_name("starting").touch()
    time.sleep(300)

def nothing(replica):
    pass
"""


@pytest.mark.parametrize(
    ("words", "sign"), [([], "starting"), (["--address", "local"], "runs")], ids=["workers", "Ray"]
)
def test_ctrl_c_while_something_starts_leaves_nothing(
    start: Start, tmp_path: Path, words: list[str], sign: str
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    command = start(tmp_path, "train", "digits", *QUICK, 'callbacks=["slow:nothing"]', *words)
    while not (tmp_path / sign).exists():
        time.sleep(0.01)
    time.sleep(0.5)
    os.killpg(command.pid, signal.SIGINT)
    status, _, err = command.finish()
    assert (status, err.strip().splitlines()[-1]) == (130, "raytrain: interrupted")
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_removed_ends_the_run(start: Start, tmp_path: Path) -> None:
    command = start(tmp_path, "train", "digits", *QUICK, "steps=100000", "--out", "run")
    wait_for_step(tmp_path / "run", 20)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    status, _, err = command.finish()
    assert (status, err.strip().splitlines()[-1]) == (
        1,
        f"raytrain: {tmp_path}/run was removed or emptied while the run went on",
    )


def test_a_second_ctrl_c_ends_at_once(start: Start, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ndef sleep(replica):\n    time.sleep(30)\n")
    command = start(tmp_path, "train", "digits", *QUICK, 'callbacks=["slow:sleep"]', "--out", "run")
    give_up = time.monotonic() + 300
    while not read_jsonl(tmp_path / "run" / "attempts.jsonl") and time.monotonic() < give_up:
        time.sleep(0.05)
    workers = [worker["pid"] for worker in read_jsonl(tmp_path / "run" / "attempts.jsonl")[0]["workers"]]
    for _ in range(2):
        os.killpg(command.pid, signal.SIGINT)
        time.sleep(1)
    status, _, err = command.finish()
    assert status == 130, err
    assert "Traceback" not in err
    give_up = time.monotonic() + 10  # which is less than they would sleep
    while (left := [pid for pid in workers if psutil.pid_exists(pid)]) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert left == []


def test_kill_9_of_the_command_leaves_nothing_running_and_resume_goes_on_to_the_bit(
    start: Start, straight: Path, tmp_path: Path
) -> None:
    command = start(tmp_path, "train", "digits", *QUICK, "--out", "run")
    wait_for_step(tmp_path / "run", 100)
    workers = [worker["pid"] for worker in read_jsonl(tmp_path / "run" / "attempts.jsonl")[0]["workers"]]
    command.kill()
    command.finish()
    status, _, err = start(tmp_path, "train", "digits", *QUICK, "--out", "run", "--resume").finish()
    assert status == 0, err
    assert equal(straight, tmp_path / "run")
    assert not any(psutil.pid_exists(pid) for pid in workers)


def test_the_recipe_of_a_run_repeats_it_to_the_bit_on_a_ray_cluster_of_its_own(
    start: Start, straight: Path, tmp_path: Path
) -> None:
    words = ["train", str(straight / "recipe.toml"), "--address", "local", "--out", "again"]
    status, _, err = start(tmp_path, *words).finish()
    assert status == 0, err
    assert "starting Ray" in err
    assert equal(straight, tmp_path / "again")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this machine's malloc is not that of glibc")
def test_memory_that_a_worker_frees_stays_with_it(start: Start, tmp_path: Path) -> None:
    """To have it again from the system takes a page fault for each 4 KiB: here 20,480 in a step."""
    (tmp_path / "blocks.py").write_text(
        "import resource, torch\nfrom pathlib import Path\n\ndef take(replica):\n"
        "    [torch.empty(20 << 20, dtype=torch.uint8).fill_(1) for _ in range(4)]\n"
        "    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    Path(f'faults-{replica.progress.step}').write_text(str(faults))\n"
    )
    words = ["train", "digits", "steps=30", "task.widths=[4]", "evaluation.every=0", 'callbacks=["blocks:take"]']
    status, _, err = start(tmp_path, *words, "--out", "run").finish()
    assert status == 0, err
    first, last = (int((tmp_path / f"faults-{step}").read_text()) for step in (10, 30))
    assert (last - first) / 20 < 1000
