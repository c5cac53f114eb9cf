"""The folder of a run: locks, and all files but the checkpoints."""

import fcntl
import logging
import os
import platform
import socket
import time
import tomllib
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from pydantic import ConfigDict, with_config

from raytrain.errors import RaytrainError, RecipeError
from raytrain.files import append_line, make_folder, write_atomic
from raytrain.json_files import read_json, to_json
from raytrain.kinds import kind_entry_points, load_kind
from raytrain.run.result import Result
from raytrain.run.rows import read_jsonl

logger = logging.getLogger(__name__)

RESERVE_BYTES = 64 << 10
GLANCE_SECONDS = 0.5
"""Longest time that a check for a folder in use holds its lock."""
RAY_MARK = ".validate_storage_marker"
"""What Ray Train puts into the folder of checkpoints before it starts workers."""
KILLED_MARKS = (".token-*", "hang-worker-*.txt")
"""What workers that are killed before the first step leave, empty."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True)
class Failure:
    """A failure of a run that a restart would repeat.

    Attributes:
        message: for the user.
        exit_status: of the command.
        trace: traceback, if code failed.
        host: on which it failed.
    """

    message: str
    exit_status: int = 1
    trace: str = ""
    host: str = ""


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """Traces of training in a run's folder.

    Attributes:
        attempts: number of attempts that started to train.
        restarts: number of restarts.
        checkpoints: names.
    """

    attempts: int
    restarts: int
    checkpoints: frozenset[str]

    def has_trained_since(self, before: "RunSnapshot") -> bool:
        """Return whether there was training since `before`."""
        return self.restarts > before.restarts or self.checkpoints != before.checkpoints


class RunDirectory:
    """The files of a run.

    Args:
        path: absolute path of the folder, which workers on all machines must see.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.toml"
        self.metrics = path / "metrics.jsonl"
        self.result = path / "result.json"
        self.attempts = path / "attempts.jsonl"
        self.restarts = path / "restarts.jsonl"
        self.checkpoints = path / "checkpoints"
        self.trajectory = path / "trajectory.bin"
        self._failure = path / "failure.json"
        self._reserve = path / ".reserve"
        self._stop = path / "stop"

    @contextmanager
    def session(self, *, resume: bool) -> Iterator[None]:
        """Lock the folder for this command.

        A new run that is refused or interrupted leaves nothing behind, as long as there is nothing in its folder but
        what every run begins with. With one file more, of whatever kind of run, all of it stays.

        Args:
            resume: whether there must be a run already, or must not.

        Raises:
            RecipeError: there is one where none may be, or none where one must be, or another command uses it, or it
                cannot be written.
        """
        if self.in_use():  # which for a new run is more to the point than that there is one
            raise RecipeError(self._used_by("command", self._lock("command").read_text()))
        self._check(resume)
        with self._writing():
            new = make_folder(self.path)
        with self.locked("command", GLANCE_SECONDS):
            self._check(resume)  # another command may have been quicker
            try:
                yield
            except (RecipeError, KeyboardInterrupt):
                if not resume:
                    self._discard(new)
                raise

    def prepare(self, recipe: str) -> None:
        """Prepare the folder for the workers: remove stop requests and failures of earlier attempts.

        Args:
            recipe: TOML of a new run; that of a resumed run stays until the new one is known to fit.

        Raises:
            RecipeError: the folder cannot be written.
        """
        with self._writing():
            make_folder(self.checkpoints)
            for leftover in (self._failure, self._stop):
                leftover.unlink(missing_ok=True)
            if not self.recipe.is_file():
                self.write_recipe(recipe)
            write_atomic(self._reserve, bytes(RESERVE_BYTES))

    def write_recipe(self, recipe: str) -> None:
        """Write `recipe.toml`, headed by the versions that run it: ours, and what its kind requires."""
        kind = tomllib.loads(recipe).get("kind")
        requires = load_kind(kind).requires if kind in kind_entry_points() else ()
        write_atomic(self.recipe, f"# {package_versions(requires)}\n{recipe}".encode())

    def record_attempt(self, recipe: str, step: int, workers: list[dict[str, Any]]) -> None:
        """Record an attempt whose recipe fits the run: its recipe replaces the old one, and an old result is removed.

        Args:
            recipe: TOML.
            step: first step.
            workers: process and host of each.
        """
        self.write_recipe(recipe)
        self.result.unlink(missing_ok=True)
        self.append(self.attempts, {"time": time.time(), "from_step": step, "workers": workers})

    def snapshot(self) -> "RunSnapshot":
        """Return a snapshot, to tell later whether there was training."""
        checkpoints = [path.name for path in self.checkpoints.glob("step-*")]
        return RunSnapshot(len(read_jsonl(self.attempts)), len(read_jsonl(self.restarts)), frozenset(checkpoints))

    def _check(self, resume: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RecipeError(f"--out: {self.path} is a file, and a run needs a folder; name another")
        if resume and not self.recipe.is_file():
            raise RecipeError(f"--resume: there is no run in {self.path}; leave --resume out to start one")
        if (
            not resume
            and self.path.is_dir()
            and any(path.name != self._lock("command").name for path in self.path.iterdir())
        ):
            raise RecipeError(
                f"--out: {self.path} is not empty; add --resume to continue the run in it, or name another folder"
            )

    def _lock(self, who: str) -> Path:
        return self.path / f".{who}.lock"

    def _used_by(self, who: str, pid: str) -> str:
        """Return the message that another process works in the folder."""
        ending = f"wait for it, end it (kill {pid or '?'}), or name another folder"
        return f"--out: {self.path} is in use by {who} process {pid or '?'}; {ending}"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RecipeError(f"--out: cannot write to {self.path}: {error.strerror}") from error

    def _discard(self, new: Iterable[Path]) -> None:
        """Remove a run that has not started: its files by name, and then empty folders.

        Args:
            new: folders that were created for it, the inner ones first.
        """
        files = [self.recipe, self.attempts, self._failure, self._reserve, self._stop, self.checkpoints / RAY_MARK]
        files += [self._lock(who) for who in ("command", "worker")]
        files += [file for name in KILLED_MARKS for file in self.path.glob(name) if not file.stat().st_size]
        if self.path.is_dir() and set(self.path.rglob("*")) <= {*files, self.checkpoints}:
            for file in files:
                file.unlink(missing_ok=True)
            for folder in (self.checkpoints, *new):
                with suppress(OSError):  # it is not there, or somebody else has put something there since
                    folder.rmdir()

    @contextmanager
    def locked(self, who: str, wait_seconds: float) -> Iterator[None]:
        """Lock the run for its `who` ("command" or "worker"); the lock ends with the process.

        Raises:
            RecipeError: another process holds it and does not let go within `wait_seconds`.
        """
        with self._writing():
            file = self._lock(who).open("a+")
        with file:
            give_up = time.monotonic() + wait_seconds
            while not _try_lock(file):
                if time.monotonic() > give_up:
                    file.seek(0)
                    raise RecipeError(self._used_by(who, file.read()))
                time.sleep(0.1)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def in_use(self) -> bool:
        """Return whether a command works in the folder."""
        try:
            with self._lock("command").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except BlockingIOError:
            return True
        return False

    def request_stop(self) -> None:
        """Request the workers to checkpoint and end after the current step."""
        self._stop.touch()

    def stop_requested(self) -> bool:
        """Return whether a stop was requested."""
        return self._stop.exists()

    def record_failure(self, error: BaseException, worker: int) -> bool:
        """Record a failure for the other workers and the command; the first one stays.

        On a full disk, a reserve of space is freed for it.

        Returns:
            Whether a failure is recorded; a machine that does not see the folder cannot record one.
        """
        if not self.path.is_dir():
            return False
        self._reserve.unlink(missing_ok=True)
        host = socket.gethostname()
        if isinstance(error, RaytrainError):
            failure = Failure(str(error), error.exit_status, host=host)
        else:
            lines = "".join(traceback.format_exception(error))
            failure = Failure(f"worker {worker}: {type(error).__name__}: {error}", trace=lines, host=host)
        if not self._failure.exists():
            write_atomic(self._failure, to_json(asdict(failure)).encode())
        return True

    def failure(self, wait_seconds: float = 0.0) -> Failure | None:
        """Return the recorded failure, after waiting for up to `wait_seconds`; its message names another host.

        Raises:
            TrainingError: the file is damaged.
        """
        give_up = time.monotonic() + wait_seconds
        while not self._failure.exists():
            if time.monotonic() >= give_up:
                return None
            time.sleep(0.05)
        failure = read_json(self._failure, Failure)
        return replace(failure, message=failure.message + host_suffix(failure.host))

    def write_result(self, result: Result) -> None:
        """Write `result.json`."""
        written = asdict(replace(result, folder=str(self.path)))
        write_atomic(self.result, to_json(written, indent=2).encode() + b"\n")

    def append(self, file: Path, row: dict[str, Any]) -> None:
        """Append a row to one of the ``.jsonl`` files, and flush it to disk."""
        append_line(file, to_json(row))


def _try_lock(file: IO[str]) -> bool:
    """Lock a file, unless another process holds it; return whether it worked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def host_suffix(host: str) -> str:
    """Return " (on HOST)" for the end of a message; "" for this machine or an unknown host."""
    return f" (on {host})" if host not in ("", socket.gethostname()) else ""


def package_versions(requires: Iterable[str] = ()) -> str:
    """Return what a run was made with, as "raytrain 0.1.0, ray 2.55.1, ...".

    Args:
        requires: distributions that are named beside those that every run uses.
    """
    packages = [f"{name} {_version(name)}" for name in ("raytrain", "ray", "torch", "numpy", *requires)]
    return ", ".join([*packages, f"python {platform.python_version()}"])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
