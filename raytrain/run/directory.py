"""A run's folder: who may write there, and what is in it beside the checkpoints."""

import fcntl
import logging
import os
import platform
import socket
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from raytrain.errors import RaytrainError, RecipeError
from raytrain.files import append_line, make_folder, write_atomic
from raytrain.json_files import read_json, read_rows, to_json
from raytrain.run.result import Result

logger = logging.getLogger(__name__)

RESERVE_BYTES = 64 << 10
RAY_MARK = ".validate_storage_marker"
"""What Ray Train puts into the folder of checkpoints before it starts workers."""


@with_config(ConfigDict(extra="allow"))
class MetricsRow(TypedDict):
    """A row of ``metrics.jsonl``: of training, or with "valid" of an evaluation."""

    step: int
    samples: NotRequired[int]
    seconds: NotRequired[float]
    valid: NotRequired[dict[str, Any]]


@with_config(ConfigDict(extra="allow"))
class AttemptRow(TypedDict):
    """A row of ``attempts.jsonl``."""

    from_step: int


@with_config(ConfigDict(extra="allow"))
class RestartRow(TypedDict):
    """A row of ``restarts.jsonl``."""

    workers: dict[str, str]


ROWS: dict[str, Any] = {"metrics.jsonl": MetricsRow, "attempts.jsonl": AttemptRow, "restarts.jsonl": RestartRow}
"""What a file's rows must have; those of other files are any JSON objects."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run ended where starting its workers again would not help.

    Attributes:
        message: for the user.
        exit_status: of the command.
        trace: where in the code, if it is code that failed.
        host: the machine that it failed on.
    """

    message: str
    exit_status: int = 1
    trace: str = ""
    host: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """What training leaves in a run's folder.

    Attributes:
        attempts: how often workers found that the recipe fits and began.
        restarts: how often they had to be started again.
        checkpoints: their names.
    """

    attempts: int
    restarts: int
    checkpoints: frozenset[str]

    def trained(self, before: "Trace") -> bool:
        """Return whether there was training since `before`."""
        return self.restarts > before.restarts or self.checkpoints != before.checkpoints


class RunDirectory:
    """The files of a run.

    Args:
        path: the folder, absolute; workers on all machines must see it.
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
    def opened(self, *, resume: bool) -> Iterator[None]:
        """Hold the folder as the only command that uses it.

        A new run that is refused or interrupted leaves nothing behind, as long as there is nothing in its folder but
        what every run begins with. With one file more, of whatever kind of run, all of it stays.

        Args:
            resume: whether there must be a run already, or must not.

        Raises:
            RecipeError: there is one where none may be, or none where one must be, or another command uses it, or it
                cannot be written.
        """
        self._check(resume)
        with self._writing():
            new = make_folder(self.path)
        with self.locked("command", 0):
            self._check(resume)  # another command may have been quicker
            try:
                yield
            except (RecipeError, KeyboardInterrupt):
                if not resume:
                    self._discard(new)
                raise

    def begin(self, recipe: str) -> None:
        """Make the folder ready for the workers: what an earlier attempt asked for or ended with is forgotten.

        Args:
            recipe: TOML to leave beside a new run; that of a resumed run stays until it is known to fit.

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
        """Write `recipe.toml`, headed by the versions that run it."""
        write_atomic(self.recipe, f"# {versions()}\n{recipe}".encode())

    def announce(self, recipe: str, step: int, workers: list[dict[str, Any]]) -> None:
        """Note who trains from which step, by a recipe that fits the run: what there was of another can go.

        Args:
            recipe: TOML.
            step: where they begin.
            workers: what there is to say of each.
        """
        self.write_recipe(recipe)
        self.result.unlink(missing_ok=True)
        self.append(self.attempts, {"time": time.time(), "from_step": step, "workers": workers})

    def trace(self) -> "Trace":
        """Return what tells whether there was training."""
        checkpoints = [path.name for path in self.checkpoints.glob("step-*")]
        return Trace(len(rows(self.attempts)), len(rows(self.restarts)), frozenset(checkpoints))

    def _check(self, resume: bool) -> None:
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

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RecipeError(f"--out: cannot write to {self.path}: {error.strerror}") from error

    def _discard(self, new: Iterable[Path]) -> None:
        """Remove a run that has not begun: files by name, and folders that are empty then.

        Args:
            new: folders that were made for it, the inner ones first.
        """
        files = [self.recipe, self.attempts, self._failure, self._reserve, self._stop, self.checkpoints / RAY_MARK]
        files += [self._lock(who) for who in ("command", "worker")]
        if self.path.is_dir() and set(self.path.rglob("*")) <= {*files, self.checkpoints}:
            for file in files:
                file.unlink(missing_ok=True)
            for folder in (self.checkpoints, *new):
                with suppress(OSError):  # it is not there, or somebody else has put something there since
                    folder.rmdir()

    @contextmanager
    def locked(self, who: str, wait_seconds: float) -> Iterator[None]:
        """Hold the run as its only `who` ("command" or "worker"); the lock ends with the process.

        Raises:
            RecipeError: another process holds it and does not let go within `wait_seconds`.
        """
        with self._writing():
            file = self._lock(who).open("a+")
        with file:
            give_up = time.monotonic() + wait_seconds
            while not _take(file):
                if time.monotonic() > give_up:
                    file.seek(0)
                    holder = file.read() or "?"
                    raise RecipeError(f"{self.path} is in use by {who} process {holder}; wait for it or end it")
                time.sleep(0.1)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def request_stop(self) -> None:
        """Ask the workers to save and end after the step they are at."""
        self._stop.touch()

    def stop_requested(self) -> bool:
        """Return whether they were asked to."""
        return self._stop.exists()

    def record_failure(self, error: BaseException, worker: int) -> bool:
        """Leave word of why the run ends here, for the other workers and for the command; the first word stays.

        On a full disk there is room for it, because some was kept.

        Returns:
            Whether there is word; a machine that does not see the folder cannot leave any.
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
        """Return what `record_failure` left, waiting for it a little; it says where, unless on this machine.

        Raises:
            TrainingError: the file is damaged.
        """
        give_up = time.monotonic() + wait_seconds
        while not self._failure.exists():
            if time.monotonic() >= give_up:
                return None
            time.sleep(0.05)
        failure = read_json(self._failure, Failure)
        return replace(failure, message=failure.message + elsewhere(failure.host))

    def write_result(self, result: Result) -> None:
        """Write `result.json`."""
        write_atomic(self.result, to_json(asdict(result), indent=2).encode() + b"\n")

    def append(self, file: Path, row: dict[str, Any]) -> None:
        """Add a line to one of the ``.jsonl`` files; it is on the disk when this returns."""
        append_line(file, to_json(row))


def _take(file: IO[str]) -> bool:
    """Lock a file if nobody else holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def elsewhere(host: str) -> str:
    """Return " (on HOST)", for the end of a message, unless that is this machine or not known."""
    return f" (on {host})" if host not in ("", socket.gethostname()) else ""


def versions() -> str:
    """Return what a run was made with, as "raytrain 0.1.0, ray 2.55.1, ..."."""
    packages = [f"{name} {version(name)}" for name in ("raytrain", "ray", "torch", "transformers", "numpy")]
    return ", ".join([*packages, f"python {platform.python_version()}"])


def rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``.jsonl`` file; lines that are none are left out, and said once.

    A last line that has no end is being written, or was when its process was killed.
    """
    if not file.is_file():
        return []
    found, damaged = read_rows(file, ROWS.get(file.name, dict[str, Any]))
    if damaged:
        _warn_of_damage(file, damaged)
    return found


@cache  # once for each state of a file
def _warn_of_damage(file: Path, damaged: int) -> None:
    logger.warning("%s: %d line(s) are torn or damaged and are left out", file, damaged)
