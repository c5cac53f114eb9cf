"""Loggers by name: what takes the rows of ``metrics.jsonl`` too, to show them."""

import importlib.util
import json
import time
import tomllib
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

from raytrain.errors import RecipeError, TrainingError
from raytrain.names import resolve
from raytrain.recipe import dotted_fields

LOGGERS: dict[str, str] = {
    "tensorboard": "raytrain.loggers:TensorBoard",
    "mlflow": "raytrain.loggers:Mlflow",
    "wandb": "raytrain.loggers:WandB",
}

PROJECT = "raytrain"
PARAMETER_CHARACTERS = 6000
"""The longest value of a parameter that MLflow takes."""


class Logger(Protocol):
    """Something that takes the rows of ``metrics.jsonl`` too, made with (the run's folder, the step it resumes at)."""

    def write(self, row: dict[str, Any]) -> None:
        """Take a row: "step" and other numbers, or dicts of numbers."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def logger_class(name: str) -> Callable[[Path, int], Logger]:
    """Return the logger that `name` stands for.

    Raises:
        RecipeError: there is none, or a package that it needs is not installed.
    """
    found: Callable[[Path, int], Logger] = resolve(LOGGERS, name, "log.to")
    missing = [package for package in getattr(found, "needs", ()) if importlib.util.find_spec(package) is None]
    if missing:
        raise RecipeError(f"log.to: {name} needs {' and '.join(missing)}: pip install raytrain[{name}]")
    return found


def started(names: Iterable[str], folder: Path, step: int) -> dict[str, Logger]:
    """Return new loggers by name.

    Args:
        names: in the table, or "module:attribute".
        folder: the run's.
        step: the step that training resumes at; 0: from the start.

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
                f"log.to: {name} cannot start: {type(error).__name__}: {error}; mend this, or train without {name}"
            ) from error
    return loggers


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row but its step, under names as "train/loss" and "valid/accuracy"."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{part}": number for part, number in value.items()}
        elif name != "step":
            flat[f"train/{name}"] = value
    return flat


class TensorBoard:
    """Event files for TensorBoard, in ``tensorboard/``.

    Args:
        folder: the run's folder.
        step: rows of later steps in older files are to be forgotten.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX import SummaryWriter  # noqa: PLC0415 - slow to import

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, row: dict[str, Any]) -> None:
        """Take a row."""
        for name, number in scalars(row).items():
            self._writer.add_scalar(name, number, row["step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Mlflow:
    """An MLflow run: in ``mlflow.db`` in the run's folder, or where MLFLOW_TRACKING_URI says.

    A resumed run goes on in the same MLflow run. What its first attempt logged beyond the checkpoint is not logged
    again: it would be the same, unless the recipe changed.

    Args:
        folder: the run's folder.
        step: not used; the MLflow run knows what it has.
    """

    needs: ClassVar[tuple[str, ...]] = ("mlflow", "sqlalchemy", "alembic")

    def __init__(self, folder: Path, step: int) -> None:  # noqa: ARG002
        import mlflow  # noqa: PLC0415 - slow to import, and often not installed
        from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME  # noqa: PLC0415

        local = f"sqlite:///{folder / 'mlflow.db'}"
        uri = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else local
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        note = folder / "mlflow.json"
        known = json.loads(note.read_text()) if note.is_file() else {}
        if known.get("uri") == uri:
            self._run = str(known["run"])
            self._client.update_run(self._run, status="RUNNING")
        else:
            experiment = self._experiment(MLFLOW_EXPERIMENT_NAME.get() or PROJECT, folder if uri == local else None)
            self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
            fields = dotted_fields(_recipe(folder))
            parameters = [mlflow.entities.Param(name, str(value)[:PARAMETER_CHARACTERS]) for name, value in fields]
            self._client.log_batch(self._run, params=parameters)
            _replace(note, {"uri": uri, "run": self._run})
        self._last = {
            name: max(metric.step for metric in self._client.get_metric_history(self._run, name))
            for name in self._client.get_run(self._run).data.metrics
        }

    def write(self, row: dict[str, Any]) -> None:
        """Take a row."""
        from mlflow.entities import Metric  # noqa: PLC0415

        now = int(time.time() * 1000)
        new = _new(scalars(row), row["step"], self._last)
        self._client.log_batch(self._run, [Metric(name, number, now, row["step"]) for name, number in new.items()])

    def close(self) -> None:
        """Tell MLflow that the run ended."""
        self._client.set_terminated(self._run)

    def _experiment(self, name: str, folder: Path | None) -> str:
        """Return the id of an experiment, made if it is not there; `folder`: the run's, if the experiment is in it."""
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(name, (folder / "mlflow-artifacts").as_uri() if folder else None))


class WandB:
    """A run of Weights & Biases: on its server, or without a key in ``wandb/``, for ``wandb sync``.

    WANDB_MODE, WANDB_PROJECT and the like hold. A resumed run goes on in the same run there, and what its first
    attempt logged beyond the checkpoint is not logged again.

    Args:
        folder: the run's folder.
        step: not used; ``wandb.json`` knows what was logged.
    """

    needs: ClassVar[tuple[str, ...]] = ("wandb",)

    def __init__(self, folder: Path, step: int) -> None:  # noqa: ARG002
        import wandb  # noqa: PLC0415 - slow to import, and often not installed

        self._note = folder / "wandb.json"
        known = json.loads(self._note.read_text()) if self._note.is_file() else {}
        self._id = str(known.get("id") or uuid.uuid4().hex[:12])
        self._last: dict[str, int] = known.get("last", {})
        settings = wandb.setup().settings
        without_key = settings.mode == "online" and not wandb.login(prompt=False)
        mode: Any = "offline" if without_key else settings.mode
        self._run = wandb.init(
            project=settings.project or PROJECT,
            name=settings.run_name or folder.name,
            id=self._id,
            dir=folder,
            config=_recipe(folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # its own count of steps could not go back on a resume

    def write(self, row: dict[str, Any]) -> None:
        """Take a row."""
        new = _new(scalars(row), row["step"], self._last)
        if new:
            self._run.log({"step": row["step"], **new})
            _replace(self._note, {"id": self._id, "last": self._last})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def _new(numbers: dict[str, float], step: int, last: dict[str, int]) -> dict[str, float]:
    """Return those of the numbers of a step that were not logged yet, and note in `last` that they are now."""
    new = {name: number for name, number in numbers.items() if step > last.get(name, -1)}
    last.update(dict.fromkeys(new, step))
    return new


def _recipe(folder: Path) -> dict[str, Any]:
    file = folder / "recipe.toml"
    return tomllib.loads(file.read_text()) if file.is_file() else {}


def _replace(file: Path, value: dict[str, Any]) -> None:
    """Write a file that a killed process leaves whole; unlike `write_whole`, it does not wait for the disk."""
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps(value))
    aside.replace(file)
