"""Loggers by name, which get the rows of ``metrics.jsonl``."""

import importlib.util
import os
import shutil
import socket
import struct
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

from raytrain.errors import RecipeError, TrainingError
from raytrain.extensions import ExtensionPoint
from raytrain.files import AppendOnlyFile, write_atomic
from raytrain.json_files import read_json, to_json
from raytrain.recipe import dotted_fields, read_toml
from raytrain.run.rows import read_jsonl

LOGGERS: dict[str, str] = {
    "tensorboard": "raytrain.run.loggers:TensorBoard TensorBoard event files, in tensorboard/ of the run.",
    "mlflow": "raytrain.run.loggers:Mlflow MLflow: mlflow.db of the run, or the server of MLFLOW_TRACKING_URI.",
    "wandb": "raytrain.run.loggers:WandB Weights & Biases: its server, or offline in wandb/ of the run.",
}

LOGGER = ExtensionPoint(
    "log.loggers",
    "a class that is made with (the run's folder, a step) and has write and close",
    arguments=2,
    methods=("write", "close"),
)
PROJECT = "raytrain"
PARAMETER_CHARACTERS = 6000
"""MLflow's limit on the value of a parameter."""


class Logger(Protocol):
    """Receives the rows of ``metrics.jsonl``.

    It is made with (the run's folder, the step it resumes at), when that file ends where training resumes.
    """

    def write(self, row: dict[str, Any]) -> None:
        """Log a row: "step" and other numbers, or dicts of numbers."""
        ...

    def close(self, failed: bool) -> None:
        """Flush, and mark the attempt as failed or finished."""
        ...


def check_logger(name: str) -> None:
    """Check that a logger exists; one of the user's is not imported.

    Raises:
        RecipeError: there is none, or a package that it needs is not installed.
    """
    if name in LOGGERS:
        logger_class(name)
    else:
        LOGGER.check(LOGGERS, name)


def logger_class(name: str) -> Callable[[Path, int], Logger]:
    """Return the class of a logger.

    Raises:
        RecipeError: there is none, or a package that it needs is not installed.
    """
    found: Callable[[Path, int], Logger] = LOGGER.load(LOGGERS, name)
    missing = [package for package in getattr(found, "needs", ()) if importlib.util.find_spec(package) is None]
    if missing:
        raise RecipeError(f"log.loggers: {name} needs {' and '.join(missing)}: python install.py {name}")
    return found


def start_loggers(names: Iterable[str], folder: Path, step: int) -> dict[str, Logger]:
    """Start loggers, and return them by name.

    Args:
        names: in the table, or "module:attribute".
        folder: of the run.
        step: at which training resumes; 0: from the start.

    Raises:
        TrainingError: one cannot start.
    """
    loggers: dict[str, Logger] = {}
    for name in names:
        try:
            loggers[name] = logger_class(name)(folder, step)
        except RecipeError:
            raise
        except Exception as error:
            raise TrainingError(
                f"log.loggers: {name} cannot start: {type(error).__name__}: {error}; mend this, or train without {name}"
            ) from error
    return loggers


def flatten_row(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row under flat names: "train/loss" of training, "valid/loss" of an evaluation."""
    parts = {name: value for name, value in row.items() if isinstance(value, dict)}
    if not parts:
        parts = {"train": {name: value for name, value in row.items() if name != "step"}}
    return {
        f"{name}/{measured}": number
        for name, part in parts.items()
        for measured, number in part.items()
        if isinstance(number, int | float)  # the file has null for one that is not finite
    }


class TensorBoard:
    """An event file for TensorBoard, in ``tensorboard/``.

    It is written here and not by a `SummaryWriter`, whose thread ends when the disk is full, and whose queue then
    blocks the training for ever.

    Args:
        folder: the run's folder.
        step: rows of later steps in older files are to be forgotten.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: PLC0415 - slow to import
        from tensorboardX.record_writer import masked_crc32c  # noqa: PLC0415

        self._event, self._checksum = Event, masked_crc32c
        place = folder / "tensorboard"
        place.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self._file = AppendOnlyFile(place / name)
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._append(Event(step=step + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))

    def write(self, row: dict[str, Any]) -> None:
        """Log a row."""
        event = self._event(step=row["step"], wall_time=time.time())
        for name, number in flatten_row(row).items():
            event.summary.value.add(tag=name, simple_value=number)
        self._append(event)

    def close(self, failed: bool) -> None:  # noqa: ARG002
        """Close the file."""
        self._file.close()

    def _append(self, event: Any) -> None:
        """Write a record: the length of the event and the event, each with its checksum."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checked = (length, struct.pack("<I", self._checksum(length)), data, struct.pack("<I", self._checksum(data)))
        self._file.write(b"".join(checked))


class Mlflow:
    """An MLflow run: in ``mlflow.db`` in the run's folder, or where MLFLOW_TRACKING_URI says.

    A resumed run goes on in the same MLflow run. What its first attempt logged beyond the checkpoint is not logged
    again, as MLflow forgets nothing: it would be the same, unless the recipe changed.

    Args:
        folder: the run's folder.
        step: not used; ``metrics.jsonl`` ends where training resumes.
    """

    needs: ClassVar[tuple[str, ...]] = ("mlflow", "sqlalchemy", "alembic")

    def __init__(self, folder: Path, step: int) -> None:  # noqa: ARG002
        import mlflow  # noqa: PLC0415 - slow to import, and often not installed

        local = f"sqlite:///{folder / 'mlflow.db'}"
        uri = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else local
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        note = folder / "mlflow.json"
        known = read_json(note, dict[str, str]) if note.is_file() else {}
        if known.get("uri") == uri:
            self._run = known["run"]
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._created(folder, (folder / "mlflow-artifacts").as_uri() if uri == local else None)
            write_atomic(note, to_json({"uri": uri, "run": self._run}).encode())
        self._last = {
            name: max(metric.step for metric in self._client.get_metric_history(self._run, name))
            for name in self._client.get_run(self._run).data.metrics
        }
        for row in read_jsonl(folder / "metrics.jsonl"):  # what an attempt that lost its connection could not log
            self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        """Log a row."""
        from mlflow.entities import Metric  # noqa: PLC0415

        new = {name: number for name, number in flatten_row(row).items() if row["step"] > self._last.get(name, -1)}
        if new:
            now = int(time.time() * 1000)
            self._client.log_batch(self._run, [Metric(name, number, now, row["step"]) for name, number in new.items()])
            self._last.update(dict.fromkeys(new, row["step"]))

    def close(self, failed: bool) -> None:
        """Tell MLflow how the run ended."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")

    def _created(self, folder: Path, artifacts: str | None) -> str:
        """Return the id of a new run, which has the recipe's fields as parameters."""
        from mlflow.entities import Param  # noqa: PLC0415
        from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME  # noqa: PLC0415

        name = MLFLOW_EXPERIMENT_NAME.get() or PROJECT
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifacts)
        run: str = self._client.create_run(experiment, run_name=folder.name).info.run_id
        fields = dotted_fields(_recipe(folder))
        self._client.log_batch(run, params=[Param(key, str(value)[:PARAMETER_CHARACTERS]) for key, value in fields])
        return run


class WandB:
    """A run of Weights & Biases: on its server, or without a key in ``wandb/``, for ``wandb sync``.

    WANDB_MODE, WANDB_PROJECT and the like hold. A resumed run goes on in the same run there. In ``wandb/`` it is
    written anew from ``metrics.jsonl``, because a killed process loses the last seconds.

    Args:
        folder: the run's folder.
        step: not used; ``metrics.jsonl`` ends where training resumes.
    """

    needs: ClassVar[tuple[str, ...]] = ("wandb",)

    def __init__(self, folder: Path, step: int) -> None:  # noqa: ARG002
        import wandb  # noqa: PLC0415 - slow to import, and often not installed

        note = folder / "wandb.json"
        if not note.is_file():
            write_atomic(note, to_json({"id": uuid.uuid4().hex[:12]}).encode())
        name = read_json(note, dict[str, str])["id"]
        for earlier in (folder / "wandb").glob(f"offline-run-*-{name}"):
            shutil.rmtree(earlier)
        settings = wandb.setup().settings
        without_key = settings.mode == "online" and not wandb.login(prompt=False)
        mode: Any = "offline" if without_key else settings.mode
        self._run = wandb.init(
            project=settings.project or PROJECT,
            name=settings.run_name or folder.name,
            id=name,
            dir=folder,
            config=_recipe(folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # its own count of steps could not go back on a resume
        self._last = int(self._run.summary.get("step", -1))  # what the server has of a run that is resumed
        for row in read_jsonl(folder / "metrics.jsonl"):
            self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        """Log a row."""
        if row["step"] > self._last:
            self._run.log({"step": row["step"], **flatten_row(row)})

    def close(self, failed: bool) -> None:
        """Flush, and finish the run."""
        self._run.finish(exit_code=int(failed))


def _recipe(folder: Path) -> dict[str, Any]:
    file = folder / "recipe.toml"
    return read_toml(str(file), [])[0] if file.is_file() else {}
