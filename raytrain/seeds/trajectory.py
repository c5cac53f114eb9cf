"""A fine-tune of any size as a file of a few kilobytes: what it started from, and each step's seeds and slopes."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from raytrain.errors import CheckpointError

RECORD = np.dtype([("step", "<u4"), ("rate", "<f4"), ("seed", "<u8"), ("slope", "<f4")])
MAGIC = b"raytrain trajectory 1\n"


@dataclass(frozen=True, slots=True)
class Step:
    """What one step moved by.

    Attributes:
        step: counted from 0.
        rate: the learning rate.
        slopes: (seed, slope) of each direction.
    """

    step: int
    rate: float
    slopes: Sequence[tuple[int, float]]


class Trajectory:
    """The file of a run that goes on: a line of JSON about its beginning, then 20 bytes for each direction.

    Args:
        path: the file.
        about: what a replay needs to know: "base", the digest of the weights that it starts from, "first", the step
            that they are of, and how they are moved. A file that is there keeps its own.
        step: where the run stands; what the file holds from there on is dropped.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], step: int) -> None:
        before = np.empty(0, RECORD)
        if step and path.is_file():
            about, before = read(path)
        self._file: IO[bytes] = path.open("wb")
        self._file.write(MAGIC + json.dumps(about, sort_keys=True).encode() + b"\n")
        self._file.write(before[before["step"] < step].tobytes())
        self._file.flush()

    def append(self, step: int, rate: float, slopes: Sequence[tuple[int, float]]) -> None:
        """Add a step; it is on its way to the disk when this returns."""
        records = np.array([(step, rate, seed, slope) for seed, slope in slopes], RECORD)
        self._file.write(records.tobytes())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()


def read(path: Path) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """Return what a trajectory says of its beginning, and its records; one that was cut off at the end is dropped.

    Raises:
        CheckpointError: the file is no trajectory.
    """
    data = path.read_bytes()
    head, _, rest = data.removeprefix(MAGIC).partition(b"\n")
    try:
        if not data.startswith(MAGIC):
            raise ValueError
        about = json.loads(head)
    except ValueError:
        raise CheckpointError(f"{path}: this is not a trajectory, as zeroth-order runs write") from None
    return about, np.frombuffer(rest[: len(rest) // RECORD.itemsize * RECORD.itemsize], RECORD)


def steps(records: np.ndarray[Any, Any]) -> Iterator[Step]:
    """Yield the steps of a trajectory."""
    edges = np.flatnonzero(np.diff(records["step"].astype(np.int64), prepend=-1, append=-1))
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        part = records[first:last]
        slopes = [(int(seed), float(slope)) for seed, slope in zip(part["seed"], part["slope"], strict=True)]
        yield Step(int(part["step"][0]), float(part["rate"][0]), slopes)
