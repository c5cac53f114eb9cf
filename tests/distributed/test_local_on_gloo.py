"""Local updates: threads and gloo processes train alike, and a killed run resumes to the bit."""

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.overrides import apply_overrides
from raytrain.run.checkpoint import list_checkpoints, load_part
from raytrain.run.rows import read_jsonl
from raytrain.testing import (
    PEER_LOST_STATUS,
    repeatable_rows,
    train_each_with_gloo,
    train_here,
    train_with_gloo,
    train_with_threads,
)
from raytrain.training.recipe import TrainRecipe

TINY = {
    "kind": "train",
    "task": {"name": "raytrain.testing:tiny", "norm": True},
    "workers": 2,
    "steps": 50,
    "batch": 4,
    "optimizer": {"lr": 0.02},
    "schedule": {"warmup": 5},
    "evaluation": {"every": 20},
    "checkpoint": {"every": 10, "keep": 9},
    "log": {"every": 1, "loggers": []},
    "sync": {"name": "cocod", "every": 7, "timeout_seconds": 20},
}
METHODS = {
    "local-sgd": {"name": "local-sgd"},
    "slowmo": {"name": "slowmo"},
    "diloco": {"name": "diloco"},
    "cocod": {"name": "cocod"},
    "delayed": {"name": "delayed-averaging", "delay": 3},
    "delayed-int8": {"name": "delayed-averaging", "delay": 5, "compression": "int8", "buffers": "local"},
    "delayed-bfloat16": {"name": "delayed-averaging", "delay": 0, "compression": "bfloat16"},
    "co2": {"name": "co2"},
}


def recipe(**changes: Any) -> TrainRecipe:
    return TrainRecipe.parse(apply_overrides(TINY, {name.replace("__", "."): value for name, value in changes.items()}))


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_part(list_checkpoints(folder / "checkpoints")[-1], 0)["model"]


def equal(one: Path, other: Path) -> bool:
    first, second = final(one), final(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def history(folder: Path) -> list[dict[str, Any]]:
    return repeatable_rows(folder / "metrics.jsonl")


def of(method: str, **changes: Any) -> TrainRecipe:
    sync = {f"sync__{field}": value for field, value in METHODS[method].items()}
    return recipe(**sync, **changes)


@pytest.fixture(scope="module")
def with_gloo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of each method by gloo processes."""
    folder = tmp_path_factory.mktemp("gloo")
    assert train_each_with_gloo([(of(method), folder / method) for method in METHODS]) == [0, 0]
    return folder


@pytest.fixture(scope="module", autouse=True)
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[tuple[list[int], float, Path]]]:
    """A run with a worker that hangs, while the other tests go on: its exit statuses, how long it took, its folder."""
    folder = tmp_path_factory.mktemp("hanging")

    def train(hung: TrainRecipe) -> tuple[list[int], float, Path]:
        began = time.monotonic()
        return train_with_gloo(hung, folder / "hung"), time.monotonic() - began, folder / "hung"

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as beside:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder))
        faults = faulty(folder, "1, 17, 'hang'", module="hangs")
        yield beside.submit(train, of("delayed", **faults, sync__timeout_seconds=20))


@pytest.mark.parametrize("method", METHODS)
def test_threads_equal_gloo_processes_to_the_bit(tmp_path: Path, with_gloo: Path, method: str) -> None:
    run = train_with_threads(of(method), tmp_path / "threads")
    assert run.failure() is None
    assert equal(tmp_path / "threads", with_gloo / method)
    assert history(tmp_path / "threads") == history(with_gloo / method)


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(tmp_path: Path, method: str) -> None:
    train_with_threads(of(method, steps=150), tmp_path / "run")
    losses = [row["valid"]["loss"] for row in history(tmp_path / "run") if "valid" in row]
    assert losses[-1] < 0.7 * losses[0]


def faulty(workplace: Path, *faults: str, module: str = "faults") -> dict[str, Any]:
    plan = "".join(f".at({fault})" for fault in faults)
    (workplace / f"{module}.py").write_text(
        "from pathlib import Path\nfrom raytrain.testing import FaultPlan\n"
        f"plan = FaultPlan(Path({str(workplace)!r})){plan}\n"
    )
    return {"callbacks": [f"{module}:plan"]}


@pytest.mark.parametrize("method", ["cocod", "delayed-int8"])
def test_a_worker_killed_during_an_exchange_is_noticed_and_the_run_resumes_to_the_bit(
    workplace: Path, with_gloo: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Checkpoints are taken in the middle of rounds too, with an exchange under way."""
    monkeypatch.setenv("PYTHONPATH", str(workplace))
    broken = of(method, **faulty(workplace, "1, 17, 'kill'", "0, 43, 'kill'"))
    assert train_with_gloo(broken, workplace / "broken") == [PEER_LOST_STATUS, -9]
    assert train_with_gloo(broken, workplace / "broken") == [-9, PEER_LOST_STATUS]
    assert train_with_gloo(broken, workplace / "broken") == [0, 0]
    assert [row["from_step"] for row in read_jsonl(workplace / "broken" / "attempts.jsonl")] == [0, 10, 40]
    assert equal(workplace / "broken", with_gloo / method)
    assert history(workplace / "broken") == history(with_gloo / method)


def test_a_worker_that_hangs_ends_the_attempt_in_time(hanging: Future[tuple[list[int], float, Path]]) -> None:
    """The one that waits for its message says so, and what waits longest is what was configured."""
    statuses, seconds, folder = hanging.result()
    assert statuses[0] == PEER_LOST_STATUS
    assert statuses[1] != 0
    assert seconds < 150, "half of what it waits where nothing is configured"
    assert "testing.py" in (folder / "hang-1.txt").read_text()


def test_a_pace_from_measured_times_is_agreed_on_and_resumes(tmp_path: Path) -> None:
    changes = {"sync__name": "delayed-averaging", "sync__every": "auto", "sync__compression": "int8"}
    assert train_each_with_gloo(
        [(recipe(steps=steps, **changes), tmp_path / "run") for steps in (30, 60)],
    ) == [0, 0]
    states = [load_part(list_checkpoints(tmp_path / "run" / "checkpoints")[-1], rank)["sync"] for rank in range(2)]
    paces = [(state["every"], state["delay"]) for state in states]
    assert paces[0] == paces[1]
    assert paces[0][0] >= paces[0][1] >= 1


def test_a_run_resumes_with_another_number_of_workers(tmp_path: Path) -> None:
    train_with_threads(recipe(steps=20), tmp_path / "run")
    run = train_here(recipe(workers=1), tmp_path / "run")
    assert run.failure() is None
    run = train_with_threads(recipe(workers=3, steps=70), tmp_path / "run")
    assert run.failure() is None
    assert list_checkpoints(run.checkpoints)[-1].name == "step-00000070"


@pytest.mark.parametrize("before", ["ddp", "cocod", "co2", "delayed-int8"])
@pytest.mark.parametrize("after", ["ddp", "delayed", "co2", "delayed-int8"])
def test_a_run_goes_on_in_another_form_from_the_shared_point(tmp_path: Path, before: str, after: str) -> None:
    forms = {**METHODS, "ddp": {"name": "ddp", "every": None}}

    def way(name: str, steps: int) -> TrainRecipe:
        sync = {key: value for key, value in {"every": 7, **forms[name]}.items() if value is not None}
        return TrainRecipe.parse({**apply_overrides(TINY, {"steps": steps}), "sync": sync})

    assert train_with_threads(way(before, 20), tmp_path / "run").failure() is None
    run = train_with_threads(way(after, 45), tmp_path / "run")
    assert run.failure() is None
    ends = [load_part(list_checkpoints(run.checkpoints)[-1], rank) for rank in range(2)]
    assert list_checkpoints(run.checkpoints)[-1].name == "step-00000045"
    assert ("optimizer" in ends[1]) == (after != "ddp")


def test_gradient_averaging_goes_on_with_one_optimizer_for_all(tmp_path: Path) -> None:
    """Local updates leave each worker one of its own; the first one's is that of all, as it is that of one alone."""
    changes = {"task__norm": False, "precision": "float64"}
    train_with_threads(recipe(steps=20, **changes), tmp_path / "run")
    for folder in ("two", "one"):
        shutil.copytree(tmp_path / "run", tmp_path / folder)
    plain = {**recipe(steps=40, **changes).to_dict(), "sync": {"name": "ddp"}}
    train_with_threads(TrainRecipe.parse(plain), tmp_path / "two")
    train_here(TrainRecipe.parse({**plain, "workers": 1, "batch": 8}), tmp_path / "one")
    one, two = final(tmp_path / "one"), final(tmp_path / "two")
    for name in (name for name in one if name.startswith("out")):
        torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-9)
