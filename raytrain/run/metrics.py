"""What the first worker writes while it trains: ``metrics.jsonl``, and the same to loggers."""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from raytrain.files import AppendOnlyFile, write_atomic
from raytrain.json_files import to_json
from raytrain.run.directory import RunDirectory, rows
from raytrain.run.loggers import started


class Recorder:
    """Writes rows, after dropping those that an interrupted attempt wrote beyond the checkpoint it resumes from.

    So an interrupted and resumed run leaves the rows that an uninterrupted one would. A logger that fails is left out
    from there on, with a word on stderr: a lost connection must not end the training, and the rows are on the disk.

    Args:
        run: the run.
        step: the step that training resumes at; 0: from the start.
        evaluated: the last step whose evaluation the checkpoint knows of.
        loggers: names of what else takes the rows.

    Raises:
        RecipeError: there is no such logger, or it is not installed.
        TrainingError: a logger cannot start.
    """

    def __init__(self, run: RunDirectory, step: int, evaluated: int, loggers: Iterable[str]) -> None:
        kept = [row for row in rows(run.metrics) if row["step"] <= (evaluated if "valid" in row else step)]
        write_atomic(run.metrics, "".join(to_json(row) + "\n" for row in kept).encode())
        self._loggers = started(loggers, run.path, step)
        self._path = run.metrics
        self._file = AppendOnlyFile(run.metrics)

    def write(self, row: dict[str, Any]) -> None:
        """Write one row.

        Raises:
            TrainingError: the file cannot be written.
        """
        self._file.write(f"{to_json(row)}\n".encode())
        for name, logger in list(self._loggers.items()):
            self._try(name, partial(logger.write, row))

    def keep(self) -> None:
        """Return when all rows so far are on the disk, as a checkpoint that counts on them asks for.

        Raises:
            TrainingError: they cannot be.
        """
        self._file.fsync()

    def close(self, failed: bool = False) -> None:
        """Write what is left, and tell the loggers how the attempt ended."""
        self._file.close()
        for name, logger in list(self._loggers.items()):
            self._try(name, partial(logger.close, failed))

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            del self._loggers[name]
            print(
                f"raytrain: log.to: {name} failed, and gets no more of this attempt: {type(error).__name__}: {error}; "
                f"all metrics are in {self._path}",
                file=sys.stderr,
                flush=True,
            )
