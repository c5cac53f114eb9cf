"""Worker processes of Ray for tests, forked from a process that has imported what they import.

A worker process of Ray imports Ray, torch and our packages, seconds of a core, before it does anything, and a test
starts several. After `fork_ray_workers()` the clusters that this process starts fork theirs. Everything else about
them is Ray's own.

Ray starts a worker process by `python SETUP_WORKER arguments of the worker`. This file takes the place of that script:
it hands its arguments, environment and output to the fork server, and lives as long as the worker.
"""

import array
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

FORK_SERVER = "RAYTRAIN_TEST_FORK_SERVER"  # the environment variable with the address of the fork server
LONGEST_REQUEST = 1 << 18  # bytes
READ_ONCE = {"RAY_JOB_ID": "01000000"}  # by Ray, when it is imported; it is that of a cluster's first driver
PRELOADED = (
    "ray._private.workers.default_worker",
    "torch._dynamo",
    "raytrain.cli.main",
    "raytrain.launch.train",
    "search.launch.tune",
    "search.launch.trial_actor",
    "federated.launch.client_actor",
)


def fork_ray_workers() -> None:
    """Have the clusters that this process starts from now on fork their workers, on Linux."""
    from ray._private import ray_constants  # noqa: PLC0415 - the script needs nothing but the standard library

    if sys.platform != "linux":
        return
    ray_constants.SETUP_WORKER_FILENAME = __file__
    if FORK_SERVER not in os.environ:
        os.environ[FORK_SERVER] = _start_fork_server()


def _start_fork_server() -> str:
    """Start the fork server, which ends with this process, and return its address."""
    import atexit  # noqa: PLC0415
    import subprocess  # noqa: PLC0415
    import tempfile  # noqa: PLC0415

    folder = tempfile.TemporaryDirectory(prefix="ray-workers-", ignore_cleanup_errors=True)
    address = f"{folder.name}/socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(128)
        command = [sys.executable, "-m", "raytrain.launch.forked_workers", "fork-server", str(listener.fileno())]
        server = subprocess.Popen(
            command,
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, **READ_ONCE, "RAY_RAYLET_PID": str(os.getpid())},
        )

    def end() -> None:
        server.kill()
        server.wait()
        folder.cleanup()

    atexit.register(end)
    return address


def ask_for_worker(arguments: list[str]) -> None:
    """Have a worker forked with the environment and output of this process, and wait until it has ended.

    Raises:
        OSError: there is no fork server.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(os.environ[FORK_SERVER])
        request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        server.sendmsg(
            [json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1, 2]))]
        )
        server.recv(1)  # nothing comes; the connection ends with the worker


class ForkServer:
    """Forks a worker for each connection; ends a worker whose connection ends, and a connection whose worker ends."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._events = selectors.DefaultSelector()
        self._events.register(listener, selectors.EVENT_READ)
        self._events.register(sys.stdin.fileno(), selectors.EVENT_READ)
        self._workers: dict[int, tuple[int, socket.socket]] = {}  # by the file descriptor of their process

    def run(self) -> None:
        """Serve until the process that started this one ends."""
        ended = False
        while not ended:
            for key, _ in self._events.select():
                ended |= key.fileobj == sys.stdin.fileno()
                if key.fileobj is self._listener:
                    self._start(self._listener.accept()[0])
                elif key.data in self._workers:
                    self._end(key.data)
        for process in list(self._workers):
            self._end(process)

    def _start(self, connection: socket.socket) -> None:
        """Fork a worker that does what the connection asks for."""
        request, streams, *_ = socket.recv_fds(connection, LONGEST_REQUEST, 2)
        pid = os.fork()
        if pid == 0:
            for each in (connection, self._listener, *(other for _, other in self._workers.values())):
                each.close()
            _be_worker(json.loads(request), streams)
        for stream in streams:
            os.close(stream)
        process = os.pidfd_open(pid)
        self._workers[process] = pid, connection
        self._events.register(process, selectors.EVENT_READ, process)
        self._events.register(connection, selectors.EVENT_READ, process)

    def _end(self, process: int) -> None:
        """End a worker and its connection, of which one has ended."""
        pid, connection = self._workers.pop(process)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self._events.unregister(process)
        self._events.unregister(connection)
        os.close(process)
        connection.close()


def _be_worker(request: dict[str, Any], streams: list[int]) -> NoReturn:
    """Run a worker, and end this process."""
    status = 1
    try:
        _run_worker(request, streams)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def _run_worker(request: dict[str, Any], streams: list[int]) -> None:
    """Do what Ray's script and the worker's do."""
    import random  # noqa: PLC0415
    import runpy  # noqa: PLC0415

    import numpy as np  # noqa: PLC0415
    from ray._private.runtime_env.context import RuntimeEnvContext  # noqa: PLC0415
    from ray._private.workers import setup_worker  # noqa: PLC0415
    from ray._raylet import setproctitle  # type: ignore[attr-defined]  # noqa: PLC0415

    from raytrain.launch.private_cluster import reload_ray_environment  # noqa: PLC0415

    setproctitle("ray::IDLE")  # finds the place of the title only while the environment is the first one
    os.setsid()
    for stream, place in zip(streams, (1, 2), strict=True):
        os.dup2(stream, place)
        os.close(stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    options, arguments = setup_worker.parser.parse_known_args(request["arguments"])
    context = RuntimeEnvContext.deserialize(options.serialized_runtime_env_context or "{}")
    if READ_ONCE.items() - os.environ.items() or context.command_prefix or context.py_executable != sys.executable:
        os.execv(sys.executable, [sys.executable, setup_worker.__file__, *request["arguments"]])
    os.environ.update(context.env_vars)
    reload_ray_environment()
    random.seed()
    np.random.seed()  # noqa: NPY002
    script = next(word for word in arguments if word.endswith(".py"))
    sys.argv = arguments[arguments.index(script) :]
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path = list(dict.fromkeys([str(Path(script).parent), *paths, *sys.path[1:]]))
    runpy.run_path(script, run_name="__main__")


def _main() -> None:
    """Be the fork server, or the process that Ray starts for a worker."""
    if sys.argv[1] == "fork-server":
        for name in PRELOADED:
            importlib.import_module(name)
        gc.freeze()
        ForkServer(socket.socket(fileno=int(sys.argv[2]))).run()
        return
    try:
        ask_for_worker(sys.argv[1:])
    except (OSError, KeyError):
        from ray._private.workers import setup_worker  # noqa: PLC0415

        os.execv(sys.executable, [sys.executable, setup_worker.__file__, *sys.argv[1:]])


if __name__ == "__main__":
    _main()
