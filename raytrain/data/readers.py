"""Readers of records by file format, row by row: errors name the row, and types are not guessed.

A reader takes a file, the columns that the recipe names, and the unit of a record in a .txt file. It yields (location,
fields) of each record, such as ("line 3", {"text": ...}).
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

Unit = Literal["line", "paragraph", "file"]
RecordRows = Iterator[tuple[str, Mapping[str, Any]]]

USUAL_COLUMNS: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "content", "document", "review", "comment", "title"),
    "label": ("label", "labels", "class", "target", "category", "sentiment"),
    "messages": ("messages", "conversation"),
    "prompt": ("prompt", "instruction", "question", "input"),
    "context": ("context", "input"),
    "answer": ("answer", "response", "output", "completion", "target"),
}
"""Role -> usual names of its column."""

HEADERS = {name for names in USUAL_COLUMNS.values() for name in names}


class BadRowError(Exception):
    """An error in a row; its message begins with the location."""


def _tsv(path: Path, columns: Sequence[str], unit: Unit) -> RecordRows:  # noqa: ARG001 - one signature for all readers
    """Read tab-separated values without quoting, with or without a header."""
    header: list[str] = []
    for number, line in _lines(path):
        values = line.rstrip("\r\n").split("\t")
        if not header:
            named = _names_columns(values, columns)
            header = values if named else [str(place) for place in range(1, len(values) + 1)]
            if named:
                continue
        if line.strip():
            yield f"line {number}", _row(header, values, number)


def _csv(path: Path, columns: Sequence[str], unit: Unit) -> RecordRows:  # noqa: ARG001
    """Read comma-separated values with quoting and a header."""
    csv.field_size_limit(sys.maxsize)  # process-wide: documents exceed the default
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next(reader, [])
        for values in reader:
            if values:
                yield f"line {reader.line_num}", _row(header, values, reader.line_num)
    except csv.Error as error:
        raise BadRowError(f"line {reader.line_num}: not CSV: {error}") from None


def _jsonl(path: Path, columns: Sequence[str], unit: Unit) -> RecordRows:  # noqa: ARG001
    """Read one JSON object from each line."""
    for number, line in _lines(path):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadRowError(f"line {number}: not JSON: {error.msg} (column {error.colno})") from None
            except (RecursionError, ValueError) as error:  # a number of thousands of digits
                raise BadRowError(f"line {number}: {error}") from None
            yield f"line {number}", _object(value, f"line {number}")


def _json(path: Path, columns: Sequence[str], unit: Unit) -> RecordRows:
    """Read a JSON array of objects, or one object from each line."""
    content = path.read_bytes().lstrip(b"\xef\xbb\xbf \t\r\n")
    if not content.startswith(b"["):
        yield from _jsonl(path, columns, unit)
        return
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        raise BadRowError(f"line {error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise BadRowError(f"byte {error.start}: not UTF-8") from None
    except (RecursionError, ValueError) as error:
        raise BadRowError(f"{path.name}: {error}") from None
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", _object(row, f"row {number}")


def _txt(path: Path, columns: Sequence[str], unit: Unit) -> RecordRows:  # noqa: ARG001
    """Read lines, paragraphs between blank lines, or the whole file as texts."""
    if unit == "line":
        yield from ((f"line {number}", {"text": line.rstrip("\r\n")}) for number, line in _lines(path) if line.strip())
        return
    for blank, lines in groupby(_lines(path), lambda line: unit == "paragraph" and not line[1].strip()):
        part = list(lines)
        text = "".join(line for _, line in part)
        if not blank and text.strip():
            yield f"line {part[0][0]}", {"text": text.rstrip("\r\n") if unit == "paragraph" else text}


def _parquet(path: Path, columns: Sequence[str], unit: Unit) -> RecordRows:  # noqa: ARG001
    """Read the rows of a Parquet file in batches."""
    import pyarrow  # noqa: PLC0415 - slow to import
    from pyarrow.parquet import ParquetFile  # noqa: PLC0415

    number = 0
    try:
        with ParquetFile(path) as file:
            rows = (fields for batch in file.iter_batches(1000) for fields in batch.to_pylist())
            for number, fields in enumerate(rows, start=1):
                yield f"row {number}", fields
    except pyarrow.ArrowException as error:
        raise BadRowError(f"row {number + 1}: not Parquet: {error}") from None


READERS: dict[str, Callable[[Path, Sequence[str], Unit], RecordRows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _txt,
    ".parquet": _parquet,
}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line with its terminator); only a line feed terminates a line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise BadRowError(f"line {number}: not UTF-8 (byte {error.start + 1} of the line)") from None


def _names_columns(values: Sequence[str], columns: Sequence[str]) -> bool:
    """Return whether the first row of a table is a header."""
    usual = any(value.strip().lower() in HEADERS for value in values)
    numbers = any(value.strip().lstrip("-").isdigit() for value in values)
    return (usual and not numbers) or any(name in values for name in columns)


def _row(header: Sequence[str], values: Sequence[str], number: int) -> dict[str, str]:
    if len(values) != len(header):
        raise BadRowError(f"line {number}: expected {len(header)} columns; got {len(values)}")
    return dict(zip(header, values, strict=True))


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRowError(f"{where}: expected a JSON object; got {type(value).__name__}")
    return value
