"""Progress of a run for the user, read from its files: a bar on a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from raytrain.json_files import parse_rows
from raytrain.run.directory import RunDirectory
from raytrain.run.result import Result
from raytrain.run.rows import ROW_TYPES
from raytrain.terminal import progress_console

REFRESH_SECONDS = 0.25
LINE_SECONDS = 10.0


def no_advice(result: Result) -> Iterable[str]:  # noqa: ARG001
    """Return nothing to try next."""
    return ()


@dataclass(frozen=True, slots=True)
class Wording:
    """How a kind of runs is shown.

    Attributes:
        verb: of the command that runs it.
        doing: in a word, beside the bar.
        unit: of its steps.
        on_stop: what happens after Ctrl-C, before the run ends.
        columns: row of `metrics.jsonl` -> what is shown of it, beside its evaluations and its pace.
        workers: what the processes are that a second Ctrl-C kills.
        saved: what of it is kept then.
        advice: how a run ended -> lines that say what to try next.
    """

    verb: str
    doing: str
    unit: str
    on_stop: str
    columns: Callable[[Mapping[str, Any]], list[str]]
    workers: str = "the workers"
    saved: str = "the last checkpoint"
    advice: Callable[[Result], Iterable[str]] = no_advice


class ProgressDisplay:
    """Shows the progress of a run.

    Args:
        run: the run's folder.
        steps: how many steps it will take.
        wording: of its kind.
    """

    def __init__(self, run: RunDirectory, steps: int, wording: Wording) -> None:
        self._run = run
        self._steps = steps
        self._wording = wording
        self._console = progress_console()
        self._metrics = Tail(run.metrics)
        self._restarts = Tail(run.restarts, from_end=True)
        self._attempts = Tail(run.attempts, from_end=True)
        self._resumed = run.metrics.is_file()
        self._working = False
        self._from_step = 0  # of this attempt; rows up to there are of earlier ones
        self._step = 0
        self._speed: tuple[float, float] = (0.0, 0.0)  # (steps, samples) per second
        self._last: dict[str, Any] = {}
        self._valid: Mapping[str, float] = {}
        self._next_line, self._line_step = 0.0, -1  # no line says again what the last one did
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=steps, numbers="", start=False)

    def __enter__(self) -> Self:
        """Show the bar, on a terminal."""
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._stop_bar()

    def print(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False)

    def follow(self, ended: threading.Event) -> bool:
        """Show progress until the run has ended; return False after a second Ctrl-C, while it still runs.

        The first Ctrl-C asks the workers to checkpoint and end.

        Raises:
            KeyboardInterrupt: there are no workers yet, which may have to wait long for a place on a busy cluster.
        """
        asked, wording = False, self._wording
        while True:
            try:
                if ended.wait(REFRESH_SECONDS):
                    self._poll()
                    return True
                self._poll()
            except KeyboardInterrupt:
                self._read_attempts()
                if not self._working:
                    raise
                if asked:
                    self.print(f"ending {wording.workers} at once: what they did since {wording.saved} is lost")
                    return False
                asked = True
                self._run.request_stop()
                self.print(f"stopping: {wording.on_stop}; Ctrl-C again ends {wording.workers} at once")

    def finish(self, result: Result) -> None:
        """Print the result of the run."""
        self._stop_bar()
        table = Table.grid(padding=(0, 2))
        numbers = {**result.metrics, **result.references}
        for name, value in {
            "status": result.status,
            **{name: _number(value) for name, value in numbers.items()},
        }.items():
            table.add_row(name.replace("_", " "), Text(value))
        for name, figure in {**result.figures, "seconds": result.seconds, "restarts": result.restarts}.items():
            if figure:
                table.add_row(name.replace("_", " "), f"{figure:,}")
        self._console.print(table)
        self.print(f"run: {self._run.path}")  # not in the table, which cuts what is longer than the terminal is wide
        for line in self._wording.advice(result):
            self.print(line)
        if result.status in ("done", "stopped early"):
            self.print(f"evaluate it with: raytrain evaluate {self._run.path}")
        if result.status in ("interrupted", "failed") and result.checkpoint:
            self.print(f"continue with: raytrain {self._wording.verb} {self._run.path} --resume")

    def _poll(self) -> None:
        """Read new rows of the run's files."""
        for note in self._restarts.new():
            causes = "; ".join(f"worker {rank}: {cause}" for rank, cause in sorted(note["workers"].items()))
            self.print(f"{causes}; starting all workers again from the last checkpoint")
        self._read_attempts()
        for row in self._metrics.new() if self._working or not self._resumed else ():
            if row["step"] < self._step or (self._resumed and row["step"] <= self._from_step):
                continue  # done before, in an attempt that was interrupted
            self._step = row["step"]
            if "valid" in row:
                self._valid = row["valid"]
                self._line(row)
            else:
                self._update_speed(row)
                self._last = row
        if self._last:
            self._bar.start_task(self._task)
            self._bar.update(self._task, description=self._wording.doing, completed=self._step, numbers=self._numbers())
        new = bool(self._last) and self._last["step"] > self._line_step
        if not self._console.is_terminal and new and time.monotonic() > self._next_line:
            self._line(self._last)

    def _stop_bar(self) -> None:
        if self._bar.live.is_started:  # else it would print an empty line
            self._bar.stop()

    def _read_attempts(self) -> None:
        """Note whether workers have begun, and at which step."""
        for attempt in self._attempts.new():
            self._working, self._from_step = True, attempt["from_step"]

    def _update_speed(self, row: Mapping[str, Any]) -> None:
        before = {**row, **self._last}
        steps, samples, seconds = (row.get(key, 0) - before.get(key, 0) for key in ("step", "samples", "seconds"))
        if seconds > 0:
            fresh = (steps / seconds, samples / seconds)
            old = self._speed if self._speed[0] else fresh
            self._speed = (0.9 * old[0] + 0.1 * fresh[0], 0.9 * old[1] + 0.1 * fresh[1])

    def _line(self, row: Mapping[str, Any]) -> None:
        self._next_line, self._line_step = time.monotonic() + LINE_SECONDS, row["step"]
        left = f"  {max(0, self._steps - row['step']) / self._speed[0]:.0f} s left" if self._speed[0] else ""
        self.print(f"{self._wording.unit} {row['step']}/{self._steps}  {self._numbers()}{left}")

    def _numbers(self) -> str:
        parts = self._wording.columns(self._last)
        parts += [f"valid {name} {_number(value)}" for name, value in self._valid.items()]
        if self._speed[0]:
            samples = f"  {self._speed[1]:.0f} samples/s" if self._speed[1] else ""
            speed, unit = self._speed[0], self._wording.unit
            pace = f"{speed:.1f} {unit}s/s" if speed >= 0.1 else f"{60 * speed:.1f} {unit}s/min"
            parts.append(pace + samples)
        return "  ".join(parts)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


class Tail:
    """Reads rows as they are added to a ``.jsonl`` file, from the start again when the file is replaced.

    Args:
        file: which may not exist yet.
        from_end: skip the rows that are in it already.
    """

    def __init__(self, file: Path, *, from_end: bool = False) -> None:
        self._file = file
        self._place = file.stat().st_size if from_end and file.is_file() else 0
        self._inode = 0

    def new(self) -> list[dict[str, Any]]:
        """Return the complete rows since the last call; damaged lines are skipped, as by `read_jsonl`."""
        try:
            with self._file.open("rb") as lines:
                state = self._file.stat()
                if self._inode and state.st_ino != self._inode:
                    self._place = 0
                self._inode = state.st_ino
                lines.seek(self._place)
                complete, newline, _ = lines.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._place += len(complete) + len(newline)
        found, _ = parse_rows(complete.splitlines(), ROW_TYPES.get(self._file.name, dict[str, Any]))
        return found
