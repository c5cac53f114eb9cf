"""Rows of the ``.jsonl`` files of a run's folder."""

import logging
from functools import cache
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from raytrain.json_files import read_rows

logger = logging.getLogger(__name__)


@with_config(ConfigDict(extra="allow"))
class MetricsRow(TypedDict):
    """A row of ``metrics.jsonl``: of training, or with "valid" of an evaluation."""

    step: int
    samples: NotRequired[int]
    seconds: NotRequired[float]
    valid: NotRequired[dict[str, Any]]


@with_config(ConfigDict(extra="allow"))
class AttemptRow(TypedDict):
    """A row of ``attempts.jsonl``."""

    from_step: int
    time: NotRequired[float]
    workers: NotRequired[list[Any]]


@with_config(ConfigDict(extra="allow"))
class RestartRow(TypedDict):
    """A row of ``restarts.jsonl``."""

    workers: dict[str, str]
    time: NotRequired[float]


ROW_TYPES: dict[str, Any] = {"metrics.jsonl": MetricsRow, "attempts.jsonl": AttemptRow, "restarts.jsonl": RestartRow}
"""Types of rows by file; rows of other files are any JSON objects."""


def read_jsonl(file: Path, row_type: Any = None) -> list[dict[str, Any]]:
    """Return the rows of a ``.jsonl`` file; damaged lines are skipped with a warning.

    A last line without an end is being written, or was when its process was killed.

    Args:
        file: of a run's folder.
        row_type: what a row has to be; by default what `ROW_TYPES` says of the file's name.
    """
    if not file.is_file():
        return []
    found, damaged = read_rows(file, row_type or ROW_TYPES.get(file.name, dict[str, Any]))
    if damaged:
        _warn_of_damage(file, damaged)
    return found


@cache  # once for each state of a file
def _warn_of_damage(file: Path, damaged: int) -> None:
    logger.warning("%s: %d line(s) are torn or damaged and are left out", file, damaged)
