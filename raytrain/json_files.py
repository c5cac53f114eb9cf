"""JSON from untrusted sources (disk, store, server): parsed and validated against a type."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from raytrain.errors import RaytrainError, TrainingError
from raytrain.files import read_bytes

MAX_JSON_BYTES = 64 << 20
MAX_ROW_BYTES = 16 << 20
DIGEST_FIELD = b', "sha256": "'
DIGEST_DIGITS = 64

ModelT = TypeVar("ModelT")


def read_json(path: Path, model: type[ModelT], error: type[RaytrainError] = TrainingError) -> ModelT:
    """Read and validate a JSON file, as `parse_json` does.

    Raises:
        RaytrainError: an `error`: the file cannot be read, is too large, or is not valid.
    """
    return parse_json(read_bytes(path, error, MAX_JSON_BYTES), model, str(path), error)


def parse_json(
    data: bytes | str,
    model: type[ModelT],
    where: str,
    error: type[RaytrainError] = TrainingError,
    max_bytes: int = MAX_JSON_BYTES,
) -> ModelT:
    """Parse a JSON document and validate it against a type; nesting beyond 200 levels is refused.

    Args:
        data: the document.
        model: a type that pydantic supports, in strict mode: no numbers from strings, for example.
        where: the document's name in error messages.
        error: type of error to raise.
        max_bytes: largest size of the document.

    Raises:
        RaytrainError: an `error`: it is not JSON, or not of this type.
    """
    if len(data) > max_bytes:
        raise error(f"{where}: cannot be read: expected at most {max_bytes} bytes; got {len(data)}")
    try:
        found: ModelT = _adapter(cast(Any, model)).validate_json(data, strict=True)
        return found
    except ValidationError as problem:
        detail = problem.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in detail["loc"])
        at = "" if not field else f"{field}: " if field.isprintable() else f"{field!r}: "
        raise error(f"{where}: cannot be read: {at}{detail['msg']}") from problem


@cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    """Return what validates a type; to make one takes longer than to parse most documents."""
    return TypeAdapter(model)


def is_number(value: Any) -> bool:
    """Return whether a value of JSON is a number that a float can hold, which true and false are not."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63)


def read_rows(path: Path, model: type[ModelT]) -> tuple[list[ModelT], int]:
    """Read the rows of a ``.jsonl`` file as `parse_rows` does, without an unterminated last line.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return parse_rows(_lines(file), model)


def parse_rows(lines: Iterable[bytes], model: type[ModelT]) -> tuple[list[ModelT], int]:
    """Return (valid rows, number of invalid lines)."""
    adapter, rows, damaged = TypeAdapter(model), [], 0
    for line in lines:
        try:
            rows.append(adapter.validate_json(line, strict=True))
        except ValidationError:
            damaged += 1
    return rows, damaged


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield terminated lines; one beyond `MAX_ROW_BYTES` as an empty one, which is invalid."""
    whole = True
    while piece := file.readline(MAX_ROW_BYTES):
        ended = piece.endswith(b"\n")
        if ended:
            yield piece if whole else b""
        whole = ended


def add_checksum(content: Mapping[str, Any]) -> bytes:
    """Return `content` as canonical JSON with its SHA-256 as the last field."""
    return _with_digest(json.dumps(content, sort_keys=True).encode())


def verify_checksum(data: bytes, where: str, error: type[RaytrainError]) -> bytes:
    """Check and remove the checksum that `add_checksum` appended.

    Raises:
        RaytrainError: an `error`: the contents changed.
    """
    content = data[: -len(DIGEST_FIELD) - DIGEST_DIGITS - len(b'"}')] + b"}"
    if _with_digest(content) != data:
        raise error(f"{where}: its contents changed since it was written")
    return content


def _with_digest(content: bytes) -> bytes:
    return content[:-1] + DIGEST_FIELD + hashlib.sha256(content).hexdigest().encode() + b'"}'


def to_json(value: Any, indent: int | None = None) -> str:
    """Return nested plain data as strict JSON.

    What JSON lacks is replaced: non-finite numbers by null, lone surrogates (as in names of files) by "?".

    >>> to_json({"loss": float("nan"), "steps": 3})
    '{"loss": null, "steps": 3}'
    """
    return json.dumps(_portable(value), indent=indent, allow_nan=False)


def _portable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_portable(key): _portable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(inner) for inner in value]
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value
