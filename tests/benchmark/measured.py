"""Runs a command and measures it with all that comes of it; also the callback by which a run notes its first step."""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

FIRST_STEP = Path(tempfile.gettempdir()) / f"raytrain-first-step-{os.getuid()}"
"""Where the time of the first step goes, wherever on this machine it is done."""
SET_CHILD_SUBREAPER = 36
LOOK_SECONDS = 0.1
LINGER_SECONDS = 15.0
"""How long what a command leaves is counted. Ray's agents outlive a driver by two minutes, and do nothing then."""


def note(replica: Any) -> None:
    """Note when the first worker has done its first step."""
    if replica.rank == 0 and replica.progress.step == 1:
        FIRST_STEP.write_text(repr(time.time()))


def measure(words: Sequence[str], also: int) -> dict[str, float]:
    """Run a command, and return how long it took, and the processor seconds of all that came of it.

    They are looked up again and again: Ray's raylet does not wait for its children, whose times are then lost.

    Args:
        words: the command.
        also: a process whose time counts too, with that of all that came of it, from now on; 0: none.
    """
    import psutil  # noqa: PLC0415 - a worker that notes its first step needs no more than that

    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what loses its parent becomes a child of this process
    used: dict[tuple[int, float], float] = {}

    def look() -> list[Any]:
        own = psutil.Process().children(recursive=True)
        others = [psutil.Process(also), *psutil.Process(also).children(recursive=True)] if also else []
        for process in [*own, *others]:
            with suppress(psutil.NoSuchProcess):
                used[process.pid, process.create_time()] = sum(process.cpu_times()[:2])
        return [process for process in own if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    look()
    before = sum(used.values())
    FIRST_STEP.unlink(missing_ok=True)
    began = time.time()
    command = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while command.poll() is None:
        with suppress(psutil.NoSuchProcess):
            look()
        time.sleep(LOOK_SECONDS)
    exit_seconds = time.time() - began
    give_up = time.monotonic() + LINGER_SECONDS
    with suppress(psutil.NoSuchProcess):
        while look() and time.monotonic() < give_up:
            time.sleep(LOOK_SECONDS)
        for left in look():
            left.kill()
    first = float(FIRST_STEP.read_text()) - began
    return {
        "status": command.returncode,
        "first_step": first,
        "exit": exit_seconds,
        "cpu": sum(used.values()) - before,
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[2:], int(sys.argv[1]))))
