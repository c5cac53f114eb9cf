"""Copies of a run's folder, file by file with their hashes, from and to wherever it lies.

A list names every file with its size and SHA-256. A copy appears under its name when all of it is there and is as it
was listed; until then it lies beside it, and the next attempt goes on from there.
"""

import hashlib
import json
import posixpath
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Protocol

import fsspec
from pydantic import ConfigDict, Field, with_config

from raytrain.errors import CheckpointError, RecipeError, TrainingError
from raytrain.json_files import parse_json
from raytrain.names import near

LIST = "files.json"
CHUNK_BYTES = 1 << 20
ATTEMPTS = 3
LOCAL = "file://"


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


class Source(Protocol):
    """Where a run's folder can be read from."""

    def listing(self) -> Listing:
        """Return what there is.

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


class Folder:
    """A run's folder on this machine, or one that it shares."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def listing(self) -> Listing:
        """Return the folder's files."""
        return list_files(self._path)

    def read(self, name: str) -> Iterator[bytes]:
        """Yield a file in pieces."""
        return _pieces(self._path / name)


class Store:
    """A run's folder in a store that fsspec knows, as s3://bucket/runs/digits-3f2a1c.

    Args:
        url: of the folder.

    Raises:
        RecipeError: the store's package is not installed here, or the store cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self._url = url
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
        """Return what was stored.

        Raises:
            RecipeError: it is not complete.
        """
        if not self.complete():
            raise RecipeError(
                f"{self._url}: there is no {LIST}, which is stored last: the job still runs, or was killed before it "
                "could store its run; give the job's name instead, to fetch from the cluster"
            )
        with _explained(self._url):
            return parse(self._files.cat_file(self._place(LIST)))

    def read(self, name: str) -> Iterator[bytes]:
        """Yield a file in pieces."""
        with self._files.open(self._place(name), "rb") as file:
            while piece := file.read(CHUNK_BYTES):
                yield piece

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
        RecipeError: it is neither, or a store that ends with the process, or it holds a password.
    """
    place = "/" + storage.removeprefix(LOCAL).strip("/") if storage.startswith(LOCAL) else storage.rstrip("/")
    protocol, separator, rest = place.partition("://")
    if not separator and not place.startswith("/"):
        raise RecipeError(
            f"--storage: expected an absolute path that the cluster's machines share, or a URL as s3://bucket/runs; "
            f"got {storage!r}"
        )
    if separator and protocol not in fsspec.available_protocols():
        raise RecipeError(f"--storage: no such protocol {protocol!r}; {near(protocol, fsspec.available_protocols())}")
    if separator and protocol == "memory":
        raise RecipeError("--storage: memory:// ends with the job; name a shared folder, or a URL as s3://bucket/runs")
    user, _, host = rest.partition("/")[0].rpartition("@")
    if ":" in user:
        raise RecipeError(
            f"--storage: the password for {protocol}://{host} would be seen in the list of jobs and in their logs; "
            f"leave it out, and set FSSPEC_{protocol.upper()}_PASSWORD, or a file in ~/.config/fsspec, on each machine"
        )
    return place


def list_files(folder: Path) -> Listing:
    """Return the files below `folder`, but not hidden ones: locks, and what is being written.

    Raises:
        TrainingError: files come and go faster than they can be listed.
    """
    for _ in range(ATTEMPTS):
        try:
            return {
                path.relative_to(folder).as_posix(): measured(_pieces(path))
                for path in sorted(folder.rglob("*"))
                if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
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
        TrainingError: it is not one, or names a file outside the folder.
    """
    listing = parse_json(text, Listing, f"{LIST} is damaged")
    for name in listing:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise TrainingError(f"{LIST} names {name!r}, which is outside the run's folder")
    return listing


def fetch(source: Source, target: Path, say: Callable[[str], None]) -> None:
    """Copy a run's folder from `source` to `target`, which appears when it is complete.

    What an attempt that broke off left beside `target` is used again.

    Raises:
        RecipeError: there is something at `target`, or nothing to copy.
        TrainingError: it did not work.
    """
    _check_target(target)
    aside = target.with_name(f".{target.name}.partial")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            listing = source.listing()
            if not listing:
                raise RecipeError("the run's folder is empty")
            say(f"fetching {len(listing)} files, {sum(entry.bytes for entry in listing.values()) / 2**20:.1f} MiB")
            _copy(source, listing, aside)
            break
        except (ChangedError, OSError) as error:
            if attempt == ATTEMPTS:
                kept = f"what has come is kept in {aside}: " if aside.exists() else ""
                raise TrainingError(f"{error}; {kept}try again") from error
            say(f"{error}; trying again")
    _keep_only(listing, aside)
    check_checkpoints(aside, say)
    if target.is_dir():
        target.rmdir()
    aside.rename(target)


def check_checkpoints(run: Path, say: Callable[[str], None]) -> None:
    """Check that a checkpoint of the run in `run` is complete, and name those that are not.

    A run that was killed, or that goes on, may have removed an old one in part.

    Raises:
        CheckpointError: there are checkpoints, and none of them is complete.
    """
    from raytrain.checkpoint import listed, verify  # noqa: PLC0415 - slow to import

    checkpoints, damaged = listed(run / "checkpoints"), []
    for path in checkpoints:
        try:
            verify(path)
        except CheckpointError as error:
            damaged.append(str(error).replace(f"{run}/", ""))
    if damaged and len(damaged) == len(checkpoints):
        problems = "\n".join(damaged)
        raise CheckpointError(f"no checkpoint of the run can be read; its files are kept in {run}\n{problems}")
    for problem in damaged:
        say(f"a checkpoint of the run is damaged, and others are complete: {problem}")


def _check_target(target: Path) -> None:
    """Check that a folder can be renamed to `target`.

    Raises:
        RecipeError: it cannot.
    """
    if target.is_symlink() or target.is_mount() or target.resolve() == Path.cwd():
        raise RecipeError(f"{target} is a link, a mount point or the current folder; name another, or a new one in it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RecipeError(f"{target} is there already, and not empty; name another folder")


def _copy(source: Source, listing: Listing, aside: Path) -> None:
    for name, entry in listing.items():
        file = aside / name
        if file.is_file() and file.stat().st_size == entry.bytes and measured(_pieces(file)) == entry:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as copy:
            pieces = _first(source.read(name), entry.bytes) if entry.bytes else iter(())
            came = measured(_through(pieces, copy.write))
        if came != entry:
            raise ChangedError(f"{name}: expected {entry.bytes} bytes, and {came.bytes} came, or others")


def _keep_only(listing: Listing, aside: Path) -> None:
    """Remove what an earlier attempt brought and is no longer part of the run."""
    for path in sorted(aside.rglob("*"), reverse=True):
        name = path.relative_to(aside).as_posix()
        if path.is_dir() and not any(other.startswith(f"{name}/") for other in listing):
            shutil.rmtree(path)
        elif path.is_file() and name not in listing:
            path.unlink()


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece


def _first(pieces: Iterator[bytes], count: int) -> Iterator[bytes]:
    """Yield the first `count` bytes."""
    for piece in pieces:
        yield piece[:count]
        count -= len(piece)
        if count <= 0:
            return


def _through(pieces: Iterable[bytes], take: Callable[[bytes], object]) -> Iterator[bytes]:
    for piece in pieces:
        take(piece)
        yield piece
