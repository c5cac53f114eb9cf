"""Writing of metrics by the first worker: ``metrics.jsonl``, and loggers."""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from raytrain.files import AppendOnlyFile, write_atomic
from raytrain.json_files import to_json
from raytrain.run.directory import RunDirectory
from raytrain.run.loggers import start_loggers
from raytrain.run.rows import read_jsonl


class MetricsWriter:
    """Writes rows of metrics, after dropping those of an interrupted attempt that are newer than its checkpoint.

    So an interrupted and resumed run has the rows of an uninterrupted one. A logger that fails gets no more rows, with
    a message on stderr: a lost connection must not end the training, and all rows are in the file.

    Args:
        run: folder of the run.
        step: at which training resumes; 0: from the start.
        evaluated: step of the last evaluation in the checkpoint.
        loggers: names of the loggers.

    Raises:
        RecipeError: there is no such logger, or it is not installed.
        TrainingError: a logger cannot start.
    """

    def __init__(self, run: RunDirectory, step: int, evaluated: int, loggers: Iterable[str]) -> None:
        kept = [row for row in read_jsonl(run.metrics) if row["step"] <= (evaluated if "valid" in row else step)]
        write_atomic(run.metrics, "".join(to_json(row) + "\n" for row in kept).encode())
        self._loggers = start_loggers(loggers, run.path, step)
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
        """Flush all rows to disk, before a checkpoint that relies on them.

        Raises:
            TrainingError: it fails.
        """
        self._file.fsync()

    def close(self, failed: bool = False) -> None:
        """Close the file, and the loggers with the outcome of the attempt."""
        self._file.close()
        for name, logger in list(self._loggers.items()):
            self._try(name, partial(logger.close, failed))

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            del self._loggers[name]
            print(
                f"raytrain: log.loggers: {name} failed, and gets no more of this attempt: {type(error).__name__}: "
                f"{error}; "
                f"all metrics are in {self._path}",
                file=sys.stderr,
                flush=True,
            )
