"""Where a run's folder lies, and the list of its files, with their hashes, by which it is copied.

What a list says may come from a machine that is not the user's: it is data, and names only what a run can have.
"""

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated, Protocol

from pydantic import ConfigDict, Field, with_config

from raytrain.errors import RecipeError, TrainingError
from raytrain.json_files import parse_json
from raytrain.registry import suggest

LIST = "files.json"
CHUNK_BYTES = 1 << 20
READ_ATTEMPTS = 3
LOCAL = "file://"
MAX_LIST_BYTES = 64 << 20
MAX_FILES = 100_000
MAX_NAME_BYTES = 1000
"""The longest list that is believed, and the longest name in it; a run has some tens of files."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True)
class Entry:
    """What a list says of a file."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


Listing = dict[str, Entry]
"""Relative path, with slashes -> the file."""


class ChangedError(Exception):
    """A file is not, or is no longer, as it was listed: a run that goes on replaces its checkpoints."""


class RunSource(Protocol):
    """Where a run's folder can be read from.

    Attributes:
        origin: the place, for people.
    """

    origin: str

    def listing(self) -> Listing:
        """Return the files.

        Raises:
            OSError: it cannot be listed now.
        """
        ...

    def read(self, name: str) -> Iterator[bytes]:
        """Yield a file in pieces; one that has grown since it was listed may have more.

        Raises:
            OSError: it cannot be read now.
        """
        ...

    def close(self) -> None:
        """Release what reading needed."""
        ...


class Folder:
    """A run's folder on this machine, or one that it shares."""

    def __init__(self, path: Path) -> None:
        self.origin = str(path)
        self._path = path

    def listing(self) -> Listing:
        """Return the folder's files."""
        return list_files(self._path)

    def read(self, name: str) -> Iterator[bytes]:
        """Yield a file in pieces."""
        return pieces_of(self._path / name)

    def close(self) -> None:
        """Do nothing."""


class Store:
    """A run's folder in a store that fsspec knows, as s3://bucket/runs/digits-3f2a1c.

    Args:
        url: of the folder.

    Raises:
        RecipeError: the store's package is not installed here, or the store cannot be reached.
    """

    def __init__(self, url: str) -> None:

        import fsspec  # noqa: PLC0415 - slow to import

        self.origin = self._url = url
        with _explained(url):
            self._files, self._root = fsspec.core.url_to_fs(url)

    def announce(self, text: str) -> None:
        """Write a small file, to learn before a run whether its end can be stored.

        Raises:
            RecipeError: it cannot.
        """
        with _explained(self._url):
            self._write("job.txt", text.encode())

    def put(self, folder: Path) -> int:
        """Store a folder, its list last, and return the number of bytes.

        Raises:
            OSError, or an error of the store: it did not work.
        """
        listing = list_files(folder)
        for name in listing:
            self._files.makedirs(posixpath.dirname(self._place(name)), exist_ok=True)
            self._files.put_file(str(folder / name), self._place(name))
        self._write(LIST, dump(listing))
        return sum(entry.bytes for entry in listing.values())

    def complete(self) -> bool:
        """Return whether a list is there, which is stored last."""
        with _explained(self._url):
            return bool(self._files.exists(self._place(LIST)))

    def listing(self) -> Listing:
        """Return the stored files.

        Raises:
            RecipeError: it is not complete.
        """
        if not self.complete():
            raise RecipeError(
                f"{self._url}: there is no {LIST}, which is stored last: the job still runs, or was killed before it "
                "could store its run; give the job's name instead, to fetch from the cluster"
            )
        with _explained(self._url):
            return read_list(self.read(LIST))

    def read(self, name: str) -> Iterator[bytes]:
        """Yield a file in pieces."""
        with self._files.open(self._place(name), "rb") as file:
            while piece := file.read(CHUNK_BYTES):
                yield piece

    def close(self) -> None:
        """Do nothing."""

    def _place(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _write(self, name: str, data: bytes) -> None:
        self._files.makedirs(posixpath.dirname(self._place(name)), exist_ok=True)
        self._files.pipe_file(self._place(name), data)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what a store raises, which may be an error of any package, into one message."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"{url} cannot be used: {type(error).__name__}: {error}") from error


def check_storage(storage: str) -> str:
    """Return where jobs are to leave their runs: a folder as "/path", or the URL of a store.

    Raises:
        RecipeError: it is neither, or a store that ends with the process, or it holds a password or a signature.
    """
    import fsspec  # noqa: PLC0415

    place = "/" + storage.removeprefix(LOCAL).strip("/") if storage.startswith(LOCAL) else storage.rstrip("/")
    protocol, separator, rest = place.partition("://")
    if not separator and not place.startswith("/"):
        raise RecipeError(
            f"--storage: expected an absolute path that the cluster's machines share, or a URL as s3://bucket/runs; "
            f"got {storage!r}"
        )
    if separator and protocol not in fsspec.available_protocols():
        raise RecipeError(
            f"--storage: no such protocol {protocol!r}; {suggest(protocol, fsspec.available_protocols())}"
        )
    if separator and protocol == "memory":
        raise RecipeError("--storage: memory:// ends with the job; name a shared folder, or a URL as s3://bucket/runs")
    if separator and (hidden := re.search(r"[?#]", rest)):
        raise RecipeError(
            f"--storage: what is behind {hidden[0]!r} in {protocol}://{rest[: hidden.start()]}, a signature too, would "
            "be seen in the list of jobs and in their logs; leave it out, and give each machine the store's key"
        )
    user, _, host = rest.partition("/")[0].rpartition("@")
    if host.startswith("-") or ".." in place.split("/"):
        raise RecipeError(f"--storage: expected a place without '..', on a host whose name is one; got {storage!r}")
    if ":" in user:
        raise RecipeError(
            f"--storage: the password for {protocol}://{host} would be seen in the list of jobs and in their logs; "
            f"leave it out, and set FSSPEC_{protocol.upper()}_PASSWORD, or a file in ~/.config/fsspec, on each machine"
        )
    return place


def list_files(folder: Path) -> Listing:
    """Return the files below `folder`, but no links, and not hidden ones: locks, and what is being written.

    Raises:
        TrainingError: files come and go faster than they can be listed.
    """
    for _ in range(READ_ATTEMPTS):
        try:
            return {
                path.relative_to(folder).as_posix(): measured(pieces_of(path))
                for path in sorted(folder.rglob("*"))
                if path.is_file()
                and not path.is_symlink()
                and not any(part.startswith(".") for part in path.relative_to(folder).parts)
            }
        except FileNotFoundError:
            continue  # an old checkpoint was removed meanwhile
    raise TrainingError(f"{folder} changes faster than its files can be listed; try again, or when the run has ended")


def measured(pieces: Iterable[bytes]) -> Entry:
    """Return the size and hash of the pieces together."""
    total, count = hashlib.sha256(), 0
    for piece in pieces:
        total.update(piece)
        count += len(piece)
    return Entry(count, total.hexdigest())


def dump(listing: Mapping[str, Entry]) -> bytes:
    """Return a list as JSON."""
    return json.dumps({name: asdict(entry) for name, entry in listing.items()}, indent=1).encode()


def parse(text: bytes) -> Listing:
    """Read a list.

    Raises:
        TrainingError: it is not one, or names what no run has: a file outside the folder, or a hidden one.
    """
    listing = parse_json(text, Listing, f"{LIST} is damaged", max_bytes=MAX_LIST_BYTES)
    _check_names(listing)
    return listing


def _check_names(listing: Listing) -> None:
    """Check that a list names files that a run may have: `list_files` makes no others.

    Raises:
        TrainingError: one may not be.
    """
    if len(listing) > MAX_FILES:
        raise TrainingError(f"{LIST} names {len(listing)} files; expected at most {MAX_FILES}, as no run has more")
    for name in listing:
        parts = name.split("/")
        if name.startswith("/") or ".." in parts:
            raise TrainingError(f"{LIST} names {name!r}, which is outside the run's folder")
        odd = re.search(r"[\x00-\x1f\x7f]", name) or len(name.encode()) > MAX_NAME_BYTES
        if odd or not all(parts) or any(part.startswith(".") for part in parts):
            raise TrainingError(f"{LIST} names {name[:100]!r}, which no file of a run is called, or a hidden one")


def read_list(pieces: Iterator[bytes]) -> Listing:
    """Read a list as it comes.

    Raises:
        TrainingError: it is none, or as `parse`.
    """
    text = b"".join(first_bytes(pieces, MAX_LIST_BYTES + 1))
    if len(text) > MAX_LIST_BYTES:
        raise TrainingError(f"{LIST} is damaged: expected at most {MAX_LIST_BYTES} bytes; got more")
    return parse(text)


def open_file(path: Path, mode: str) -> IO[bytes]:
    """Open a file; one that is a link is an error."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def pieces_of(path: Path) -> Iterator[bytes]:
    """Yield a file in pieces."""
    with open_file(path, "rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece


def first_bytes(pieces: Iterator[bytes], count: int) -> Iterator[bytes]:
    """Yield the first `count` bytes."""
    for piece in pieces:
        yield piece[:count]
        count -= len(piece)
        if count <= 0:
            return
