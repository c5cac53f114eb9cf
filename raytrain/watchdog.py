"""Ending a process that hangs: Ray notices a worker that dies, and never one that stands still."""

import faulthandler
import time
from pathlib import Path
from types import TracebackType
from typing import Self


class Watchdog:
    """Ends this process if it shows no sign of progress for too long, and leaves its stack in a file.

    The clock runs in a thread of C code, so a process that holds the interpreter's lock is ended too.

    Args:
        file: where the stack goes; gone if there was no need for it.
        timeout_seconds: how long is too long.
    """

    def __init__(self, file: Path, timeout_seconds: float) -> None:
        self._path = file
        self._timeout_seconds = timeout_seconds
        self._wound = 0.0

    def __enter__(self) -> Self:
        """Start the clock."""
        self._file = self._path.open("a")
        self.beat()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the clock."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()

    def beat(self) -> None:
        """Show a sign of progress; winding the clock takes a thread, so it is done once in a while."""
        now = time.monotonic()
        if now - self._wound > min(1.0, self._timeout_seconds / 8):
            faulthandler.dump_traceback_later(self._timeout_seconds, file=self._file, exit=True)
            self._wound = now
