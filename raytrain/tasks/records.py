"""Records to learn from, and records that are held out to measure on."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field

from raytrain.errors import RecipeError
from raytrain.names import near
from raytrain.recipe import Options
from raytrain.tasks.readers import Unit
from raytrain.tasks.sources import CALLED, Data, Files, Hub, Record, Source, absolute, is_local

Part = Literal["train", "valid"]
"""What is learned from, and what is held out to measure on."""


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
    held_out: Annotated[str, AfterValidator(lambda value: value if value in CALLED else absolute(value))] = ""
    domain: str = ""


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
