"""Binary records of a trajectory: learning rates, seeds, projected gradients, checksums."""

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
    [("step", "<u4"), ("count", "<u2"), ("lr", "<f4"), ("seed", "<u8"), ("projected_gradient", "<f4"), ("crc", "<u4")]
)
CRC_BYTES = 4
RecordArray = NDArray[Any]
TRAJECTORY_NAME = b"raytrain trajectory "
TRAJECTORY_FORMAT = 4
TRAJECTORY_MAGIC = TRAJECTORY_NAME + b"%d\n" % TRAJECTORY_FORMAT


@dataclass(frozen=True, slots=True)
class TrajectoryStep:
    """The update of one step.

    Attributes:
        step: counted from 0.
        lr: the learning rate.
        projected_gradients: (seed, projected gradient) of each direction; empty if the step updated nothing.
    """

    step: int
    lr: float
    projected_gradients: Sequence[tuple[int, float]]


def read_trajectory(path: Path) -> tuple[dict[str, Any], RecordArray]:
    """Read the header and the records of a trajectory; a truncated last step is dropped.

    Raises:
        CheckpointError: the file is not a trajectory, or damaged.
    """
    about, records, damaged = read_intact_records(path)
    if damaged:
        raise CheckpointError(
            f"{path}: the step of record {len(records) + 1} changed since it was written; use another copy of the file"
        )
    return about, records


def read_intact_records(path: Path) -> tuple[dict[str, Any], RecordArray, bool]:
    """Return the header, the records of the leading intact steps, and whether damaged ones follow."""
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
    """Return (number of records in complete steps, whether the rest is damaged and not truncated)."""
    if not len(records):
        return 0, False
    ahead = np.diff(records["step"].astype(np.int64), prepend=-1)
    starts = np.flatnonzero(ahead)
    counts, expected = np.diff(starts, append=len(records)), records["count"][starts]
    sound = np.isfinite(records["lr"]) & np.isfinite(records["projected_gradient"])
    sound &= (records["count"] == np.repeat(expected, counts)) & (ahead >= 0)
    whole = (counts == np.maximum(expected, 1)) & np.logical_and.reduceat(sound, starts)
    if whole.all():
        return len(records), False
    first = int(whole.argmin())
    cut_off = first == len(starts) - 1 and counts[first] < expected[first] and bool(sound[starts[first] :].all())
    return int(starts[first]), not cut_off


def _not_ours(path: Path, data: bytes) -> str:
    if data.startswith(TRAJECTORY_NAME):
        return (
            f"{path}: expected a trajectory of format {TRAJECTORY_FORMAT}; got another, of another version of "
            "raytrain; replay it with that version"
        )
    return f"{path}: this is not a trajectory of a zeroth-order run; set zo.trajectory = false to continue without one"


def checksums(records: RecordArray, crc: int) -> list[int]:
    """Return the running CRC-32 after each record.

    Args:
        records: their stored checksums are ignored.
        crc: of the bytes before the first record.
    """
    data = memoryview(records.tobytes())
    places = range(0, len(data), RECORD_DTYPE.itemsize)
    return [crc := zlib.crc32(data[place : place + RECORD_DTYPE.itemsize - CRC_BYTES], crc) for place in places]


def trajectory_steps(records: RecordArray) -> Iterator[TrajectoryStep]:
    """Yield the steps of a trajectory in order."""
    edges = np.flatnonzero(np.diff(records["step"].astype(np.int64), prepend=-1, append=-1))
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        part = records[first:last][: records["count"][first]]
        pairs = [
            (int(seed), float(value)) for seed, value in zip(part["seed"], part["projected_gradient"], strict=True)
        ]
        yield TrajectoryStep(int(records["step"][first]), float(records["lr"][first]), pairs)
