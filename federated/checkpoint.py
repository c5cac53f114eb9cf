"""The server's state in a file that is complete or absent.

`round-00000012.state` is the SHA-256 of all that follows, then the arrays and, as JSON, what the run is known by, in
the format of safetensors. The file is written under another name, flushed and renamed, and its folder is flushed. The
two newest are kept, so a damaged one costs a round.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from raytrain.errors import CheckpointError, RecipeError
from raytrain.files import fsync_path, write_atomic

FORMAT = "raytrain federated server 1"
DIGEST_BYTES = 32
KEPT_STATES = 2

State = dict[str, NDArray[Any]]


def write_checkpoint(
    folder: Path, round_number: int, about: Mapping[str, str], state: Mapping[str, NDArray[Any]]
) -> None:
    """Write the state after a round, and remove all but the newest ones.

    Raises:
        CheckpointError: it cannot be written.
    """
    data = save({name: np.asarray(value, order="C") for name, value in state.items()}, {"format": FORMAT, **about})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"round-{round_number:08d}.state", hashlib.sha256(data).digest() + data)
        fsync_path(folder)
        for old in _listed(folder)[:-KEPT_STATES]:
            old.unlink()
    except OSError as error:
        raise CheckpointError(f"{folder}: the state after round {round_number} cannot be written: {error}") from error


def read_newest(folder: Path) -> tuple[dict[str, str], State] | None:
    """Return the newest state in a folder that is as it was written, and what its run is known by; None without any.

    Raises:
        CheckpointError: there are only damaged ones.
    """
    for leftover in folder.glob(".round-*.tmp"):
        leftover.unlink()
    problems = []
    for path in reversed(_listed(folder)):
        try:
            return _read(path)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("no state of this run can be read:\n" + "\n".join(problems))
    return None


def check_same_run(folder: Path, expected: Mapping[str, str], got: Mapping[str, str]) -> None:
    """Refuse the state of another run.

    Args:
        folder: that holds it.
        expected: what the run is known by.
        got: what the state says.

    Raises:
        RecipeError: it says something else.
    """
    if odd := [name for name, value in expected.items() if got.get(name) != value]:
        raise RecipeError(
            f"{folder}: expected a run with {odd[0]} = {expected[odd[0]]}; got {got.get(odd[0])}; "
            "begin another run, or keep what this one began with"
        )


def newest_state(folder: Path) -> Path | None:
    """Return the file of the newest state in a folder, which may be damaged; None without any."""
    return next(reversed(_listed(folder)), None)


def _read(path: Path) -> tuple[dict[str, str], State]:
    try:
        content = path.read_bytes()
        digest, data = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != digest:
            raise CheckpointError(f"{path}: expected the content that was written; it is cut short or changed")
        length = int.from_bytes(data[:8], "little")
        about: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
        if about.pop("format") != FORMAT:
            raise CheckpointError(f"{path}: expected {FORMAT!r}")
        return about, load(data)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: expected {FORMAT!r}: {error}") from error


def _listed(folder: Path) -> list[Path]:
    """Return the states in a folder, oldest first."""
    return sorted(path for path in folder.glob("round-*.state") if re.fullmatch(r"round-\d{8,}\.state", path.name))
