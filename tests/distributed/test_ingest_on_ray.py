"""Batches that actors of Ray prepare: the same as without them, bounded, robust, and gone at the end."""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from raytrain.errors import TrainingError
from raytrain.kinds import RunOptions
from raytrain.overrides import apply_overrides
from raytrain.run.checkpoint import list_checkpoints, load_part
from raytrain.run.rows import read_jsonl
from raytrain.testing import repeatable_rows, train_here, train_with_gloo
from raytrain.training.build import build_task
from raytrain.training.loader import BatchLoader, GeneratorLoader, MicroBatches, StepRange, local_loader
from raytrain.training.recipe import TrainRecipe

MINE = """
import os
from pathlib import Path

import torch
from torch import nn
from raytrain import Task
from raytrain.testing import FaultPlan

HERE = Path(__file__).parent
plan = FaultPlan(HERE).at(1, 13, "kill")


def model(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1))


def collate(examples):
    x = torch.stack(examples)
    return {"x": x + 0.1 * torch.rand_like(x), "both": (x[:, 0], [x[:, 1]])}  # each batch draws at random


def losses(model, batch):
    first, (second,) = batch["both"]
    return (model(batch["x"])[:, 0] - first * second).square()


def data(split):
    return torch.randn(37, 3, generator=torch.Generator().manual_seed(len(split)))


noisy = Task(model=model, data=data, losses=losses, collate=collate)


def note(what):
    with (HERE / what).open("a") as lines:
        lines.write(f"{os.getpid()}\\n")


def heavy_collate(examples):
    note("collated")
    return {"x": torch.zeros(len(examples), 1 << 18)}


heavy = Task(model=model, data=data, losses=losses, collate=heavy_collate)


def simulate(seed):
    note("started")
    draw = torch.Generator().manual_seed(seed)
    while True:
        note("made")
        yield torch.randn(3, generator=draw)


def fail_at_five(seed):
    yield from torch.ones(5, 3)
    raise ValueError("the simulation went wrong")


class Broken:
    def __len__(self):
        return 10

    def __getitem__(self, index):
        raise KeyError(f"no example {index}")


broken = Task(model=model, data=lambda split: Broken(), losses=losses)
"""


@pytest.fixture(autouse=True)
def mine(ray_cluster: None, workplace: Path) -> Path:
    (workplace / "mine.py").write_text(MINE)
    return workplace


def recipe(**changes: Any) -> TrainRecipe:
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    raw = {
        "kind": "train",
        "task": "mine:noisy",
        "steps": 24,
        "batch": 4,
        "log": {"every": 1, "loggers": []},
        "resources": {"cpus": 1},
    }
    return TrainRecipe.parse(apply_overrides(raw, fields))


def walk(steps: int, first: int = 0, stride: int = 8) -> StepRange:
    return StepRange(seed=5, rank=0, first_position=first, stride=stride, steps=steps, local_batch=4, accumulate=2)


def opened(settings: TrainRecipe, way: StepRange, actors: int = 2, restarts: int = 1) -> Any:
    from raytrain.launch.ingest import ray_loader

    return ray_loader(build_task(settings), settings.task, way, actors=actors, cpus=0.5, restarts=restarts)


def taken(feed: BatchLoader, way: StepRange, steps: range) -> list[MicroBatches]:
    return [feed.load(way.position(step), way.local_batch, way.accumulate) for step in steps]


def plain(batches: Any) -> Any:
    """Return batches so that `==` compares them to the bit."""
    if isinstance(batches, torch.Tensor):
        return batches.dtype, batches.tolist()
    if isinstance(batches, list | tuple):
        return type(batches), [plain(part) for part in batches]
    return {key: plain(part) for key, part in batches.items()} if isinstance(batches, dict) else batches


def count(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def settled(file: Path) -> int:
    """Return how many lines the file has when no more come."""
    before = -1
    while (now := count(file)) != before:
        before = now
        time.sleep(1)
    return now


def actors_alive() -> list[str]:
    """Return the source's actors among the processes that this test session started."""
    titles = []
    for process in psutil.Process().children(recursive=True):
        try:
            titles.append(" ".join(process.cmdline()))
        except psutil.NoSuchProcess:
            continue
    return [title for title in titles if any(kind in title for kind in ("::Pipeline", "::MapWorker", "::Generator"))]


def none_left(seconds: float = 40.0) -> bool:
    give_up = time.monotonic() + seconds
    while actors_alive() and time.monotonic() < give_up:
        time.sleep(0.1)
    return not actors_alive()


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_part(list_checkpoints(folder / "checkpoints")[-1], 0)["model"]


def history(folder: Path) -> list[dict[str, Any]]:
    return repeatable_rows(folder / "metrics.jsonl")


def test_ray_data_trains_as_the_local_source_does_also_after_a_kill(
    mine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from raytrain.launch.train import run_on_ray

    monkeypatch.setenv("PYTHONPATH", str(mine), prepend=os.pathsep)
    changes = {"workers": 2, "batch": 2, "accumulate": 2, "checkpoint__every": 5, "evaluation__every": 10}
    result = run_on_ray(recipe(**changes, task__source="ray", callbacks=["mine:plan"]), RunOptions(mine / "ray"))
    assert (result.status, result.figures["samples"]) == ("done", 192)
    # Rarely Ray ends one of its processes itself ("Check failed: erased == 1"), and there is another attempt.
    assert [row["from_step"] for row in read_jsonl(mine / "ray" / "attempts.jsonl")][:2] == [0, 10]
    assert train_with_gloo(recipe(**changes), mine / "local") == [0, 0]
    assert history(mine / "ray") == history(mine / "local")
    one, other = final(mine / "ray"), final(mine / "local")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "starting 2 worker(s) with 1 CPU each, and 2 actor(s) that prepare data with 1 CPU each" in (
        capsys.readouterr().err
    )
    assert none_left()


def test_ray_data_survives_the_death_of_its_actors(mine: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings, way = recipe(task__name="mine:heavy", task__source={"name": "ray", "prefetch_bytes": 20 << 20}), walk(60)
    caplog.set_level("WARNING")
    with opened(settings, way) as feed:
        with local_loader(build_task(settings), recipe().task, way) as local:
            assert plain(taken(feed, way, range(3))) == plain(taken(local, way, range(3)))
        ahead = settled(mine / "collated") // way.accumulate - 2 * 3
        assert 3 <= ahead <= 7, "of 4 MB each: two for each actor, and one in each of three messages"
        for pid in {int(line) for line in (mine / "collated").read_text().splitlines()} - {os.getpid()}:
            os.kill(pid, signal.SIGKILL)
        assert len(taken(feed, way, range(3, 60))) == 57
    assert caplog.messages == ["pipeline 0 of task.source = 'ray' died; starting another in its place"]
    assert none_left()


def test_generators_make_the_batches_in_turn(mine: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings, way = recipe(task__source={"name": "mine:simulate", "prefetch": 3}), walk(20)
    task = build_task(settings)
    caplog.set_level("WARNING")

    def expected(place: int, steps: int, life: int = 0, first: int = 0) -> Iterator[MicroBatches]:
        import mine as module

        lane = way.every_nth(place, 2)
        alone = GeneratorLoader(task, settings.task.source, module.simulate, [way.seed, lane.position(first), life])
        return (alone.load(lane.position(step), way.local_batch, way.accumulate) for step in range(first, steps))

    lanes = [list(expected(place, 10)) for place in range(2)]
    (mine / "made").unlink()
    (mine / "started").unlink()
    with opened(settings, way) as feed:
        got = taken(feed, way, range(4))
        assert plain(got) == plain([lanes[0][0], lanes[1][0], lanes[0][1], lanes[1][1]])
        assert settled(mine / "made") == (4 + 2 * 3) * way.local_batch, "each is to be three batches ahead"
        first = int((mine / "started").read_text().splitlines()[0])
        os.kill(first, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(first)] if psutil.pid_exists(first) else [])
        got += taken(feed, way, range(4, 20))
        assert len(got) == 20
        assert caplog.messages[0].endswith(" of task.source = 'mine:simulate' died; starting another in its place")
        victim = int(caplog.messages[0].split()[1])
        assert plain(got[1 - victim :: 2]) == plain(lanes[1 - victim]), "the other one is as it was"
        assert plain(got[victim::2]) != plain(lanes[victim])
    assert count(mine / "started") == 3
    assert none_left()


def test_actors_that_die_too_often_end_the_run(mine: Path) -> None:
    settings, way = recipe(task__source="mine:simulate"), walk(90)
    with opened(settings, way, actors=1, restarts=0) as feed:
        taken(feed, way, range(1))
        os.kill(int((mine / "started").read_text()), signal.SIGKILL)
        with pytest.raises(
            TrainingError, match="^actor 0 of task.source = 'mine:simulate' died more often than max_fail"
        ):
            taken(feed, way, range(1, 90))


def test_an_error_of_a_generator_ends_the_run_with_its_trace(mine: Path) -> None:
    from raytrain.launch.ingest import ray_loader

    feeds = partial(ray_loader, actors=1, cpus=0.5, restarts=1)
    failure = train_here(recipe(task__source="mine:fail_at_five"), mine / "run", feeds).failure()
    assert failure.exit_status == TrainingError.exit_status
    assert failure.message.startswith("Traceback (most recent call last):\n")
    assert failure.message.endswith(
        "\nValueError: the simulation went wrong\n"
        "actor 0 of task.source = 'mine:fail_at_five' failed on the examples at positions 4 to 7"
    )
    assert "mine.py" in failure.message
    assert [row["step"] for row in read_jsonl(mine / "run" / "metrics.jsonl")] == [1]
    assert none_left()


def test_an_error_of_the_tasks_data_is_shown_from_ray_data_too(mine: Path) -> None:
    settings, way = recipe(task__name="mine:broken", task__source="ray"), walk(3)
    with opened(settings, way) as feed, pytest.raises(TrainingError) as caught:
        taken(feed, way, range(1))
    assert "mine.py" in str(caught.value)
    assert "KeyError: 'no example " in str(caught.value)
    assert str(caught.value).endswith("pipeline 0 of task.source = 'ray' failed on the examples at positions 0 to 3")
