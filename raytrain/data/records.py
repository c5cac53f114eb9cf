"""Sources of records: files, folders, globs, or datasets of the Hugging Face hub."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator

from raytrain.data.readers import READERS, BadRowError, Unit
from raytrain.errors import RecipeError

SPLIT_ALIASES = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("valid", "validation", "dev", "val"), "valid"
)
"""Usual name of a split -> its name here."""

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
GLOB_CHARACTERS = re.compile(r"[*?\[]")


def is_local(source: str) -> bool:
    """Return whether a source is a path on this machine rather than a name on the hub."""
    path = os.path.expanduser(source)
    looks = source.startswith(("/", "~", ".")) or GLOB_CHARACTERS.search(source) or Path(source).suffix in READERS
    return bool(looks) or os.path.exists(path) or not HUB_NAME.fullmatch(source)


def absolute_location(source: str) -> str:
    """Return a local source as an absolute path, another one unchanged."""
    return os.path.abspath(os.path.expanduser(source)) if source and is_local(source) else source


Location = Annotated[str, AfterValidator(absolute_location)]
"""A path, made absolute because workers run in another working directory, or a name on the hub."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a table.

    Attributes:
        fields: column -> value. Columns of a table without a header are "1", "2", ...
        where: location, such as "dev.tsv, line 3".
        source: stem of its file, or name of its split.
    """

    fields: Mapping[str, Any]
    where: str
    source: str


class RecordSource(Protocol):
    """Records by split.

    Attributes:
        splits: names of splits, among "train", "valid" and "test"; datasets of the hub may have others.
    """

    @property
    def splits(self) -> Sequence[str]:
        """The names of the splits."""
        ...

    def records(self, split: str) -> Iterator[Record]:
        """Yield the records of a split in a fixed order."""
        ...

    def fingerprint(self, split: str) -> str:
        """Return a string that changes when the records of a split do."""
        ...


class LocalRecords:
    """Records in local files.

    Args:
        source: a file, a folder or a glob.
        columns: names of columns in the recipe.
        unit: of a record in a .txt file.
        prefix: beginning of error messages.

    Raises:
        RecipeError: there are no such files.
    """

    def __init__(
        self, source: str, columns: Sequence[str] = (), unit: Unit = "line", prefix: str = "task.path: "
    ) -> None:
        path = Path(source)
        if path.exists():
            names = [path] if path.is_file() else [*path.rglob("*")]
            root = path.parent if path.is_file() else path
        elif GLOB_CHARACTERS.search(source):
            names = [Path(name) for name in glob.glob(source, recursive=True)]
            root = Path(os.path.dirname(GLOB_CHARACTERS.split(source)[0]))
        else:
            raise RecipeError(f"{prefix}no such file or folder: {source}")
        files = sorted(file for file in names if file.is_file() and file.suffix in READERS)
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts)]
        if not files:
            raise RecipeError(f"{prefix}there is no file to read ({', '.join(READERS)}) at {source}")
        self._files = {"train": files} if path.is_file() else _by_split(root, files)
        self._root = root
        self._columns = tuple(columns)
        self._unit = unit
        self._prefix = prefix
        self.splits = tuple(self._files)

    def records(self, split: str) -> Iterator[Record]:
        """Yield the records of a split's files, sorted by name.

        Raises:
            RecipeError: a row cannot be read.
        """
        for file in self._files[split]:
            name = file.relative_to(self._root).as_posix()
            try:
                for where, fields in READERS[file.suffix](file, self._columns, self._unit):
                    yield Record(fields, f"{name}, {where}", file.stem)
            except BadRowError as error:
                raise RecipeError(f"{self._prefix}{name}, {error}") from None

    def fingerprint(self, split: str) -> str:
        """Return the SHA-256 of the files' names, sizes and times, and of the options of reading."""
        facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self._files[split]]
        return hashlib.sha256(json.dumps([facts, self._columns, self._unit]).encode()).hexdigest()


class HubRecords:
    """Records of a dataset of the Hugging Face hub, or of its local cache.

    Args:
        source: "org/name", or "org/name:config".

    Raises:
        RecipeError: it cannot be loaded.
    """

    def __init__(self, source: str) -> None:
        from datasets import load_dataset  # noqa: PLC0415 - slow to import

        name, _, config = source.partition(":")
        try:
            found = load_dataset(name, config or None)
        except Exception as error:  # of a dozen kinds; the way out is the same
            raise RecipeError(
                f"task.path: {source!r} is neither a file or folder here nor a data set that could be had from the "
                f"Hugging Face hub ({str(error).splitlines()[0]}); to use a local copy, run `hf download --repo-type "
                f"dataset {name} --local-dir DIR` where there is a network, and set task.path=DIR"
            ) from error
        self._name = source
        self._tables = {SPLIT_ALIASES.get(split, split): table for split, table in found.items()}
        self.splits = tuple(self._tables)

    def records(self, split: str) -> Iterator[Record]:
        """Yield the records of a split."""
        for place, fields in enumerate(self._tables[split], start=1):
            yield Record(fields, f"{self._name} {split}, row {place}", split)

    def fingerprint(self, split: str) -> str:
        """Return the fingerprint of the table by the `datasets` library."""
        return str(self._tables[split]._fingerprint)


def read_records(path: Path, columns: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the records of one file, for predictions.

    Raises:
        RecipeError: there is no such file, a row cannot be read, or there are none.
    """
    empty = True
    for record in LocalRecords(str(path), columns, prefix="").records("train"):
        empty = False
        yield record
    if empty:
        raise RecipeError(f"{path} has no records")


def _by_split(root: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return split -> files, by the names of files and folders."""
    found: dict[str, list[Path]] = {}
    for file in files:
        parts = (file.stem, *file.relative_to(root).parts[:-1])
        splits = [split for part in parts for name, split in SPLIT_ALIASES.items() if _is_called(part.lower(), name)]
        if splits:
            found.setdefault(splits[0], []).append(file)
    return found or {"train": list(files)}


def _is_called(part: str, name: str) -> bool:
    """Return whether a file has a split's name, or is a shard of it, such as train-00001-of-00002."""
    return part == name or re.match(rf"{name}[-_.]\d", part) is not None
