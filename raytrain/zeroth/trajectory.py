"""The update log of a zeroth-order run: seeds, projected gradients, learning rates; kilobytes."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from raytrain.errors import RecipeError
from raytrain.files import AppendOnlyFile, write_atomic
from raytrain.json_files import add_checksum
from raytrain.seeds.records import RECORD_DTYPE, TRAJECTORY_MAGIC, RecordArray, checksums, read_intact_records


class Trajectory:
    """Append-only file of a run's updates: a line of JSON, the header, then 26 bytes for each direction.

    A step without an update has one record with a count of 0, so that a missing step is noticed. Each record ends in
    the CRC-32 of the file up to it, so that a changed, missing or foreign record is noticed too.

    Args:
        path: the file.
        header: from `trajectory_header`.
        step: number of completed steps. If it is not 0, the file keeps its header and the records of these steps; later
            records are dropped.

    Raises:
        RecipeError: a resumed run has no such file, the file lacks a step, or directions or optimizer changed.
        CheckpointError: the file is not a trajectory.
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
        """Append a step.

        Raises:
            TrainingError: the file cannot be written.
        """
        rows = [(step, len(projected_gradients), lr, seed, value, 0) for seed, value in projected_gradients] or [
            (step, 0, lr, 0, 0.0, 0)
        ]
        records = np.array(rows, RECORD_DTYPE)
        for index, crc in enumerate(checksums(records, self._crc)):
            records["crc"][index] = self._crc = crc
        self._file.write(records.tobytes())

    def fsync(self) -> None:
        """Flush all appended steps to the disk, before a checkpoint that relies on them."""
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


def _continued(path: Path, header: Mapping[str, Any], step: int) -> tuple[dict[str, Any], RecordArray]:
    """Return the header and the records of the completed steps in a resumed run's file.

    Raises:
        RecipeError: there is no file, it lacks a step, or the run's directions or optimizer changed.
    """
    way_out = "; set zo.trajectory = false, or start a new run"
    if not path.is_file():
        raise RecipeError(f"zo.trajectory: expected {path} with the steps so far; there is no such file{way_out}")
    kept, before, _ = read_intact_records(path)  # damage after the completed steps does not matter
    for name in ("zo", "optimizer"):
        was, now = kept.get(name, {}), header[name]
        odd = [key for key in {**now, **was} if key != "lr" and was.get(key) != now.get(key)]  # each record has its lr
        if odd:
            raise RecipeError(
                f"zo.trajectory: expected {odd[0]} = {was.get(odd[0])!r} as at the start of the run; "
                f"got {now.get(odd[0])!r}{way_out}"
            )
    if kept.get("directions") != header["directions"]:
        raise RecipeError(
            "zo.trajectory: expected the same trainable parameters, types and scales of directions as at the "
            "start of the run; freeze.match, adapter, precision or a group's lr_scale may have changed"
            f"{way_out}"
        )
    before = before[before["step"] < step]
    found = np.unique(before["step"])
    if len(found) < step:
        missing = next(index for index, each in enumerate([*found.tolist(), step]) if index != each)
        raise RecipeError(f"zo.trajectory: expected step {missing + 1} in {path}; it is missing{way_out}")
    return kept, before
