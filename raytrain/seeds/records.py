"""The records of a trajectory: what each step moved by, with checksums, as bytes."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytrain.errors import CheckpointError
from raytrain.json_files import parse_json, verify_checksum

RECORD_DTYPE = np.dtype(
    [("step", "<u4"), ("of", "<u2"), ("rate", "<f4"), ("seed", "<u8"), ("slope", "<f4"), ("crc", "<u4")]
)
CRC_BYTES = 4
RecordArray = NDArray[Any]
TRAJECTORY_NAME = b"raytrain trajectory "
TRAJECTORY_FORMAT = 4
TRAJECTORY_MAGIC = TRAJECTORY_NAME + b"%d\n" % TRAJECTORY_FORMAT


@dataclass(frozen=True, slots=True)
class TrajectoryStep:
    """What one step moved by.

    Attributes:
        step: counted from 0.
        lr: the learning rate.
        projected_gradients: (seed, slope) of each direction; none if none was usable.
    """

    step: int
    lr: float
    projected_gradients: Sequence[tuple[int, float]]


def read_trajectory(path: Path) -> tuple[dict[str, Any], RecordArray]:
    """Return what a trajectory says of its beginning, and its records; a step that was cut off at the end is dropped.

    Raises:
        CheckpointError: the file is no trajectory, or damaged.
    """
    about, records, damaged = read_intact_records(path)
    if damaged:
        raise CheckpointError(
            f"{path}: the step of record {len(records) + 1} is not as it was written; take another copy of the file"
        )
    return about, records


def read_intact_records(path: Path) -> tuple[dict[str, Any], RecordArray, bool]:
    """Return the beginning, the records of the steps that are as they were written, and whether damaged ones follow."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not data.startswith(TRAJECTORY_MAGIC):
        raise CheckpointError(_not_ours(path, data))
    head, _, rest = data.removeprefix(TRAJECTORY_MAGIC).partition(b"\n")
    about = parse_json(verify_checksum(head, str(path), CheckpointError), dict[str, Any], str(path), CheckpointError)
    records = np.frombuffer(rest[: len(rest) // RECORD_DTYPE.itemsize * RECORD_DTYPE.itemsize], RECORD_DTYPE)
    right = records["crc"] == np.array(checksums(records, zlib.crc32(TRAJECTORY_MAGIC + head + b"\n")), np.uint32)
    changed = len(records) if right.all() else int(right.argmin())
    count, odd = _whole_steps(records[:changed])
    return about, records[:count], odd or changed < len(records)


def _whole_steps(records: RecordArray) -> tuple[int, bool]:
    """Return how many records belong to whole steps, and whether those behind are damaged and not just cut off."""
    if not len(records):
        return 0, False
    ahead = np.diff(records["step"].astype(np.int64), prepend=-1)
    starts = np.flatnonzero(ahead)
    counts, of = np.diff(starts, append=len(records)), records["of"][starts]
    sound = np.isfinite(records["rate"]) & np.isfinite(records["slope"])
    sound &= (records["of"] == np.repeat(of, counts)) & (ahead >= 0)
    whole = (counts == np.maximum(of, 1)) & np.logical_and.reduceat(sound, starts)
    if whole.all():
        return len(records), False
    first = int(whole.argmin())
    cut_off = first == len(starts) - 1 and counts[first] < of[first] and bool(sound[starts[first] :].all())
    return int(starts[first]), not cut_off


def _not_ours(path: Path, data: bytes) -> str:
    if data.startswith(TRAJECTORY_NAME):
        return (
            f"{path}: expected a trajectory of format {TRAJECTORY_FORMAT}; got another, of another version of raytrain; "
            "retrace it with that version"
        )
    return (
        f"{path}: this is not a trajectory, as zeroth-order runs write; set zo.trajectory = false to go on without one"
    )


def checksums(records: RecordArray, crc: int) -> list[int]:
    """Return the CRC-32 of each record and all before it.

    Args:
        records: their own checksums are not looked at.
        crc: of what comes before the first one.
    """
    data = memoryview(records.tobytes())
    places = range(0, len(data), RECORD_DTYPE.itemsize)
    return [crc := zlib.crc32(data[place : place + RECORD_DTYPE.itemsize - CRC_BYTES], crc) for place in places]


def trajectory_steps(records: RecordArray) -> Iterator[TrajectoryStep]:
    """Yield the steps of a trajectory."""
    edges = np.flatnonzero(np.diff(records["step"].astype(np.int64), prepend=-1, append=-1))
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        part = records[first:last][: records["of"][first]]
        slopes = [(int(seed), float(slope)) for seed, slope in zip(part["seed"], part["slope"], strict=True)]
        yield TrajectoryStep(int(records["step"][first]), float(records["rate"][first]), slopes)
