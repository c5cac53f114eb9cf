"""Runs a command and measures it with all that comes of it; also the callback by which a run notes its first step."""

import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

SET_CHILD_SUBREAPER = 36
LINGER_SECONDS = 150.0
"""How long Ray's agents may outlive a driver."""


def note(replica: Any) -> None:
    """Note when the first worker has done its first step."""
    if replica.rank == 0 and replica.progress.step == 1:
        Path(os.environ["STARTUP_NOTE"]).write_text(repr(time.time()))


def measure(words: list[str]) -> None:
    """Run a command, and print how long it took, and the processor seconds of all that came of it, as JSON."""
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what loses its parent becomes a child of this process
    began = time.time()
    command = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    status = command.wait()
    exit_seconds = time.time() - began
    give_up = time.monotonic() + LINGER_SECONDS
    with suppress(ChildProcessError):
        while time.monotonic() < give_up:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.05)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    marker = Path(os.environ["STARTUP_NOTE"])
    first = float(marker.read_text()) - began if marker.is_file() else 0.0
    cpu = used.ru_utime + used.ru_stime
    print(json.dumps({"status": status, "first_step": first, "exit": exit_seconds, "cpu": cpu}))


if __name__ == "__main__":
    measure(sys.argv[1:])
