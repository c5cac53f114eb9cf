"""Writing files so that they are complete or absent, whatever happens to the process."""

import hashlib
import json
import math
import os
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, flush it to the disk and rename it into place."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # workers on two machines may have one number
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: Any, indent: int | None = None) -> str:
    """Return nested plain data as JSON for others to read; numbers that are not finite, which JSON lacks, are null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_private(path: Path) -> bool:
    """Return whether a file or folder, which is no link, belongs to this user, and no other one can write to it."""
    status = path.lstat()
    open_to_others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.geteuid() and not open_to_others and not stat.S_ISLNK(status.st_mode)
