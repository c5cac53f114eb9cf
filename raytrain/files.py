"""Files that are complete or absent, and on the disk, whatever happens to the process."""

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
    """Write `data` beside `path`, flush it to the disk and rename it into place; flush the folder's entries too."""
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
    fsync_path(path.parent)


class AppendOnlyFile:
    """A file that grows while a run goes on; what it holds already stays.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab")

    def write(self, data: bytes) -> None:
        """Add bytes; they are out of this process when this returns.

        Raises:
            TrainingError: there is no room for all of them, or the disk fails; the file is closed then.
        """
        with self._explained():
            self._file.write(data)
            self._file.flush()

    def fsync(self) -> None:
        """Return when all that was added is on the disk, as a checkpoint that counts on it asks for.

        Raises:
            TrainingError: it cannot be.
        """
        with self._explained():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # of what could not be written, which has been said
            self._file.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close()
            raise TrainingError(f"{self._path}: cannot be written: {error.strerror}") from error


def append_line(path: Path, line: str) -> None:
    """Add a line to a file and flush it to the disk; a line that a killed process left without its end is ended."""
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
    """Create a folder and its parents, each on the disk when this returns; return the new ones, the innermost first."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        fsync_path(folder.parent)
    return new


def fsync_path(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems have no such thing for folders
            raise
    finally:
        os.close(handle)


def read_bytes(path: Path, error: type[RaytrainError], max_bytes: int) -> bytes:
    """Return the contents of a regular file of at most `most` bytes.

    Raises:
        RaytrainError: an `error`: there is no such file, or it cannot be read.
    """
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for who writes to it
            raise OSError("it is not a regular file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as problem:  # ValueError: NUL in the name
        raise error(f"{path}: cannot be read: {problem}") from problem
    if len(data) > max_bytes:
        raise error(f"{path}: cannot be read: expected at most {max_bytes} bytes; got more")
    return data


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_private(path: Path) -> bool:
    """Return whether a file or folder, which is no link, belongs to this user, and no other one can write to it."""
    status = path.lstat()
    open_to_others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.geteuid() and not open_to_others and not stat.S_ISLNK(status.st_mode)
