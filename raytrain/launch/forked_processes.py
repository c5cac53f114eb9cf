"""Ray's Python processes for tests, forked from a process that has imported what they import.

A cluster starts five of them, and one for each worker, and each imports seconds of a core before it does anything.
After `fork_ray_processes()` those of the clusters that this process starts are forked instead. Everything else about
them is Ray's own.

Ray starts them as `PYTHON SCRIPT arguments`. This file is made to stand in for PYTHON: it hands its arguments,
environment and streams to the fork server, and lives as long as the process that runs the script.
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

FORK_SERVER = "RAYTRAIN_TEST_FORK_SERVER"  # the environment variable with the folder of the fork server
LONGEST_REQUEST = 1 << 18  # bytes
STREAMS = (0, 1, 2)
READ_ONCE = {"RAY_JOB_ID": "01000000"}  # by Ray, when it is imported; it is that of a cluster's first driver
PRELOADED = (
    "ray._private.log_monitor",
    "ray._private.runtime_env.agent.runtime_env_agent",
    "ray._private.workers.default_worker",
    "ray.autoscaler._private.monitor",
    "ray.dashboard.agent",
    "ray.dashboard.dashboard",
    "torch._dynamo",
    "raytrain.cli.main",
    "raytrain.launch.train",
    "search.launch.tune",
    "search.launch.trial_actor",
    "federated.launch.client_actor",
)


def fork_ray_processes() -> None:
    """Have the clusters that this process starts from now on fork their Python processes, on Linux."""
    from ray._private import services  # noqa: PLC0415 - the stand-in needs nothing but the standard library

    if sys.platform == "linux":
        # Ray's agents ask whether the raylet is their parent, or listen to a pipe from it.
        os.environ["RAY_enable_pipe_based_agent_to_parent_health_check"] = "1"  # noqa: SIM112
        folder = os.environ.setdefault(FORK_SERVER, "") or _start_fork_server()
        services.sys = _SysOf(f"{folder}/python")


class _SysOf:
    """The module `sys` with another executable."""

    def __init__(self, executable: str) -> None:
        self.executable = executable

    def __getattr__(self, name: str) -> Any:
        return getattr(sys, name)


def _start_fork_server() -> str:
    """Start the fork server, which ends with this process, and return its folder."""
    import atexit  # noqa: PLC0415
    import subprocess  # noqa: PLC0415
    import tempfile  # noqa: PLC0415

    temporary = tempfile.TemporaryDirectory(prefix="ray-processes-", ignore_cleanup_errors=True)
    folder = Path(temporary.name)
    stand_in = folder / "python"
    stand_in.write_text(f"#!{sys.executable}\n{Path(__file__).read_text()}")
    stand_in.chmod(0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen(128)
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, "fork-server", str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, **READ_ONCE, "RAY_RAYLET_PID": str(os.getpid())},
        )

    def end() -> None:
        server.kill()
        server.wait()
        temporary.cleanup()

    atexit.register(end)
    os.environ[FORK_SERVER] = temporary.name
    return temporary.name


def ask_for_process(arguments: list[str]) -> None:
    """Have a process forked with the environment and streams of this one, and wait until it has ended.

    Raises:
        OSError: there is no fork server.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(f"{os.environ[FORK_SERVER]}/socket")
        request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        server.sendmsg(
            [json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", STREAMS))]
        )
        server.recv(1)  # nothing comes; the connection ends with the process


class ForkServer:
    """Forks a process for each connection; ends it when the connection ends, and the connection when it ends."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._events = selectors.DefaultSelector()
        self._events.register(listener, selectors.EVENT_READ)
        self._events.register(sys.stdin.fileno(), selectors.EVENT_READ)
        self._forked: dict[int, tuple[int, socket.socket]] = {}  # by the file descriptor of the process

    def run(self) -> None:
        """Serve until the process that started this one ends."""
        ended = False
        while not ended:
            for key, _ in self._events.select():
                ended |= key.fileobj == sys.stdin.fileno()
                if key.fileobj is self._listener:
                    self._start(self._listener.accept()[0])
                elif key.data in self._forked:
                    self._end(key.data)
        for process in list(self._forked):
            self._end(process)

    def _start(self, connection: socket.socket) -> None:
        """Fork a process that does what the connection asks for."""
        request, streams, *_ = socket.recv_fds(connection, LONGEST_REQUEST, len(STREAMS))
        pid = os.fork()
        if pid == 0:
            for each in (connection, self._listener, *(other for _, other in self._forked.values())):
                each.close()
            _be_process(json.loads(request), streams)
        for stream in streams:
            os.close(stream)
        process = os.pidfd_open(pid)
        self._forked[process] = pid, connection
        self._events.register(process, selectors.EVENT_READ, process)
        self._events.register(connection, selectors.EVENT_READ, process)

    def _end(self, process: int) -> None:
        """End a process and its connection, of which one has ended."""
        pid, connection = self._forked.pop(process)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self._events.unregister(process)
        self._events.unregister(connection)
        os.close(process)
        connection.close()


def _be_process(request: dict[str, Any], streams: list[int]) -> NoReturn:
    """Do what a request asks for, and end this process."""
    from ray._raylet import setproctitle  # type: ignore[attr-defined]  # noqa: PLC0415

    try:
        setproctitle("python")  # finds the place of the title only while the environment is the first one
        os.setsid()
        for stream, place in zip(streams, STREAMS, strict=True):
            os.dup2(stream, place)
            os.close(stream)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        _run(request["arguments"])
    except SystemExit:
        pass  # a worker's usual end
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)  # nobody asks for it


def _run(arguments: list[str]) -> None:
    """Run a script as Python does, or one that sets up a worker of Ray and becomes it."""
    import random  # noqa: PLC0415
    import runpy  # noqa: PLC0415

    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from ray._private.runtime_env.context import RuntimeEnvContext  # noqa: PLC0415
    from ray._private.workers import setup_worker  # noqa: PLC0415

    from raytrain.launch.private_cluster import reload_ray_environment  # noqa: PLC0415

    if "RAY_JOB_ID" in os.environ and READ_ONCE.items() - os.environ.items():
        os.execv(sys.executable, [sys.executable, *arguments])
    options = [word for word in arguments[:3] if word in {"-u", "-s", "-S"}]
    script, *words = [word for word in arguments if word not in options]
    if script == setup_worker.__file__:
        known, words = setup_worker.parser.parse_known_args(words)
        context = RuntimeEnvContext.deserialize(known.serialized_runtime_env_context or "{}")
        if context.command_prefix or context.py_executable != sys.executable:
            os.execv(sys.executable, [sys.executable, *arguments])
        os.environ.update(context.env_vars)
        script, *words = words
    reload_ray_environment()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # as Ray has it for a worker of one core
    random.seed()
    np.random.seed()  # noqa: NPY002
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = [script, *words]
    sys.path = list(dict.fromkeys([str(Path(script).parent), *paths, *sys.path[1:]]))
    runpy.run_path(script, run_name="__main__")


def _main() -> None:
    """Be the fork server, or stand in for Python."""
    if sys.argv[1] == "fork-server":
        for name in PRELOADED:
            importlib.import_module(name)
        gc.freeze()
        ForkServer(socket.socket(fileno=int(sys.argv[2]))).run()
        return
    try:
        ask_for_process(sys.argv[1:])
    except (OSError, KeyError):
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    _main()
