"""Training and held-out records of a task."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from raytrain.data.readers import Unit
from raytrain.data.records import SPLIT_ALIASES, HubRecords, LocalRecords, Record, RecordSource, is_local
from raytrain.errors import RecipeError
from raytrain.registry import suggest
from raytrain.tasks.options import RecordOptions

SplitName = Literal["train", "valid"]
"""Training and held-out split."""


class Splits:
    """The training and held-out records of a task, read lazily.

    Args:
        options: source of the records and how to split them.
        columns: names of columns in the recipe; a .tsv file whose first line has one of them has a header.
        unit: of a record in a .txt file.
    """

    def __init__(self, options: RecordOptions, columns: Sequence[str] = (), unit: Unit = "line") -> None:
        self._options = options
        self._columns = [name for name in (*columns, options.domain) if name]
        self._unit: Unit = unit

    def records(self, part: SplitName) -> Iterator[Record]:
        """Yield the records of a split.

        Raises:
            RecipeError: files or dataset cannot be read, there is no such split, or it has no records.
        """
        data, split = self._of(part)
        empty = True
        for place, record in enumerate(data.records(split)):
            if not self._held_out_ratio or (place in self._held_out_indices) == (part == "valid"):
                empty = False
                yield record
        if empty:
            raise self._empty(split)

    def first_records(self) -> Iterator[Record]:
        """Yield the first record of each split, for early checks of columns.

        Raises:
            RecipeError: as `records`.
        """
        for data, split in (self._of("train"), self._of("valid")):
            record = next(data.records(split), None)
            if record is None:
                raise self._empty(split)
            yield record

    def fingerprint(self, part: SplitName) -> str:
        """Return a string that changes when the records of a split do."""
        data, split = self._of(part)
        return f"{data.fingerprint(split)} {part if self._held_out_ratio else ''} {self._held_out_ratio}"

    def _of(self, part: SplitName) -> tuple[RecordSource, str]:
        """Return the source of the records of a split, and the split's name in it."""
        if part == "valid" and self._options.held_out:
            return self._held_out
        splits = self._data.splits
        if part == "valid" and not self._held_out_ratio:
            return self._data, next(split for split in ("valid", "test", *splits) if split in splits)
        if "train" not in splits:
            raise RecipeError(
                f"task.path: {self._options.path} has no training records, only {', '.join(splits)}; to measure a "
                "trained model on them, use raytrain evaluate RUN task.path=..."
            )
        if part == "train" and self._all_held_out:
            raise RecipeError(f"task.valid: 1 holds out all of {self._options.path}, and leaves nothing to learn from")
        return self._data, "train"

    @cached_property
    def _data(self) -> RecordSource:
        path = self._options.path
        if not path:
            raise RecipeError(
                "task.path: required, and not given; expected a file, a folder with train.tsv and dev.tsv (or .csv, "
                ".jsonl, .json, .txt, .parquet), or a data set of the Hugging Face hub as org/name"
            )
        return LocalRecords(path, self._columns, self._unit) if is_local(path) else HubRecords(path)

    @cached_property
    def _held_out(self) -> tuple[RecordSource, str]:
        held_out = self._options.held_out
        if Path(held_out).is_absolute() and Path(held_out).exists():
            other = LocalRecords(held_out, self._columns, self._unit, "task.held_out: ")
            if len(other.splits) > 1:
                raise RecipeError(
                    f"task.held_out: {held_out} has the splits {', '.join(other.splits)}; name one file of it"
                )
            return other, other.splits[0]
        split = SPLIT_ALIASES.get(held_out, held_out)
        if split in self._data.splits:
            return self._data, split
        raise RecipeError(
            f"task.held_out: {held_out!r} is neither a file nor a split of {self._options.path}; "
            f"{suggest(held_out, self._data.splits)}"
        )

    @property
    def _all_held_out(self) -> bool:
        return self._options.valid == 1 and not self._options.held_out and "valid" not in self._data.splits

    @cached_property
    def _held_out_ratio(self) -> float:
        """Fraction of the training records that is held out; 0 with a held-out split, or without training."""
        options = self._options
        others = options.held_out or options.valid == 1 or "valid" in self._data.splits
        return 0.0 if others else options.valid

    def _empty(self, split: str) -> RecipeError:
        return RecipeError(f"task.path: the {split} part of {self._options.path} has no records")

    @cached_property
    def _held_out_indices(self) -> frozenset[int]:
        """Indices of the training records that are held out."""
        data, split = self._of("train")
        count = sum(1 for _ in data.records(split))
        if count < 2:
            raise RecipeError(
                f"task.path: {self._options.path} has {count} record(s), too few to hold some out; give it a "
                "validation split, or set task.held_out"
            )
        held = min(count - 1, max(1, round(count * self._held_out_ratio)))
        return frozenset(np.random.default_rng(0).permutation(count)[:held].tolist())
