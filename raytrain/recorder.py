"""What the first worker writes while it trains: ``metrics.jsonl``, and the same to loggers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from raytrain.files import to_json, write_whole
from raytrain.rundir import RunDirectory, rows


class Logger(Protocol):
    """Something that takes the rows of ``metrics.jsonl`` too, made with (the run's folder, the step it resumes at)."""

    def write(self, row: dict[str, Any]) -> None:
        """Take a row: "step" and other numbers, or dicts of numbers."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class Recorder:
    """Writes rows, after dropping those that an interrupted attempt wrote beyond the checkpoint it resumes from.

    So an interrupted and resumed run leaves the rows that an uninterrupted one would.

    Args:
        run: the run.
        step: the step that training resumes at; 0: from the start.
        evaluated: the last step whose evaluation the checkpoint knows of.
        loggers: what else takes the rows.
    """

    def __init__(self, run: RunDirectory, step: int, evaluated: int, loggers: Iterable[Logger]) -> None:
        kept = [row for row in rows(run.metrics) if row["step"] <= (evaluated if "valid" in row else step)]
        write_whole(run.metrics, "".join(to_json(row) + "\n" for row in kept).encode())
        self._file = run.metrics.open("a", buffering=1)
        self._loggers = list(loggers)

    def write(self, row: dict[str, Any]) -> None:
        """Write one row."""
        self._file.write(to_json(row) + "\n")
        for logger in self._loggers:
            logger.write(row)

    def close(self) -> None:
        """Write what is left."""
        self._file.close()
        for logger in self._loggers:
            logger.close()


class TensorBoard:
    """Writes event files for TensorBoard into ``tensorboard/``.

    Args:
        folder: the run's folder.
        step: rows of later steps in older files are to be forgotten.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, row: dict[str, Any]) -> None:
        """Take a row."""
        for name, value in row.items():
            values = (
                {f"{name}/{part}": number for part, number in value.items()}
                if isinstance(value, dict)
                else {f"train/{name}": value}
            )
            for tag, number in values.items():
                if tag != "train/step":
                    self._writer.add_scalar(tag, number, row["step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
