"""Every logger: what it leaves can be read, a resumed run goes on in it, and a failing one ends no training."""

import json
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from raytrain.errors import RecipeError
from raytrain.run.directory import RunDirectory
from raytrain.run.loggers import LOGGERS, TensorBoard, flatten_row, logger_class
from raytrain.run.rows import read_jsonl
from raytrain.testing import train_here, train_with_gloo
from raytrain.training.recipe import TrainRecipe

pytestmark = pytest.mark.filterwarnings("ignore:.*``noload`` loader strategy", "ignore:::mlflow", "ignore:::wandb")

Point = tuple[int, str, float]
"""A step, a name and a number that was logged."""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A place for MLflow that several tests share, because it takes seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/shared.db"


@pytest.fixture(autouse=True)
def without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # or a process that is started and killed here would share ours
    monkeypatch.setenv("NETRC", "/nowhere")


def events(folder: Path) -> Iterator[Event]:
    """Read event files: length, its check sum, the event, its check sum."""
    for file in sorted((folder / "tensorboard").glob("events*")):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def in_tensorboard(folder: Path) -> Iterator[Point]:
    for event in events(folder):
        yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)


def in_mlflow(folder: Path) -> Iterator[Point]:
    from mlflow import MlflowClient

    note = json.loads((folder / "mlflow.json").read_text())
    client = MlflowClient(tracking_uri=note["uri"])
    for name in client.get_run(note["run"]).data.metrics:
        for metric in client.get_metric_history(note["run"], name):
            yield metric.step, name, metric.value


def in_wandb(folder: Path) -> Iterator[Point]:
    """Read what `wandb sync` would send."""
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    give_up = time.monotonic() + 60  # it is written by a process of its own, which may come after us
    for last in files[-1:]:
        while not any(record.HasField("exit") for record in wandb_records(last)) and time.monotonic() < give_up:
            time.sleep(0.05)
    for file in files:
        for record in wandb_records(file):
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            step = json.loads(items.get("step", "0"))
            yield from ((step, name, json.loads(text)) for name, text in items.items() if "/" in name)


def wandb_records(file: Path) -> Iterator[Any]:
    """Read a LevelDB log of protocol buffers, in blocks of 32 KiB, as far as it is written."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        if place + 7 + length > len(content):
            return
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        place += -place % 32768 if -place % 32768 < 7 else 0
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


READERS: dict[str, Callable[[Path], Iterator[Point]]] = {
    "tensorboard": in_tensorboard,
    "mlflow": in_mlflow,
    "wandb": in_wandb,
}


def recipe(*loggers: str, **changes: Any) -> TrainRecipe:
    base = {"kind": "train", "task": "raytrain.testing:tiny", "seed": 3, "steps": 6, "schedule": {"name": "constant"}}
    return TrainRecipe.parse(base).with_overrides(
        {"log.loggers": list(loggers), "log.every": 1, "evaluation.every": 2, "checkpoint.every": 3, **changes}
    )


def in_metrics(run: RunDirectory) -> Counter[Point]:
    return Counter(
        (row["step"], name, number) for row in read_jsonl(run.metrics) for name, number in flatten_row(row).items()
    )


def rounded(points: Iterator[Point] | Counter[Point]) -> Counter[tuple[int, str, str]]:
    """Return the points to the six digits of a float32, without times."""
    every = points.elements() if isinstance(points, Counter) else points
    return Counter((step, name, f"{number:.5e}") for step, name, number in every if not name.endswith("seconds"))


def test_all_can_be_read() -> None:
    assert READERS.keys() == LOGGERS.keys()


@pytest.mark.parametrize("name", LOGGERS)
def test_it_holds_the_rows_of_the_run(name: str, tmp_path: Path) -> None:
    run = train_here(recipe(name), tmp_path / "run")
    assert run.failure() is None
    assert rounded(READERS[name](run.path)) == rounded(in_metrics(run))
    assert (4, "valid/loss") in {point[:2] for point in READERS[name](run.path)}


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_resumed_run_goes_on_in_the_same_place_and_logs_nothing_twice(
    name: str, tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    folder, seldom = tmp_path / "run", {"evaluation.every": 0}
    statuses = train_with_gloo(recipe(name, callbacks=["tests_of_loggers:plan"], **seldom), folder)
    assert statuses == [-signal.SIGKILL]
    run = train_here(recipe(name, **seldom), folder)
    assert run.failure() is None
    assert [row["from_step"] for row in read_jsonl(run.attempts)] == [0, 3]
    points = rounded(READERS[name](folder))
    assert set(points.values()) == {1}
    assert set(points) == set(rounded(in_metrics(run)))


@pytest.fixture(autouse=True)
def faults(workplace: Path) -> None:
    (workplace / "tests_of_loggers.py").write_text(
        f"""
from pathlib import Path
from raytrain.testing import FaultPlan

plan = FaultPlan(Path({str(workplace)!r})).at(0, 5, "kill")

class Breaking:
    def __init__(self, folder, step):
        self.closed = False

    def write(self, row):
        if row["step"] == 3:
            raise ConnectionError("no route to host")

    def close(self, failed):
        raise ConnectionError("still no route")

class Noting:
    def __init__(self, folder, step):
        self.note = folder / "how it ended"

    def write(self, row):
        pass

    def close(self, failed):
        self.note.write_text(str(failed))

def break_down(replica):
    if replica.progress.step == 4:
        raise ZeroDivisionError

class Refusing:
    def __init__(self, folder, step):
        raise PermissionError("the key is wrong")

    def write(self, row):
        pass

    def close(self, failed):
        pass
"""
    )


def test_mlflow_goes_where_it_is_told(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "letters")
    run = train_here(recipe("mlflow"), tmp_path / "run")
    assert not (run.path / "mlflow.db").exists()
    client = MlflowClient(tracking_uri=database)
    (found,) = client.search_runs([client.get_experiment_by_name("letters").experiment_id])
    assert found.info.run_name == "run"
    assert found.info.status == "FINISHED"
    assert found.data.params["optimizer.name"] == "adamw"


def test_a_logger_that_fails_is_left_out_and_the_run_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = train_here(recipe("tests_of_loggers:Breaking", "tensorboard"), tmp_path / "run")
    assert run.failure() is None
    assert capfd.readouterr().err.splitlines() == [
        "raytrain: log.loggers: tests_of_loggers:Breaking failed, and gets no more of this attempt: ConnectionError: "
        f"no route to host; all metrics are in {run.metrics}"
    ]
    assert rounded(in_tensorboard(run.path)) == rounded(in_metrics(run))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", LOGGERS)
def test_none_waits_for_room_on_a_full_disk(name: str, small_disk: Any) -> None:
    """WandB says nothing, as a process of its own writes; the others do, and are then left out."""
    logger = logger_class(name)(small_disk.path, 0)
    small_disk.fill()
    row = {f"number {place} of many": place / 7 for place in range(50)}
    failed = False
    for step in range(1, 200):
        try:
            logger.write({"step": step, **row})
        except Exception as error:
            failed = "No space left" in str(error) or "disk is full" in str(error)
            break
    assert failed or name == "wandb"
    with suppress(Exception):
        logger.close(failed=True)


def test_a_logger_learns_whether_the_run_failed(tmp_path: Path) -> None:
    run = train_here(recipe("tests_of_loggers:Noting"), tmp_path / "run")
    assert (run.path / "how it ended").read_text() == "False"
    run = train_here(recipe("tests_of_loggers:Noting", callbacks=["tests_of_loggers:break_down"]), tmp_path / "other")
    assert run.failure() is not None
    assert (run.path / "how it ended").read_text() == "True"


@pytest.mark.parametrize("step", [0, 3])
def test_tensorboard_forgets_what_a_killed_attempt_logged_too_much(tmp_path: Path, step: int) -> None:
    TensorBoard(tmp_path, step).close(failed=False)
    starts = [event for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert [event.step for event in starts] == [step + 1]


def test_a_logger_that_cannot_start_ends_the_run(tmp_path: Path) -> None:
    failure = train_here(recipe("tests_of_loggers:Refusing"), tmp_path / "run").failure()
    assert failure is not None
    assert failure.exit_status == 1
    assert failure.message == (
        "log.loggers: tests_of_loggers:Refusing cannot start: PermissionError: the key is wrong; mend this, or train "
        "without tests_of_loggers:Refusing"
    )


@pytest.mark.parametrize(("name", "package"), [("mlflow", "mlflow"), ("wandb", "wandb")])
def test_what_is_not_installed_is_told_before_anything_starts(
    name: str, package: str, raytrain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(RecipeError, match=rf"^log.loggers: {name} needs {package}: python install.py {name}$"):
        logger_class(name)
    ended = raytrain("train", "digits", f"log.loggers=['{name}']")
    assert ended.status == 2
    assert ended.err == f"raytrain: log.loggers: {name} needs {package}: python install.py {name}\n"
    assert not (workplace / "runs").exists()
