"""What was measured at the end of each segment: the rows of a search's ``metrics.jsonl``."""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from raytrain.files import append_line, write_atomic
from raytrain.json_files import to_json
from raytrain.run.loggers import Logger, start_loggers
from search.journal.rows import ReportRow, read_reports
from search.scheduling.work import Done, Work

Statistics = Callable[[Mapping[str, Any]], Mapping[str, float]]
"""Changes of the base recipe -> statistic of its model -> value."""

logger = logging.getLogger(__name__)


class Reports:
    """Rows of ``metrics.jsonl``, one for each segment that was trained to its end.

    Args:
        file: that holds them.
        loggers: names of what else takes them; one that fails is left out from there on.
        statistics: what is recorded of the model: changes of the base recipe -> statistic -> value.
    """

    def __init__(self, file: Path, loggers: Sequence[str] = (), statistics: Statistics = lambda _: {}) -> None:
        self._file = file
        self._statistics = statistics
        self._names = loggers
        self._loggers: dict[str, Logger] = {}
        self._before = 0.0
        self._began = time.monotonic()

    def open(self, unfinished: Collection[int]) -> None:
        """Go on after the rows of earlier attempts.

        Args:
            unfinished: rows of the lineage whose segments go on; a killed process can have written down the end of one
                without telling anybody, and it is trained again.
        """
        kept = [row for row in self.read() if row["row"] not in unfinished]
        write_atomic(self._file, "".join(f"{to_json(row)}\n" for row in kept).encode())
        self._before = max((row["seconds"] for row in kept), default=0.0)
        self._loggers = start_loggers(self._names, self._file.parent, max((row["step"] for row in kept), default=0))
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall-clock time of all attempts."""
        return self._before + time.monotonic() - self._began

    def add(self, work: Work, done: Done) -> None:
        """Add the end of a segment."""
        row = {"row": work.row, "member": work.member, "step": done.snapshot.step, "seconds": round(self.seconds, 3)}
        statistics = dict(self._statistics(work.changes))
        recorded = {"statistics": statistics} if statistics else {}
        append_line(self._file, to_json({**row, "valid": dict(done.metrics), **recorded}))
        shown = {"step": done.snapshot.step, f"member {work.member}": dict(done.metrics)}
        for name in list(self._loggers):
            self._try(name, lambda found: found.write(shown))

    def close(self, *, failed: bool) -> None:
        """Tell the loggers how the search ended."""
        for name in list(self._loggers):
            self._try(name, lambda found: found.close(failed))

    def read(self) -> list[ReportRow]:
        """Return the rows."""
        return read_reports(self._file)

    def metrics(self, row: int) -> Mapping[str, float]:
        """Return what was measured at the end of the segment that a row of the lineage began."""
        found = next((report["valid"] for report in self.read() if report["row"] == row), {})
        return {name: value for name, value in found.items() if value is not None}

    def _try(self, name: str, act: Callable[[Logger], None]) -> None:
        """Let a logger act; a lost connection must not end the search."""
        try:
            act(self._loggers[name])
        except Exception as error:
            del self._loggers[name]
            logger.warning("%s failed, and gets no more of this attempt: %s: %s", name, type(error).__name__, error)
