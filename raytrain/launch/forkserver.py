"""The fork server of workers on this machine. It imports what they need, and computes nothing.

Forked from the command they would save an import, and could hang: neither OpenMP's threads nor CUDA survive a fork, and
the command may have used either, if only because a module of the user's has when it was imported.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from types import ModuleType

from raytrain.environment import environment

# glibc gives large blocks back to the system at once, and each step takes thousands of page faults to get them again.
WORKER_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}
"""Environment variables that must be set when a worker's process starts, that is, in the fork server."""


def start_forkserver(module: str) -> None:
    """Start the fork server in the background, unless it runs: it imports torch while this process does.

    Args:
        module: what workers need; it is imported in the server.
    """
    multiprocessing.set_forkserver_preload([module])
    with environment(WORKER_ENVIRONMENT):
        forkserver.ensure_running()


@contextmanager
def without_main() -> Iterator[None]:
    """Start processes inside the `with` block that do not run the user's script again.

    Python would: a process that is not forked imports the main module of the one that starts it, in case an argument
    is defined there. Ours are not, and a script that calls `raytrain.train` at its top would train in each worker.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def leave_command() -> None:
    """Make this process, a worker, one that Ctrl-C does not reach, and that is killed when the command dies."""
    os.setpgid(0, 0)  # Ctrl-C at the terminal is for the command, which asks the workers to end
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.SIG_DFL)
    threading.Thread(target=_end_with_command, daemon=True).start()


def _end_with_command() -> None:
    """End this process when the command dies, which is not its parent: a fork server is."""
    if command := multiprocessing.parent_process():
        command.join()
        os.kill(os.getpid(), signal.SIGKILL)
