"""What the rows of a search's files have to have, for those who read them without the search."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from raytrain.json_files import read_rows


@with_config(ConfigDict(extra="allow"))
class DecisionRow(TypedDict):
    """A row of ``lineage.jsonl``. One with "new" begins a segment, one with "ended" is about a segment that ended."""

    row: int
    action: str
    member: int
    step: NotRequired[int]
    generation: NotRequired[int]
    parent: NotRequired[int]
    parent_row: NotRequired[int | None]
    new: NotRequired[dict[str, Any]]
    genome: NotRequired[dict[str, Any]]
    ended: NotRequired[int]
    score: NotRequired[float]
    parent_score: NotRequired[float]
    predictor: NotRequired[str]
    predicted: NotRequired[dict[str, float]]
    failure: NotRequired[dict[str, str]]


@with_config(ConfigDict(extra="allow"))
class ReportRow(TypedDict):
    """A row of ``metrics.jsonl``: the end of a segment."""

    row: int
    member: int
    step: int
    seconds: float
    valid: dict[str, float | None]
    statistics: NotRequired[dict[str, float]]


def read_decisions(folder: Path) -> list[DecisionRow]:
    """Return the rows of a search's lineage, up to the first that is damaged: later ones refer to it."""
    found: list[DecisionRow] = []
    for row in _read(folder / "lineage.jsonl", DecisionRow):
        if not _follows(row, found):
            break
        found.append(row)
    return found


def _follows(row: DecisionRow, before: Sequence[DecisionRow]) -> bool:
    """Return whether a row can come after others: a segment continues one that began earlier."""
    parent = row.get("parent_row")
    continues = parent is None or (0 <= parent < len(before) and "new" in before[parent])
    whole = "new" not in row or ("step" in row and "generation" in row)
    return row["row"] == len(before) and continues and whole


def read_reports(file: Path) -> list[ReportRow]:
    """Return the rows of a search's metrics; those that are damaged are left out."""
    return _read(file, ReportRow)


def _read(file: Path, model: Any) -> list[Any]:
    return read_rows(file, model)[0] if file.is_file() else []
