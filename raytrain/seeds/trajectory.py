"""A fine-tune of any size as a file of a few kilobytes: what it started from, and each step's seeds and slopes."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from raytrain.errors import CheckpointError, RecipeError
from raytrain.files import write_whole

RECORD = np.dtype([("step", "<u4"), ("of", "<u2"), ("rate", "<f4"), ("seed", "<u8"), ("slope", "<f4")])
Records = NDArray[Any]
MAGIC = b"raytrain trajectory 2\n"


@dataclass(frozen=True, slots=True)
class Step:
    """What one step moved by.

    Attributes:
        step: counted from 0.
        rate: the learning rate.
        slopes: (seed, slope) of each direction; none if none was usable.
    """

    step: int
    rate: float
    slopes: Sequence[tuple[int, float]]


class Trajectory:
    """The file of a run that goes on: a line of JSON about its beginning, then 22 bytes for each direction.

    A step that moved nothing has one record too, of no directions, so that a step that is missing is seen.

    Args:
        path: the file.
        about: what a replay needs to know: "base", what the weights that it starts from are known by, "directions",
            what seeds stand for, and how they are moved.
        step: where the run stands. If it goes on, the file keeps its beginning, and what it holds from there on is
            dropped.

    Raises:
        RecipeError: the run goes on, and the file is not there, lacks a step, or is of a run that moves in another way.
        CheckpointError: it is no trajectory.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], step: int) -> None:
        before = np.empty(0, RECORD)
        if step:
            about, before = _continued(path, about, step)
        write_whole(path, MAGIC + json.dumps(about, sort_keys=True).encode() + b"\n" + before.tobytes())
        self._file: IO[bytes] = path.open("ab")

    def append(self, step: int, rate: float, slopes: Sequence[tuple[int, float]]) -> None:
        """Add a step; it is on its way to the disk when this returns."""
        records = [(step, len(slopes), rate, seed, slope) for seed, slope in slopes] or [(step, 0, rate, 0, 0.0)]
        self._file.write(np.array(records, RECORD).tobytes())
        self._file.flush()

    def keep(self) -> None:
        """Return when all steps so far are on the disk, as a checkpoint that counts on them asks for."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()


def _continued(path: Path, about: Mapping[str, Any], step: int) -> tuple[dict[str, Any], Records]:
    """Return what a run that goes on has in its file, up to a step.

    Raises:
        RecipeError: it has none, or the run now moves in another way, which the file could not say.
    """
    way_out = "; set directions.trajectory = false, or start another run"
    if not path.is_file():
        raise RecipeError(f"directions.trajectory: expected {path}, which the run should have kept so far{way_out}")
    kept, before = read(path)
    for name in ("space", "optimizer"):
        was, now = kept.get(name, {}), about[name]
        odd = [key for key in {**now, **was} if key != "lr" and was.get(key) != now.get(key)]  # lr is in each record
        if odd:
            raise RecipeError(
                f"directions.trajectory: expected {odd[0]} = {was.get(odd[0])!r} as the run began; "
                f"got {now.get(odd[0])!r}{way_out}"
            )
    if kept.get("directions") != about["directions"]:
        raise RecipeError(
            "directions.trajectory: expected the parameters that the run began to move, of the same types, each along "
            "directions as long as then; freeze.match, adapter, precision or a group's lr over optimizer.lr may be "
            f"others now{way_out}"
        )
    before = before[before["step"] < step]
    there = np.unique(before["step"])
    if len(there) < step:
        missing = next(place for place, found in enumerate([*there.tolist(), step]) if place != found)
        raise RecipeError(f"directions.trajectory: expected step {missing + 1} in {path}; it is not there{way_out}")
    return kept, before


def read(path: Path) -> tuple[dict[str, Any], Records]:
    """Return what a trajectory says of its beginning, and its records; a step that was cut off at the end is dropped.

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
        raise CheckpointError(
            f"{path}: this is not a trajectory, as zeroth-order runs write; set directions.trajectory = false to go on "
            "without one"
        ) from None
    records = np.frombuffer(rest[: len(rest) // RECORD.itemsize * RECORD.itemsize], RECORD)
    if len(records):
        last = records["step"] == records["step"][-1]
        records = records if last.sum() == max(1, records["of"][-1]) else records[~last]
    return about, records


def steps(records: Records) -> Iterator[Step]:
    """Yield the steps of a trajectory."""
    edges = np.flatnonzero(np.diff(records["step"].astype(np.int64), prepend=-1, append=-1))
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        part = records[first:last][: records["of"][first]]
        slopes = [(int(seed), float(slope)) for seed, slope in zip(part["seed"], part["slope"], strict=True)]
        yield Step(int(records["step"][first]), float(records["rate"][first]), slopes)
