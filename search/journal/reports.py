"""What was measured at the end of each segment: the rows of a search's ``metrics.jsonl``."""

import time
from collections.abc import Collection, Mapping
from pathlib import Path

from raytrain.files import append_line, write_atomic
from raytrain.json_files import to_json
from search.journal.rows import ReportRow, read_reports
from search.scheduling.work import Done, Work


class Reports:
    """Rows of ``metrics.jsonl``, one for each segment that was trained to its end.

    Args:
        file: that holds them.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
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
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall-clock time of all attempts."""
        return self._before + time.monotonic() - self._began

    def add(self, work: Work, done: Done) -> None:
        """Add the end of a segment."""
        row = {"row": work.row, "member": work.member, "step": done.snapshot.step, "seconds": round(self.seconds, 3)}
        append_line(self._file, to_json({**row, "valid": dict(done.metrics)}))

    def read(self) -> list[ReportRow]:
        """Return the rows."""
        return read_reports(self._file)

    def metrics(self, row: int) -> Mapping[str, float]:
        """Return what was measured at the end of the segment that a row of the lineage began."""
        found = next((report["valid"] for report in self.read() if report["row"] == row), {})
        return {name: value for name, value in found.items() if value is not None}
