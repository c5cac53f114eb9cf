"""`raytrain search` as a user runs it: Ctrl-C, kill -9, --resume, and what can be done with its winner."""

import json
import os
import signal
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.run.checkpoint import list_checkpoints, load_part
from raytrain.testing_command import Command
from search.journal.journal import Journal
from search.launch.base import check_search
from search.launch.trial import Trial
from search.recipe import SearchRecipe
from search.scheduling.driver import drive

RECIPE = """
kind = "search"
[base]
name = "digits"
steps = 120
callbacks = ["mine:pace"]
task = {name = "digits", model = "mlp", widths = [32], dropout = 0.1}
optimizer = {name = "adamw", lr = 1e-3}
[search]
name = "pbt"
population = 4
interval = 20
metric = "loss"
mode = "min"
[search.space]
optimizer.lr = {type = "float", low = 1e-4, high = 3e-2, scale = "log"}
task.dropout = {type = "float", low = 0, high = 0.5, step = 0.05}
"""


def wait_for_reports(run: Path, count: int, command: Command) -> None:
    file, give_up = run / "metrics.jsonl", time.monotonic() + 300
    while time.monotonic() < give_up and command.process.exitcode is None:
        if file.is_file() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{run} did not come to {count} reports: {(command.folder / 'err').read_text()}")


def plain_search(folder: Path) -> Journal:
    """The same search in this process, without Ray."""
    recipe = SearchRecipe.parse_with({"name": "mine", **tomllib.loads(RECIPE)}, {"base.callbacks": []})
    checked = check_search(recipe)
    folder.mkdir()
    journal = Journal(folder, checked.recipe.scheduler(checked.objective))
    journal.open()
    drive(journal, journal.store, Trial(checked.base, torch.device("cpu"), lambda step: None).train)
    return journal


def model_of(run: Path) -> dict[str, Any]:
    return load_part(list_checkpoints(run / "checkpoints")[-1], 0)["model"]


def test_an_interrupted_and_killed_search_ends_as_if_nothing_had_happened(
    workplace: Path, start: Callable[..., Command], raytrain: Callable[..., Any]
) -> None:
    (workplace / "mine.toml").write_text(RECIPE)
    (workplace / "mine.py").write_text("import time\n\ndef pace(replica):\n    time.sleep(0.02)\n")
    run = workplace / "run"

    first = start(workplace, "search", "mine.toml", "--out", "run")
    wait_for_reports(run, 6, first)
    second = raytrain("search", "run", "--resume")
    assert (second.status, f"{run} is in use by command process {first.pid}" in second.err) == (2, True), second.err
    os.kill(first.pid, signal.SIGINT)
    status, _, err = first.finish()
    assert status == 130, err
    assert "stopping: members pause after the step that they are at; Ctrl-C again ends them at once" in err
    assert "raytrain search" in err
    assert json.loads((run / "result.json").read_text())["status"] == "interrupted"

    killed = start(workplace, "search", "run", "--resume")
    wait_for_reports(run, 14, killed)
    killed.kill()
    killed.process.join()

    status, _, err = start(workplace, "search", "run", "--resume").finish()
    assert status == 0, err
    plain = plain_search(workplace / "plain")
    assert (run / "lineage.jsonl").read_bytes() == plain.lineage.path.read_bytes()
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["figures"]) == ("done", {"trials": 4, "failed": 0, "steps": 4 * 120})
    assert result["best"]["value"] == plain.best.score

    evaluated = raytrain("evaluate", "run")
    assert json.loads(evaluated.out)["loss"] == result["metrics"]["loss"] == result["best"]["value"]
    assert raytrain("train", "run/winner.toml", "--out", "again").status == 0
    best, again = model_of(run / "best"), model_of(workplace / "again")
    assert best.keys() == again.keys()
    assert all(best[name].equal(again[name]) for name in best)
    assert raytrain("report", "run").status == 0
    assert (run / "report.html").stat().st_size > 100_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base.epochs=2"], "base.epochs: a search counts steps; got 2; set base.steps"),
        (["base.phases=[{from = 20}]"], "base.phases: expected none, because the search decides when fields change"),
        (["search.metric=loss2"], "search.metric: the task does not measure 'loss2'; did you mean loss?"),
        (
            ["search.space.task.widths={type = 'choice', values = [[8], [16]]}"],
            "search.space.task.widths: task.widths = [8] changes the shape of",
        ),
        (["search.interval=7"], "search.interval: expected a divisor of base.steps = 120; got 7"),
        (["search.space.optimizer.lr.high=1e-5"], "search.space.optimizer.lr: "),
    ],
)
def test_a_bad_recipe_starts_nothing(
    words: list[str], message: str, workplace: Path, raytrain: Callable[..., Any]
) -> None:
    (workplace / "mine.toml").write_text(RECIPE.replace('callbacks = ["mine:pace"]', ""))
    ended = raytrain("search", "mine.toml", "--out", "run", *words)
    assert (ended.status, ended.err.startswith(f"raytrain: {message}")) == (2, True), ended.err
    assert "starting" not in ended.err
    assert not (workplace / "run").exists()


def test_check_shows_the_dimensions_and_the_first_population(raytrain: Callable[..., Any]) -> None:
    shown = raytrain("check", "digits-pbt").out
    assert "# optimizer.lr: between 0.0001 and 0.03 (log)\n" in shown
    assert "# member 7 begins with {'optimizer.lr': " in shown


MINE = """
def space(choose):
    widths = [choose.one_of(f"width{i}", [8, 16, 32, 64]) for i in range(choose.int("layers", 1, 3))]
    return {"task.widths": widths, "task.norm": choose.one_of("norm", ["none", "batch", "layer"])}
"""


def test_a_space_in_place_of_a_recipe(workplace: Path, raytrain: Callable[..., Any]) -> None:
    """`check` finds out that it is one, and prints its size and samples; what is wrong is said before Ray starts."""
    (workplace / "mine.py").write_text(MINE)
    shown = raytrain("check", "mine:space", "recipe=digits", "search.budget=5")
    assert shown.status == 0, shown.err
    assert "# mine:space: 252 candidates\n" in shown.out
    assert "# sample 3\ntask.widths = [" in shown.out
    assert "# member 4 begins with {'task.widths': " in shown.out
    (workplace / "wrong.py").write_text(MINE.replace("task.norm", "task.nrm"))
    ended = raytrain("search", "wrong:space", "--set", "recipe=digits", "search.budget=5", "--out", "run")
    message = "raytrain: search.space: the base recipe refuses task.nrm = 'batch' (wrong.py, line 4): task.nrm: no such"
    assert (ended.status, ended.err.startswith(message)) == (2, True), ended.err
    assert not (workplace / "run").exists()


def test_a_space_is_searched_and_its_winner_is_a_recipe(workplace: Path) -> None:
    """Without Ray, by the loop that a slot runs."""
    (workplace / "mine.py").write_text(MINE)
    raw = {"kind": "search", "name": "space", "search": {"space": "mine:space"}}
    recipe = SearchRecipe.parse_with(raw, {"recipe": "digits", "recipe.steps": 10, "search.budget": 8})
    checked = check_search(recipe)
    journal = Journal(workplace, checked.recipe.scheduler(checked.objective))
    journal.open()
    drive(journal, journal.store, Trial(checked.base, torch.device("cpu"), lambda step: None).train)
    changes = [row["new"] for row in journal.lineage.read() if row["action"] == "start"]
    assert len({json.dumps(each) for each in changes}) == 8, "all different"
    assert journal.best.segment.configuration.changes in changes
