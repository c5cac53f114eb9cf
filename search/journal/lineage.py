"""The lineage: every decision of a search, a line of JSON each, chained by hashes.

A row holds under "before" the SHA-256 of the row before it, so a row that is changed, lost or out of place shows. Rows
that begin a segment name the row whose segment they continue ("parent_row"), always an earlier one: the lineage is a
graph without cycles, in which a model's ancestors are a path.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain.errors import CheckpointError
from raytrain.files import fsync_path


@dataclass(frozen=True, slots=True)
class Chain:
    """How far a lineage goes.

    Attributes:
        rows: how many there are.
        head: hash of the last one; "" without any.
    """

    rows: int = 0
    head: str = ""

    def extended(self, rows: Sequence[Mapping[str, Any]]) -> tuple["Chain", list[str]]:
        """Return the chain with more rows, and their lines."""
        head, lines = self.head, []
        for row in rows:
            line = json.dumps({**row, "before": head}, sort_keys=True, allow_nan=False)
            head = _hash(line)
            lines.append(line)
        return Chain(self.rows + len(lines), head), lines


class Lineage:
    """The file of a search's decisions.

    Args:
        path: of the file; made by the first `append`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, lines: Sequence[str]) -> None:
        """Add lines and flush them to the disk."""
        data = "".join(f"{line}\n" for line in lines).encode()
        new = not self.path.exists()
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            while data:
                data = data[os.write(handle, data) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        if new:
            fsync_path(self.path.parent)

    def heal(self, chain: Chain, tail: Sequence[str]) -> None:
        """Bring the file to the end of `chain`: remove a torn last line, add lines that were not written.

        Args:
            chain: what the file should hold.
            tail: the last lines of the chain, as many as a kill can have kept from the file.

        Raises:
            CheckpointError: a row is lost, changed or not of this chain; the message names it.
        """
        whole, complete = self._lines()
        if len(whole) > chain.rows:
            raise CheckpointError(
                f"{self.path}: row {chain.rows} and later ones are not of this search, which has {chain.rows} rows"
            )
        missing = chain.rows - len(whole)
        if missing > len(tail):
            raise CheckpointError(f"{self.path}: rows {len(whole)} to {chain.rows - len(tail) - 1} are lost")
        self._check([*whole, *tail[len(tail) - missing :]], chain.head)
        if self.path.exists() and self.path.stat().st_size > complete:
            os.truncate(self.path, complete)
            fsync_path(self.path)
        if missing:
            self.append(tail[len(tail) - missing :])

    def read(self) -> list[dict[str, Any]]:
        """Return the rows; a torn last line is left out.

        Raises:
            CheckpointError: a row is lost or changed; the message names it.
        """
        whole, _ = self._lines()
        self._check(whole, _hash(whole[-1]) if whole else "")
        return [json.loads(line) for line in whole]

    def _lines(self) -> tuple[list[str], int]:
        """Return the complete lines, and how many bytes they are."""
        data = self.path.read_bytes() if self.path.exists() else b""
        complete = data.rfind(b"\n") + 1
        return data[:complete].decode(errors="replace").split("\n")[:-1], complete

    def _check(self, lines: Sequence[str], head: str) -> None:
        before = ""
        for number, line in enumerate(lines):
            row = _parsed(line)
            if row is None:
                raise CheckpointError(f"{self.path}: row {number} was changed: it is no longer JSON")
            if row.get("row") != number:
                raise CheckpointError(f"{self.path}: row {number} is lost; row {row.get('row')} is in its place")
            if row.get("before") != before:
                raise CheckpointError(f"{self.path}: row {number - 1} was changed after row {number} was written")
            before = _hash(line)
        if before != head:
            raise CheckpointError(f"{self.path}: row {len(lines) - 1} was changed after it was written")


def _hash(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
