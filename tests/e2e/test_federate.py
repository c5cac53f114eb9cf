"""`raytrain federate`, from the recipe to the report: stopped, killed and resumed, it is the run in one process."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from federated.build import Federation
from federated.recipe import FederateRecipe
from raytrain.recipe import read_toml
from raytrain.run.rows import read_jsonl
from raytrain.testing_command import Command

Start = Callable[..., Command]
SHIPPED = Path(__file__).parents[2] / "federated" / "recipes"
QUICK = {
    "rounds": 12,
    "protocol.local_steps": 60,
    "evaluation.every": 5,
    "evaluation.clients": 0.2,
    "clients.actors": 2,
    "clients.cpus": 0.5,
    "faults.drop": 0.1,
}
WORDS = [f"{field}={value}" for field, value in QUICK.items()]


def wait_for_round(run: Path, number: int) -> None:
    give_up = time.monotonic() + 300
    while len(read_jsonl(run / "rounds.jsonl")) < number:
        assert time.monotonic() < give_up
        time.sleep(0.02)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The same run in this process, without Ray and Flower, and what it measures at the end."""
    recipe = FederateRecipe.parse_with(read_toml("digits-fedkseed", [SHIPPED])[0], QUICK)
    federation, folder = Federation.of(recipe), tmp_path_factory.mktemp("straight")
    server = federation.server()
    for _ in federation.simulation(server).run(folder):
        pass
    return folder, federation.evaluate(server)


def interrupt_after(run: Path, number: int) -> threading.Thread:
    """Press Ctrl-C in this process when a run has some rounds, and its command therefore follows it."""

    def press() -> None:
        wait_for_round(run, number)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


def test_a_run_that_is_killed_and_stopped_ends_as_one_in_one_process(
    start: Start,
    ray_cluster: None,
    raytrain: Callable[..., Any],
    straight: tuple[Path, dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    command = start(tmp_path, "federate", "digits-fedkseed", *WORDS, "--out", "run")  # which starts a Ray of its own
    wait_for_round(run, 2)
    refused = raytrain("federate", "run", "--resume")
    assert (refused.status, "is in use by command process" in refused.err) == (2, True)
    os.killpg(command.pid, signal.SIGKILL)
    command.finish()

    interrupt_after(run, 5)
    stopped = raytrain("federate", "run", "--resume")
    assert stopped.status == 130, stopped.err
    assert (
        "digits-fedkseed: 100 clients (dirichlet; 2 to 38 examples), 10 a round, 12 rounds of fedkseed" in stopped.err
    )
    assert "stopping: the run ends after the round that is going on" in stopped.err
    assert json.loads((run / "result.json").read_text())["status"] == "interrupted"
    words = re.search(r"continue with: raytrain (.*)", stopped.err).group(1).split()

    ended = raytrain(*words)
    assert ended.status == 0, ended.err
    folder, metrics = straight
    assert (run / "reports.bin").read_bytes() == (folder / "reports.bin").read_bytes()
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["figures"]["rounds"], result["metrics"]) == ("done", 12, metrics)
    done = read_jsonl(run / "rounds.jsonl")
    assert [row["round"] for row in done] == list(range(12))
    assert result["figures"]["heard"] == sum(len(row["heard"]) for row in done)
    assert {reason for row in done for reason in row["missing"].values()} == {"no answer"}
    recorded = [(row["step"], "valid" in row) for row in read_jsonl(run / "metrics.jsonl")]
    assert recorded == sorted([*((step, False) for step in range(1, 13)), *((step, True) for step in (0, 5, 10, 12))])
    evaluated = json.loads(raytrain("evaluate", str(run)).out)
    assert evaluated == {"step": 12, "loss": metrics["loss"], "accuracy": metrics["accuracy"]}


def test_a_run_of_parameters_is_evaluated_and_reported_as_one_of_seeds(
    ray_cluster: None, raytrain: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["rounds=2", "clients.actors=1", "clients.cpus=0.5", "strategy.name=FedAdam", "strategy.arguments.eta=0.01"]
    ended = raytrain("federate", "digits-fedavg", *words, "--out", "run")
    assert ended.status == 0, ended.err
    result = json.loads(Path("run/result.json").read_text())
    assert result["metrics"]["accuracy"] > result["references"]["accuracy_at_start"]
    assert result["figures"]["bytes_down"] > 20 * 9640
    evaluated = json.loads(raytrain("evaluate", "run").out)
    assert evaluated == {"step": 2, **result["metrics"]}
    assert raytrain("report", "run").status == 0
    assert "Held-out accuracy over bytes" in Path("run/report.html").read_text()
    refused = raytrain("export", "run", "exported")
    assert (refused.status, refused.err) == (
        2,
        "raytrain: task.name: the model of digits has no form to export: Task.export is None\n",
    )


def test_check_prints_what_follows_from_a_recipe(raytrain: Callable[..., Any]) -> None:
    shown = raytrain("check", "digits-fedkseed").out.splitlines()
    assert shown[-6:] == [
        "",
        "bytes of a client in a round   down   up  with Flower's envelopes",
        "took part in the last round   2,098  220      2,423 + 611 = 3,034",
        "takes part every 10 rounds    8,210  220      8,535 + 611 = 9,146",
        "FedAvg of the same parameters sends 9,640 bytes down and as many up.",
        "Each process keeps 3 copies of the parameters: 28,920 bytes.",
    ]
    assert raytrain("check", "digits-fedavg").out.splitlines()[-1] == (
        "FedAvg sends 9,640 bytes of parameters down and as many up."
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("partition=domain", "clients.count: expected 1, one for each domain with 1 examples or more, or 0; got 100"),
        ("clients.count=5", "recipe: clients.per_round: expected at most clients.count = 5; got 10"),
        ("workers=2", "workers: no such field; a federated recipe says clients.actors"),
        ("clients.actors=400", "clients.actors: 400 actor(s) of 1 CPU each do not fit on 1 machine(s) with 4 CPU; "),
    ],
)
def test_a_recipe_that_does_not_fit_starts_nothing(
    ray_cluster: None,
    raytrain: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = raytrain("federate", "digits-fedkseed", change)
    assert ended.status == 2, ended.err
    assert f"raytrain: {message}" in ended.err
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "runs"])
    assert not list(tmp_path.rglob("*.toml"))
