"""A disk that is really full: nothing waits, what fails is said, what was complete stays, a resumed run is equal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain import testing
from raytrain.errors import CheckpointError, TrainingError
from raytrain.files import append_line, write_atomic
from raytrain.run.checkpoint import CheckpointStore, list_checkpoints, load_part, read_manifest
from raytrain.run.directory import RunDirectory
from raytrain.run.metrics import MetricsWriter
from raytrain.run.rows import read_jsonl
from raytrain.seeds.records import read_trajectory
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.testing import repeatable_rows, train_here
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import Replica
from raytrain.zeroth.trajectory import Trajectory
from search.journal.journal import Journal
from search.scheduling.driver import SegmentEnd, drive, run_attempt
from search.scheduling.work import Work
from search.testing import toy_search, train_toy

FULL = "No space left on device"


def recipe(**changes: Any) -> TrainRecipe:
    base = {"kind": "train", "task": "raytrain.testing:tiny", "steps": 200, "schedule": {"name": "constant"}}
    return TrainRecipe.parse(base).with_overrides(
        {"log.every": 1, "evaluation.every": 20, "checkpoint.every": 10, **changes}
    )


def logged(run: RunDirectory) -> list[dict[str, Any]]:
    return repeatable_rows(run.metrics)


def state(run: RunDirectory) -> dict[str, Any]:
    found: dict[str, Any] = load_part(list_checkpoints(run.checkpoints)[-1], 0)
    return found


def until_it_fails(write: Callable[[int], None]) -> None:
    for step in range(1000):
        write(step)


@pytest.fixture
def filling(small_disk: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A callback that fills the disk after step 35, once."""

    def fill(replica: Replica) -> None:
        if replica.progress.step == 35 and not (small_disk.path / "filler").exists():
            small_disk.fill()

    monkeypatch.setattr(testing, "fill", fill, raising=False)
    return ["raytrain.testing:fill"]


@pytest.mark.parametrize("optimizer", ["adamw", "zo-sgd"])
def test_a_run_ends_with_a_word_and_resumes_as_if_nothing_had_been(
    tmp_path: Path, small_disk: Any, filling: list[str], optimizer: str
) -> None:
    plan = recipe(optimizer=optimizer, callbacks=filling)
    run = train_here(plan, small_disk.path / "run")
    failure = run.failure()
    assert failure is not None
    assert failure.message.endswith(FULL) or f"{FULL} (os error 28)" in failure.message, failure.message
    assert failure.trace == ""
    checkpoints = [read_manifest(path).step for path in list_checkpoints(run.checkpoints)]
    assert checkpoints
    assert all(step >= 20 for step in checkpoints)
    assert not list(run.checkpoints.glob(".step-*"))
    small_disk.free()
    run = train_here(plan.with_overrides({"callbacks": []}), run.path)
    assert run.failure() is None
    whole = train_here(recipe(optimizer=optimizer), tmp_path / "whole")
    assert logged(run) == logged(whole)
    assert all(torch.equal(state(run)["model"][name], value) for name, value in state(whole)["model"].items())
    if optimizer == "zo-sgd":
        assert run.trajectory.read_bytes() == whole.trajectory.read_bytes()


def test_a_logger_with_a_full_disk_of_its_own_is_dropped_and_the_run_goes_on(
    tmp_path: Path, small_disk: Any, filling: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    run = RunDirectory(tmp_path / "run")
    with run.session(resume=False):
        run.prepare("")
    (run.path / "tensorboard").symlink_to(small_disk.path)
    assert train_here(recipe(callbacks=filling), run.path).failure() is None
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        "raytrain: log.loggers: tensorboard failed, and gets no more of this attempt: TrainingError: "
    )
    assert line.endswith(f": cannot be written: {FULL}; all metrics are in {run.metrics}")
    assert len([row for row in read_jsonl(run.metrics) if "loss" in row]) == 200


def test_a_checkpoint_that_finds_no_room_leaves_the_others(small_disk: Any) -> None:
    store = CheckpointStore(small_disk.path, 2, ExactAverager(LocalTransport()))
    first = store.save({"w": torch.ones(5)}, {"step": 1, "best_step": 0})
    small_disk.fill()
    with pytest.raises(
        CheckpointError, match=rf"^checkpoint step-00000002 could not be written to .*: worker 0: .*{FULL}"
    ):
        store.save({"w": torch.ones(5000)}, {"step": 2, "best_step": 0})
    with pytest.raises(
        CheckpointError, match=rf"^checkpoint step-00000001 could not be written to .*: worker 0: .*{FULL}"
    ):
        store.save_metrics({"step": 1, "best_step": 0}, {"loss": 0.5})
    assert sorted(path.name for path in small_disk.path.iterdir()) == ["filler", "step-00000001"]
    assert store.newest() == read_manifest(first)
    assert torch.equal(load_part(first, 0)["w"], torch.ones(5))
    small_disk.free()
    store.save({"w": torch.ones(5000)}, {"step": 2, "best_step": 0})
    assert store.newest().step == 2


def test_metrics_that_find_no_room_end_the_run_and_lose_no_row(small_disk: Any) -> None:
    run = RunDirectory(small_disk.path)
    recorder = MetricsWriter(run, 0, 0, [])
    recorder.write({"step": 1, "loss": 1.5})
    small_disk.fill()
    with pytest.raises(TrainingError, match=rf"^{run.metrics}: cannot be written: {FULL}$"):
        until_it_fails(lambda step: recorder.write({"step": step + 2, "loss": 1.5}))
    recorder.close(failed=True)
    steps = [row["step"] for row in read_jsonl(run.metrics)]
    assert steps == list(range(1, len(steps) + 1))
    small_disk.free()
    MetricsWriter(run, steps[-1], 0, []).close()
    assert [row["step"] for row in read_jsonl(run.metrics)] == steps


def test_a_trajectory_that_finds_no_room_keeps_its_steps(small_disk: Any) -> None:
    path, moves = small_disk.path / "t", [(5, 1.0), (6, 2.0)]
    with Trajectory(path, {"base": "x"}, 0) as trajectory:
        trajectory.append(0, 0.5, moves)
        small_disk.fill()
        with pytest.raises(TrainingError, match=rf"^{path}: cannot be written: {FULL}$"):
            until_it_fails(lambda step: trajectory.append(step + 1, 0.5, moves))
    _, records = read_trajectory(path)
    assert 0 < len(records) <= 4096 // 26
    assert set(records["count"]) == {2}


def test_a_note_that_finds_no_room_does_not_harm_the_next(small_disk: Any) -> None:
    run = RunDirectory(small_disk.path)
    run.append(run.restarts, {"workers": {}})
    small_disk.fill()
    with pytest.raises(OSError, match=FULL):
        append_line(run.restarts, '{"workers": {"0": "' + "x" * 9000)
    with pytest.raises(OSError, match=FULL):
        write_atomic(run.recipe, b"x")
    small_disk.free()
    run.append(run.restarts, {"workers": {"1": "it died"}})
    assert read_jsonl(run.restarts) == [{"workers": {}}, {"workers": {"1": "it died"}}]
    assert {path.name for path in small_disk.path.iterdir()} == {"restarts.jsonl"}


def test_a_search_that_finds_no_room_ends_with_a_word_and_goes_on_as_if_nothing_had_been(
    tmp_path: Path, small_disk: Any
) -> None:
    def opened(folder: Path) -> Journal:
        folder.mkdir(exist_ok=True)
        journal = Journal(folder, toy_search(steps=15, population=4, exploit="truncation", first=()))
        journal.open()
        return journal

    whole, search = opened(tmp_path / "whole"), opened(small_disk.path / "search")
    drive(whole, whole.store, train_toy)
    for _ in range(6):
        search.tell(run_attempt(search.ask(1)[0], search.store, train_toy))
    small_disk.fill()
    with pytest.raises(CheckpointError, match=rf"^{small_disk.path}/search/state.json: cannot be written: {FULL}$"):
        drive(search, search.store, train_toy)
    small_disk.free()
    search = opened(small_disk.path / "search")
    drive(search, search.store, train_toy)
    assert search.lineage.read() == whole.lineage.read()
    assert search.best.snapshot == whole.best.snapshot


def test_a_state_that_finds_no_room_fails_its_segment_and_not_the_search(small_disk: Any) -> None:
    """What a search writes of its decisions is small, and has room where a model has none."""
    search = Journal(
        small_disk.path, toy_search(steps=10, population=4, exploit="truncation", first=(), max_failures=0)
    )
    search.open()

    def train(work: Work, state: bytes | None) -> SegmentEnd:
        end = train_toy(work, state and state.rstrip(b" "))
        padding = 5 << 20 if (work.member, work.snapshot.step) == (1, 0) else 0
        return SegmentEnd(end.state + b" " * padding, end.step, end.metrics)

    drive(search, search.store, train)
    (row,) = (row for row in search.lineage.read() if "failure" in row)
    message = f"its state cannot be stored: [Errno 28] {FULL}"
    assert (row["action"], row["member"], row["failure"]["message"][: len(message)]) == ("replace", 1, message)
    assert [row["action"] for row in search.lineage.read()[-4:]] == ["end"] * 4
