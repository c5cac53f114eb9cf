"""A fine-tune of any size as a file of a few kilobytes: what it started from, and each step's seeds and slopes."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from raytrain.errors import RecipeError
from raytrain.files import AppendOnlyFile, write_atomic
from raytrain.json_files import add_checksum
from raytrain.seeds.records import RECORD_DTYPE, TRAJECTORY_MAGIC, RecordArray, checksums, read_intact_records

MAX_DIRECTIONS = 2**16 - 1
"""Of one step."""


class Trajectory:
    """The file of a run that goes on: a line of JSON about its beginning, then 26 bytes for each direction.

    A step that moved nothing has one record too, of no directions, so that a step that is missing is seen. Each record
    ends in the CRC-32 of all before it, so that one that is changed, missing or of another file is seen too.

    Args:
        path: the file.
        header: what a replay needs to know: "base", what the weights that it starts from are known by, "directions",
            what seeds stand for, and how they are moved.
        step: where the run stands. If it goes on, the file keeps its beginning, and what it holds from there on is
            dropped.

    Raises:
        RecipeError: the run goes on, and the file is not there, lacks a step, or is of a run that moves in another way.
        CheckpointError: it is no trajectory.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], step: int) -> None:
        before = np.empty(0, RECORD_DTYPE)
        if step:
            header, before = _continued(path, header, step)
        head = TRAJECTORY_MAGIC + add_checksum(header) + b"\n"
        self._crc = int(before["crc"][-1]) if len(before) else zlib.crc32(head)
        write_atomic(path, head + before.tobytes())
        self._file = AppendOnlyFile(path)

    def append(self, step: int, lr: float, projected_gradients: Sequence[tuple[int, float]]) -> None:
        """Add a step.

        Raises:
            TrainingError: the file cannot be written.
        """
        rows = [(step, len(projected_gradients), lr, seed, slope, 0) for seed, slope in projected_gradients] or [
            (step, 0, lr, 0, 0.0, 0)
        ]
        records = np.array(rows, RECORD_DTYPE)
        for place, crc in enumerate(checksums(records, self._crc)):
            records["crc"][place] = self._crc = crc
        self._file.write(records.tobytes())

    def fsync(self) -> None:
        """Return when all steps so far are on the disk, as a checkpoint that counts on them asks for."""
        self._file.fsync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()


def _continued(path: Path, about: Mapping[str, Any], step: int) -> tuple[dict[str, Any], RecordArray]:
    """Return what a run that goes on has in its file, up to a step.

    Raises:
        RecipeError: it has none, or the run now moves in another way, which the file could not say.
    """
    way_out = "; set zo.trajectory = false, or start another run"
    if not path.is_file():
        raise RecipeError(f"zo.trajectory: expected {path}, which the run should have kept so far{way_out}")
    kept, before, _ = read_intact_records(path)  # what is damaged behind the steps that are needed does not matter
    for name in ("space", "optimizer"):
        was, now = kept.get(name, {}), about[name]
        odd = [key for key in {**now, **was} if key != "lr" and was.get(key) != now.get(key)]  # lr is in each record
        if odd:
            raise RecipeError(
                f"zo.trajectory: expected {odd[0]} = {was.get(odd[0])!r} as the run began; "
                f"got {now.get(odd[0])!r}{way_out}"
            )
    if kept.get("directions") != about["directions"]:
        raise RecipeError(
            "zo.trajectory: expected the parameters that the run began to move, of the same types, each along "
            "directions as long as then; freeze.match, adapter, precision or a group's lr over optimizer.lr may be "
            f"others now{way_out}"
        )
    before = before[before["step"] < step]
    there = np.unique(before["step"])
    if len(there) < step:
        missing = next(place for place, found in enumerate([*there.tolist(), step]) if place != found)
        raise RecipeError(f"zo.trajectory: expected step {missing + 1} in {path}; it is not there{way_out}")
    return kept, before
