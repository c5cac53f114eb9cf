"""Checkpoints: the state of a run in a folder, written atomically.

``step-00000100/`` holds a file of tensors for each replica that has any (safetensors) and ``manifest.json``: the
progress, the metrics, the plain part of the state, the size and hash of every file, and a hash of all that. Replicas
write into a hidden folder, the first one writes the manifest last and renames the folder. Nothing is ever unpickled.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from raytrain.errors import CheckpointError
from raytrain.files import file_digest, fsync_path, read_bytes, write_atomic
from raytrain.json_files import add_checksum, parse_json, verify_checksum
from raytrain.serialization import canonical_json, join_tensors, split_tensors, tensor_paths, to_savable
from raytrain.sync.averaging import Averager

CHECKPOINT_FORMAT = 3
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 30
"""A manifest names each tensor of each replica."""


class _Part(BaseModel, frozen=True, extra="forbid"):
    """A replica's part in a manifest: its file, None without tensors, and the rest of its state."""

    file: Annotated[str, Field(pattern=r"^rank-\d{5}\.safetensors$")] | None
    bytes: int = 0
    sha256: str = ""
    state: Any


class _Progress(BaseModel, frozen=True, extra="allow"):
    """The fields of a run's progress that a checkpoint uses."""

    step: int = Field(ge=0)
    best_step: int = Field(ge=0)


class _Contents(BaseModel, frozen=True, extra="forbid"):
    """The contents of a manifest file."""

    format: int
    progress: _Progress
    metrics: dict[str, float]
    parts: list[_Part] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checkpoint's manifest.

    Attributes:
        path: folder of the checkpoint.
        progress: fields of `raytrain.training.replica.Progress`.
        metrics: of the evaluation at this step; empty without one.
        world_size: number of replicas that wrote it.
    """

    path: Path
    progress: dict[str, Any]
    metrics: dict[str, float]
    world_size: int

    @property
    def step(self) -> int:
        """The optimizer steps done."""
        return int(self.progress["step"])


class CheckpointStore:
    """The checkpoints of a run.

    Args:
        folder: of the checkpoints, which every replica sees.
        keep: newest checkpoints to keep, beside the best one.
        averager: over the replicas, which all call the same methods together.
    """

    def __init__(self, folder: Path, keep: int, averager: Averager) -> None:
        self._folder = folder
        self._keep = keep
        self.averager = averager

    def clean(self) -> None:
        """Restore a checkpoint that a killed attempt was replacing, and remove partial ones.

        Only for replicas that are about to write.
        """
        if self.averager.transport.rank == 0:
            for replaced in self._folder.glob(".step-*.replaced"):
                if not (place := self._folder / replaced.stem.removeprefix(".")).exists():
                    replaced.rename(place)
            for leftover in self._folder.glob(".step-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, state: Mapping[str, Any], progress: Mapping[str, Any]) -> Path:
        """Write a checkpoint and return its folder.

        Args:
            state: of this replica; that of the first one includes the shared state.
            progress: equal on all replicas.

        Raises:
            CheckpointError: on every replica, if one of them could not write; no incomplete checkpoint is left.
        """
        rank = self.averager.transport.rank
        name = step_name(progress["step"])
        aside = self._folder / f".{name}.partial"
        parts = [json.loads(part) for part in self.averager.all_gather_bytes(_write_part(aside, rank, state))]
        failure = next((part["error"] for part in parts if "error" in part), None)
        if rank == 0 and failure is None:
            manifest = {"format": CHECKPOINT_FORMAT, "progress": progress, "metrics": {}, "parts": parts}
            failure = self._complete(aside, name, manifest)
        self._agree(name, failure)
        return self._folder / name

    def save_metrics(self, progress: Mapping[str, Any], metrics: Mapping[str, float]) -> Path:
        """Replace progress and metrics in the checkpoint of this step.

        Raises:
            CheckpointError: on every replica, if it could not be written; the checkpoint is then as it was.
        """
        name, failure = step_name(progress["step"]), None
        if self.averager.transport.rank == 0:
            try:
                manifest = {**_contents(self._folder / name).model_dump(), "progress": progress, "metrics": metrics}
                write_atomic(self._folder / name / MANIFEST, add_checksum(manifest))
                self._rotate(name, progress["best_step"])
            except (OSError, CheckpointError) as error:
                failure = f"worker 0: {error}"
        self._agree(name, failure)
        return self._folder / name

    def newest(self) -> Manifest | None:
        """Return the newest intact checkpoint; the first replica decides for all.

        Raises:
            CheckpointError: there are checkpoints, and none of them is complete.
        """
        verdict = self._find() if self.averager.transport.rank == 0 else {}
        verdict = json.loads(self.averager.all_gather_bytes(json.dumps(verdict).encode())[0])
        if "error" in verdict:
            raise CheckpointError(verdict["error"])
        return read_manifest(self._folder / verdict["name"]) if "name" in verdict else None

    def _find(self) -> dict[str, str]:
        problems = []
        for path in reversed(list_checkpoints(self._folder)):
            try:
                verify_checkpoint(path)
            except CheckpointError as error:
                problems.append(str(error))
            else:
                return {"name": path.name}
        return {"error": "no checkpoint of this run can be read:\n" + "\n".join(problems)} if problems else {}

    def _complete(self, aside: Path, name: str, manifest: Mapping[str, Any]) -> str | None:
        """Write the manifest, rename the folder and remove old checkpoints; return an error message, if any."""
        try:
            write_atomic(aside / MANIFEST, add_checksum(manifest))
            replaced = self._hidden(self._folder / name, "replaced")  # one of the same step, which may be the only one
            aside.rename(self._folder / name)
            fsync_path(self._folder)
            shutil.rmtree(replaced, ignore_errors=True)
            self._rotate(name, manifest["progress"]["best_step"])
        except OSError as error:
            return f"worker 0: {error}"
        return None

    def _rotate(self, name: str, best_step: int) -> None:
        """Remove all but the newest and the best checkpoints; those newer than `name` are of a run that went back."""
        newest = [path for path in list_checkpoints(self._folder) if path.name <= name][-self._keep :]
        for path in list_checkpoints(self._folder):
            if path not in newest and path.name != step_name(best_step):
                shutil.rmtree(self._hidden(path, "removed"), ignore_errors=True)

    def _hidden(self, path: Path, why: str) -> Path:
        """Rename a checkpoint's folder, if it exists, so that nobody takes its remains for a checkpoint."""
        hidden = self._folder / f".{path.name}.{why}"
        if path.exists():
            shutil.rmtree(hidden, ignore_errors=True)
            path.rename(hidden)
        return hidden

    def _agree(self, name: str, failure: str | None) -> None:
        """Raise on every replica if the first one failed."""
        failure = json.loads(self.averager.all_gather_bytes(json.dumps(failure).encode())[0])
        if failure is not None:
            if self.averager.transport.rank == 0:
                shutil.rmtree(self._folder / f".{name}.partial", ignore_errors=True)
            raise CheckpointError(f"checkpoint {name} could not be written to {self._folder}: {failure}")


def step_name(step: int) -> str:
    """Return the name of the folder of the checkpoint at `step`."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of the checkpoint at `path`.

    Raises:
        CheckpointError: there is none, or it is not one of ours.
    """
    contents = _contents(path)
    return Manifest(path, contents.progress.model_dump(), contents.metrics, len(contents.parts))


def verify_checkpoint(path: Path) -> None:
    """Check that every file of a checkpoint is unchanged.

    Raises:
        CheckpointError: one is missing, cut short or changed.
    """
    for part in _contents(path).parts:
        _verify_part(path, part)


def load_part(path: Path, rank: int) -> Any:
    """Return the state that replica `rank` saved.

    Raises:
        CheckpointError: there is none, or a file is missing, cut short or changed.
    """
    parts = _contents(path).parts
    if rank >= len(parts):
        raise CheckpointError(f"{path}: expected a part of replica {rank}; got parts of {len(parts)} replicas")
    part = parts[rank]
    _verify_part(path, part)
    with checkpoint_errors(path):
        return join_tensors(part.state, load_file(path / part.file) if part.file else {})


@contextmanager
def checkpoint_errors(path: object) -> Iterator[None]:
    """Turn what goes wrong with the state of a checkpoint inside the `with` block into one error.

    Raises:
        CheckpointError: the state is not one that the model, the optimizer and the synchroniser saved.
    """
    try:
        yield
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: what it holds is not the state that this run saves: {type(error).__name__}: {error}; use another "
            "checkpoint of the run"
        ) from error


def _write_part(aside: Path, rank: int, state: Mapping[str, Any]) -> bytes:
    """Write the tensors of `state`, and return its entry in the manifest as JSON, or an error."""
    skeleton, tensors = split_tensors(state)
    try:
        aside.mkdir(parents=True, exist_ok=True)
        if not tensors:
            return canonical_json({"file": None, "state": skeleton})
        file = aside / f"rank-{rank:05d}.safetensors"
        save_file(to_savable(tensors), file)
        fsync_path(file)
        part = {"file": file.name, "bytes": file.stat().st_size, "sha256": file_digest(file), "state": skeleton}
    except (OSError, SafetensorError) as error:
        return canonical_json({"error": f"worker {rank}: {error}"})
    return canonical_json(part)


def _verify_part(path: Path, part: _Part) -> None:
    """Check that the file of a part is unchanged, and has the tensors that the manifest names."""
    if part.file is None:
        found = set()
    else:
        file = path / part.file
        _verify_file(file, part)
        with checkpoint_errors(path), safe_open(file, "pt") as tensors:
            found = set(tensors.keys())
    if found != tensor_paths(part.state):
        raise CheckpointError(f"{path}: its manifest and its files name different tensors; use another checkpoint")


def _verify_file(file: Path, part: _Part) -> None:
    try:
        size = file.stat().st_size if file.is_file() and not file.is_symlink() else -1
        right = size == part.bytes and file_digest(file) == part.sha256
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}; use another checkpoint of the run") from error
    if size != part.bytes:
        found = "is missing" if size < 0 else f"has {size} bytes"
        raise CheckpointError(
            f"{file}: {found} where {part.bytes} bytes were written; use another checkpoint of the run"
        )
    if not right:
        raise CheckpointError(f"{file}: its contents changed since it was written; use another checkpoint of the run")


def _contents(path: Path) -> _Contents:
    """Return the contents of the manifest at `path`."""
    file = path / MANIFEST
    data = read_bytes(file, CheckpointError, MAX_MANIFEST_BYTES)
    found = re.match(rb'\{"format": (\d{1,9})\b', data)
    if found and int(found[1]) != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{file}: expected a checkpoint of format {CHECKPOINT_FORMAT}; this one has format {int(found[1])}, of "
            "another version of raytrain: resume the run with that version, or start another"
        )
    content = verify_checksum(data, str(file), CheckpointError)
    return parse_json(content, _Contents, str(file), CheckpointError, MAX_MANIFEST_BYTES)
