"""Records to learn from: rows of files, of folders and globs of them, or of data sets of the Hugging Face hub."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import AfterValidator, Field

from raytrain.errors import RecipeError
from raytrain.names import near
from raytrain.recipe import Options
from raytrain.tasks.readers import READERS, BadRowError, Unit

Part = Literal["train", "valid"]
"""What is learned from, and what is held out to measure on."""

CALLED = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("valid", "validation", "dev", "val"), "valid"
)
"""What splits are called -> their names here."""

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
MAGIC = re.compile(r"[*?\[]")


def is_local(source: str) -> bool:
    """Return whether `source` names something on this machine, rather than on the hub."""
    path = os.path.expanduser(source)
    looks = source.startswith(("/", "~", ".")) or MAGIC.search(source) or Path(source).suffix in READERS
    return bool(looks) or os.path.exists(path) or not HUB_NAME.fullmatch(source)


def _absolute(source: str) -> str:
    return os.path.abspath(os.path.expanduser(source)) if source and is_local(source) else source


Source = Annotated[str, AfterValidator(_absolute)]
"""Files, or a name on the hub; a path is made absolute, because workers do not share the current folder."""


class RecordOptions(Options):
    """Where records come from.

    Attributes:
        path: a file (.jsonl, .json, .csv, .tsv, .txt, .parquet), a folder or a glob of such files, or a data set of the
            Hugging Face hub ("org/name", or "org/name:config"). Of a folder, the files (or sub-folders) called train,
            valid, validation, dev or test are these splits; if none is called so, all are for training.
        valid: share of the training records that is held out if there is no validation split, the same for every seed.
        held_out: what to measure on instead: a split ("test"), or a file.
        domain: the column that says where a record comes from, as federated partitions ask for; default: its file.
    """

    path: Source = ""
    valid: float = Field(0.1, gt=0, lt=1)
    held_out: Annotated[str, AfterValidator(lambda value: value if value in CALLED else _absolute(value))] = ""
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a table.

    Attributes:
        fields: column -> value. The columns of a table that does not name them are called "1", "2", ...
        where: its place, as "dev.tsv, line 3".
        source: the name of its file without the ending, or of its split.
    """

    fields: Mapping[str, Any]
    where: str
    source: str


class Data(Protocol):
    """Records by split.

    Attributes:
        splits: those there are, of "train", "valid" and "test"; a hub's may have more.
    """

    @property
    def splits(self) -> Sequence[str]:
        """The names of the splits."""
        ...

    def records(self, split: str) -> Iterator[Record]:
        """Yield the records of a split, always in the same order."""
        ...

    def stamp(self, split: str) -> str:
        """Return what changes when the records of the split do."""
        ...


class Files:
    """Records in files.

    Args:
        source: a file, a folder or a glob.
        columns: names that the recipe gives to columns.
        unit: what a record of a .txt file is.
        prefix: what error messages begin with.

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
        elif MAGIC.search(source):
            names = [Path(name) for name in glob.glob(source, recursive=True)]
            root = Path(os.path.dirname(MAGIC.split(source)[0]))
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
        """Yield the records of the split's files, in the order of their names.

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

    def stamp(self, split: str) -> str:
        """Return a hash of the names, sizes and times of the split's files, and of how they are read."""
        facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self._files[split]]
        return hashlib.sha256(json.dumps([facts, self._columns, self._unit]).encode()).hexdigest()


class Hub:
    """Records of a data set of the Hugging Face hub, or of its cache on this machine.

    Args:
        source: "org/name", or "org/name:config".

    Raises:
        RecipeError: it cannot be had.
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
        self._tables = {CALLED.get(split, split): table for split, table in found.items()}
        self.splits = tuple(self._tables)

    def records(self, split: str) -> Iterator[Record]:
        """Yield the records of a split."""
        for place, fields in enumerate(self._tables[split], start=1):
            yield Record(fields, f"{self._name} {split}, row {place}", split)

    def stamp(self, split: str) -> str:
        """Return the fingerprint that the library gives the table."""
        return str(self._tables[split]._fingerprint)


class Splits:
    """What is learned from, and what is held out.

    Args:
        options: where records come from.
        columns: names that the recipe gives to columns; a .tsv whose first line has one of them has a header.
        unit: what a record of a .txt file is.

    Raises:
        RecipeError: there are no such files, the hub gives nothing, or there is no such split.
    """

    def __init__(self, options: RecordOptions, columns: Sequence[str] = (), unit: Unit = "line") -> None:
        if not options.path:
            raise RecipeError(
                "task.path: required, and not given; expected a file, a folder with train.tsv and dev.tsv (or .csv, "
                ".jsonl, .json, .txt, .parquet), or a data set of the Hugging Face hub as org/name"
            )
        self._path = options.path
        self._columns = [name for name in (*columns, options.domain) if name]
        self._unit = unit
        data: Data = Files(options.path, self._columns, unit) if is_local(options.path) else Hub(options.path)
        if "train" not in data.splits:
            raise RecipeError(
                f"task.path: {options.path} has no training records, only {', '.join(data.splits)}; to measure a model "
                "on other data, set task.held_out, and leave task.path as it is"
            )
        self._share = 0.0 if options.held_out or "valid" in data.splits else options.valid
        self._parts = {"train": (data, "train"), "valid": self._measured(data, options.held_out)}

    def records(self, part: Part) -> Iterator[Record]:
        """Yield the records of a part.

        Raises:
            RecipeError: a row cannot be read, or there are none.
        """
        data, split = self._parts[part]
        empty = True
        for place, record in enumerate(data.records(split)):
            if not self._share or (place in self._held) == (part == "valid"):
                empty = False
                yield record
        if empty:
            raise self._empty(split)

    def first(self) -> Iterator[Record]:
        """Yield the first record of each part, by which to see early that columns are missing.

        Raises:
            RecipeError: it cannot be read, or there is none.
        """
        for data, split in self._parts.values():
            record = next(data.records(split), None)
            if record is None:
                raise self._empty(split)
            yield record

    def stamp(self, part: Part) -> str:
        """Return what changes when the records of a part do."""
        data, split = self._parts[part]
        return f"{data.stamp(split)} {part if self._share else ''} {self._share}"

    def _measured(self, data: Data, held_out: str) -> tuple[Data, str]:
        split = CALLED.get(held_out, held_out)
        if not held_out:
            return data, "train" if self._share else "valid"
        if split in data.splits:
            return data, split
        if not Path(held_out).exists():
            raise RecipeError(
                f"task.held_out: {held_out!r} is neither a file nor a split of {self._path}; "
                f"{near(held_out, data.splits)}"
            )
        other = Files(held_out, self._columns, self._unit, "task.held_out: ")
        if len(other.splits) > 1:
            raise RecipeError(
                f"task.held_out: {held_out} has the splits {', '.join(other.splits)}; name one file of it"
            )
        return other, other.splits[0]

    def _empty(self, split: str) -> RecipeError:
        return RecipeError(f"task.path: the {split} part of {self._path} has no records")

    @cached_property
    def _held(self) -> frozenset[int]:
        """Which training records are held out."""
        data, split = self._parts["train"]
        count = sum(1 for _ in data.records(split))
        if count < 2:
            raise RecipeError(
                f"task.path: {self._path} has {count} record(s), too few to hold some out; give it a validation split, "
                "or set task.held_out"
            )
        held = min(count - 1, max(1, round(count * self._share)))
        return frozenset(np.random.default_rng(0).permutation(count)[:held].tolist())


def of_file(path: Path, columns: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the records of one file, to predict on.

    Raises:
        RecipeError: there is no such file, a row cannot be read, or there are none.
    """
    empty = True
    for record in Files(str(path), columns, prefix="").records("train"):
        empty = False
        yield record
    if empty:
        raise RecipeError(f"{path} has no records")


def _by_split(root: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the files of each split, by the names of the files and of their folders."""
    found: dict[str, list[Path]] = {}
    for file in files:
        parts = (file.stem, *file.relative_to(root).parts[:-1])
        splits = [split for part in parts for name, split in CALLED.items() if _is_called(part.lower(), name)]
        if splits:
            found.setdefault(splits[0], []).append(file)
    return found or {"train": list(files)}


def _is_called(part: str, name: str) -> bool:
    """Return whether a file is called by the name, or is a numbered piece of it, as train-00001-of-00002."""
    return part == name or re.match(rf"{name}[-_.]\d", part) is not None
