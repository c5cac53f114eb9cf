"""A search on Ray makes the decisions that it makes without: whatever the slots, and whatever happens to them."""

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.util import placement_group_table

from raytrain.errors import RecipeError, TrainingError
from raytrain.kinds import RunOptions
from raytrain.launch.session import OWN_CLUSTER
from raytrain.recipe import read_toml
from raytrain.run.result import Result
from raytrain.sync.transport import Transport
from raytrain.testing import ThreadGroup
from search.journal.journal import Journal
from search.launch.base import check_search
from search.launch.run import run_search
from search.launch.trial import Trial
from search.recipe import SearchRecipe
from search.scheduling.driver import SegmentEnd, drive
from search.scheduling.work import Work

RAW: dict[str, Any] = {
    "kind": "search",
    "base": {
        "kind": "train",
        "steps": 20,
        "batch": 16,
        "task": {"name": "digits", "model": "mlp", "widths": [16]},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "clip": 0,
    },
    "search": {
        "name": "pbt",
        "population": 4,
        "interval": 5,
        "metric": "loss",
        "mode": "min",
        "first": [{"optimizer.lr": 1e30}],
        "space": {"optimizer": {"lr": {"type": "ordered", "values": [0.01, 0.03, 0.1, 0.3, 1e30]}}},
    },
}

pytestmark = pytest.mark.usefixtures("ray_cluster")


def recipe(**changes: Any) -> SearchRecipe:
    return SearchRecipe.parse_with(RAW, {name.replace("__", "."): value for name, value in changes.items()})


def on_ray(folder: Path) -> RunOptions:
    return RunOptions(folder, address=OWN_CLUSTER)


def searched(options: RunOptions, **changes: Any) -> Result:
    return run_search(recipe(**changes), options)


def lineage(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "lineage.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same search without Ray."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("plain")
    checked = check_search(recipe())
    journal = Journal(folder, checked.recipe.scheduler(checked.objective))
    journal.open()
    drive(journal, journal.store, Trial(checked.base, torch.device("cpu"), lambda step: None).train)
    return folder


OF_TWO_WORKERS: dict[str, Any] = {
    "kind": "search",
    "base": {
        "kind": "train",
        "steps": 20,
        "workers": 2,
        "task": "raytrain.testing:tiny",  # whose draws are safe in threads
        "sync": {"name": "delayed-averaging", "every": 4, "delay": 2},
    },
    "search": {
        "name": "pbt",
        "population": 4,
        "interval": 5,
        "space": {"optimizer": {"lr": {"type": "float", "low": 1e-3, "high": 0.5, "scale": "log"}}},
    },
}
STRIKE = """
import os, signal, time
from pathlib import Path

def strike(replica):
    for step, harm in ((7, die), (13, stand_still), (16, fail)):
        mark = Path(__file__).with_name(f"{step}.mark")
        if replica.rank >= 0 and replica.progress.step == step and not mark.exists():
            mark.touch()
            harm()

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def stand_still():
    os.kill(os.getpid(), signal.SIGSTOP)

def fail():
    raise ZeroDivisionError("mine")
"""


@pytest.mark.parametrize("address", [OWN_CLUSTER, None], ids=["actors", "processes"])
def test_decisions_do_not_depend_on_what_happens_to_processes(
    address: str | None, plain: Path, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that dies, is stopped or fails loses a segment, which is trained again."""
    (workplace / "mine.py").write_text(STRIKE)
    options = RunOptions(workplace / "run", address=address)
    result = searched(options, slots=2, base__callbacks=["mine:strike"], search__timeout_seconds=4)
    assert lineage(workplace / "run") == lineage(plain)
    assert (result.status, result.restarts) == ("done", 2)
    causes = [row["failure"]["cause"] for row in lineage(plain) if "failure" in row]
    assert causes, "a member's loss is not finite with the first guess, here as there"
    assert set(causes) == {"stopped"}
    for part in (
        "step 5: dead: its process died: killed, out of memory, or crashed",
        "step 10: slow: it did not answer for 4 s (search.timeout_seconds): stopped (SIGSTOP), swapped out, or",
        "step 15: error: ZeroDivisionError: mine (mine.py, line 19)",
    ):
        assert part in caplog.text


def test_members_of_two_workers_make_the_decisions_of_two_threads(workplace: Path) -> None:
    """Although one of the two dies once; what their slots took of the cluster is free afterwards."""
    (workplace / "mine.py").write_text(
        STRIKE.replace("(13, stand_still), (16, fail)", "").replace("rank >= 0", "rank == 1")
    )
    mine = {"base.callbacks": ["mine:strike"]}
    result = run_search(SearchRecipe.parse_with(OF_TWO_WORKERS, mine), on_ray(workplace / "run"))
    assert (result.status, result.restarts, result.figures["failed"]) == ("done", 1, 0)
    checked = check_search(SearchRecipe.parse(OF_TWO_WORKERS))
    (workplace / "threads").mkdir()
    journal = Journal(workplace / "threads", checked.recipe.scheduler(checked.objective))
    journal.open()

    def train(work: Work, packed: bytes | None) -> SegmentEnd:
        def one(transport: Transport) -> SegmentEnd:
            connect = partial(nullcontext, transport)
            return Trial(checked.base, torch.device("cpu"), lambda step: None, connect).train(work, packed)

        return ThreadGroup(2).run(one)[0]

    drive(journal, journal.store, train)
    assert lineage(workplace / "run") == lineage(workplace / "threads")
    assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}


def test_one_slot_is_enough_and_a_search_that_is_out_of_time_goes_on_later(plain: Path, tmp_path: Path) -> None:
    early = searched(on_ray(tmp_path / "run"), slots=1, search__seconds=0.001)
    assert (early.status, early.figures["steps"], early.best) == ("stopped early", 0, {})
    raw, _ = read_toml(str(tmp_path / "run"), [])
    whole = run_search(
        SearchRecipe.parse_with(raw, {"search.seconds": 0, "slots": 1}), replace(on_ray(tmp_path / "run"), resume=True)
    )
    assert lineage(tmp_path / "run") == lineage(plain)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == whole.status == "done"
    with pytest.raises(RecipeError, match=r"^search.population: expected 4, with which the search began; got 5$"):
        run_search(recipe(search__population=5), RunOptions(tmp_path / "run", resume=True))


def test_a_search_of_which_nothing_trains_fails(workplace: Path) -> None:
    (workplace / "mine.py").write_text("def fail(replica):\n    raise ZeroDivisionError('mine')\n")
    with pytest.raises(TrainingError, match=r"^all 4 members failed; member \d at last \(error\): ZeroDivisionError"):
        searched(on_ray(workplace / "run"), slots=2, base__callbacks=["mine:fail"], search__max_failures=0)
    assert json.loads((workplace / "run" / "result.json").read_text())["status"] == "failed"


def test_slots_that_do_not_fit_start_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        searched(on_ray(tmp_path / "run"), slots=5)
    assert str(error.value) == "slots: 5 of 1 CPU each do not fit on 1 machine(s) with 4 CPU; set slots=4"
    assert not (tmp_path / "run").exists()
