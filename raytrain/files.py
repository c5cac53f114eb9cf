"""Atomic and durable file writes: after a crash a file is complete or absent."""

import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raytrain.errors import RaytrainError, TrainingError


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically and durably: write beside it, fsync, rename, fsync the folder."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # process ids repeat on other machines
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


class AppendOnlyFile:
    """A file that is only appended to.

    Args:
        path: the file; existing contents stay.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab")

    def write(self, data: bytes) -> None:
        """Append bytes and flush them to the operating system.

        Raises:
            TrainingError: the disk is full or fails; the file is closed then.
        """
        with self._explained():
            self._file.write(data)
            self._file.flush()

    def fsync(self) -> None:
        """Flush all appended bytes to the disk, before a checkpoint that relies on them.

        Raises:
            TrainingError: the disk is full or fails; the file is closed then.
        """
        with self._explained():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # `write` raised it already
            self._file.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close()
            raise TrainingError(f"{self._path}: cannot be written: {error.strerror}") from error


def append_line(path: Path, line: str) -> None:
    """Append a line durably; a last line that a killed process left unterminated is terminated first."""
    new = not path.exists()
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    if new:
        fsync_path(path.parent)


def make_folder(path: Path) -> list[Path]:
    """Create a folder and its parents durably; return the new ones, innermost first."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        fsync_path(folder.parent)
    return new


def fsync_path(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems cannot sync folders
            raise
    finally:
        os.close(handle)


def read_bytes(path: Path, error: type[RaytrainError], max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes` bytes.

    Raises:
        RaytrainError: an `error`: there is no such file, it cannot be read, or it is too large.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
            raise OSError("it is not a regular file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as problem:  # ValueError: NUL in the name
        raise error(f"{path}: cannot be read: {problem}") from problem
    if len(data) > max_bytes:
        raise error(f"{path}: cannot be read: expected at most {max_bytes} bytes; got more")
    return data


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_private(path: Path) -> bool:
    """Return whether a path belongs to this user, is no symbolic link, and is writable by no other user."""
    status = path.lstat()
    open_to_others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.geteuid() and not open_to_others and not stat.S_ISLNK(status.st_mode)
