"""Watchdog of a worker process: launchers notice a process that dies, but not one that hangs."""

import faulthandler
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self


class Watchdog:
    """Kills this process if there is no heartbeat for `timeout_seconds`, and dumps its stack to a file.

    A thread resets a timer after heartbeats. The timer runs in C, so a process that holds the GIL is killed too.

    Args:
        file: for the stack; removed afterwards if it is empty.
        timeout_seconds: without a heartbeat.
        is_waiting: returns whether the process is blocked in a collective; its peers have their own watchdogs.
    """

    def __init__(self, file: Path, timeout_seconds: float, is_waiting: Callable[[], bool]) -> None:
        self._path = file
        self._tick_seconds = min(1.0, timeout_seconds / 8)
        self._clock_seconds = timeout_seconds - 2 * self._tick_seconds  # so that the end comes within timeout_seconds
        self._is_waiting = is_waiting
        self._alive = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        """Start the watchdog."""
        self._file = self._path.open("a")
        self._wind()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the watchdog."""
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()

    def heartbeat(self) -> None:
        """Show a sign of progress."""
        self._alive = True

    def _watch(self) -> None:
        while not self._ended.wait(self._tick_seconds):
            if self._alive or self._is_waiting():
                self._alive = False
                self._wind()

    def _wind(self) -> None:
        faulthandler.dump_traceback_later(self._clock_seconds, file=self._file, exit=True)


def hang_file(path: Path, rank: int) -> Path:
    """Return the file in a run's folder for the stack of a hanging worker."""
    return path / f"hang-worker-{rank}.txt"


def kept_stack(path: Path, rank: int) -> Path | None:
    """Rename and return the stack file of a worker that hung; None without one."""
    hang = hang_file(path, rank)
    if not hang.exists() or hang.stat().st_size == 0:
        return None
    return hang.rename(hang.with_stem(f"{hang.stem}-{time.strftime('%Y%m%d-%H%M%S')}"))
