"""A Ray session: this process joins a cluster, or starts one of its own, and leaves it."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError
from ray.job_config import JobConfig

from raytrain.environment import environment
from raytrain.errors import RecipeError
from raytrain.launch.private_cluster import private_cluster
from raytrain.launch.resources import Node, available_cpus, eligible_nodes
from raytrain.loggers import restored_loggers
from raytrain.sections import Resources

# Ray Train reads these when it starts; what the user has set stays. Without the first, a report takes 2 s.
RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}
SET_BY_RAY = {"PYTHONBREAKPOINT": None, "RAY_USAGE_STATS_ENABLED": None}
"""What Ray sets in this process, and leaves; None: not set."""
OBJECT_STORE_BYTES = 200 << 20
OWN_CLUSTER = "local"
"""The address of a cluster that starts and ends with this process."""


@contextlib.contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster, or start one on this machine, unless this process is connected already.

    Args:
        address: "auto" or "HOST:PORT" of a cluster; None: start one.

    Raises:
        RecipeError: Ray cannot be reached or started.
    """
    if ray.is_initialized():
        yield
        return
    with cluster_session(address, available_cpus()):
        yield


@contextlib.contextmanager
def cluster_session(address: str | None, cpus: int) -> Iterator[None]:
    """Connect to the Ray cluster at `address` inside the `with` block, or to a private one of `cpus` CPUs.

    The environment and the loggers of this process are afterwards as they were.

    Raises:
        RecipeError: Ray cannot be reached or started.
    """
    with (
        environment({name: os.environ.get(name, value) for name, value in {**RAY_SETTINGS, **SET_BY_RAY}.items()}),
        restored_loggers("ray"),
        contextlib.nullcontext(_init_args(address)) if address else private_cluster() as how,
    ):
        # "local" and not None: Ray would join any cluster that was once started on this machine.
        own = {} if address else {"num_cpus": cpus, "object_store_memory": OBJECT_STORE_BYTES}
        try:
            _start_ray(address, **how, **own)
            yield
        finally:
            ray.shutdown()


def _start_ray(address: str | None, **how: Any) -> None:
    """Connect to or start a Ray cluster; retry once if Ray's own processes take too long to start.

    Raises:
        RecipeError: it fails.
    """
    workers = JobConfig()  # `ray.init(logging_config=...)` would change the root logger of this process too
    workers.set_py_logging_config(ray.LoggingConfig(log_level="ERROR"))
    quiet = {"logging_level": logging.ERROR, "job_config": workers}
    what = f"--address: cannot join the Ray cluster at {address}" if address else "cannot start Ray on this machine"
    on_terminate = signal.getsignal(signal.SIGTERM)
    for last in (False, True):
        try:
            with kept_interrupts():
                ray.init(address or "local", **quiet, **how)
            break
        except (OSError, ValueError, RuntimeError, RayError) as error:
            raise RecipeError(f"{what}: {error}") from error
        except Exception as error:  # a bare one says that its processes did not start in the 30 s that it gives them
            if last:
                raise RecipeError(
                    f"{what}: it did not start in time, twice; the machine is too busy: {error}"
                ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # Ray's own would end the command on the spot


@contextlib.contextmanager
def kept_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end of the `with` block if Ctrl-C was lost inside it.

    An exception in a hook of `os.fork` is printed and ignored, and Ray forks with hooks of the standard library.
    """
    heard = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal heard
        heard = True
        signal.default_int_handler(signum, frame)

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if heard:
        raise KeyboardInterrupt


def _init_args(address: str) -> dict[str, Any]:
    """Return arguments of `ray.init` to join a cluster; Ray Train's helpers look for it again by RAY_ADDRESS."""
    return {"runtime_env": {"env_vars": {"RAY_ADDRESS": address}}} if address != "auto" else {}


def cluster_nodes(workers: int, resources: Resources) -> list[Node]:
    """Return the nodes of the cluster that have the resources of a worker.

    Raises:
        RecipeError: there are too few.
    """
    nodes = [(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]
    return eligible_nodes(nodes, workers, resources.extra_resources(), resources.labels, resources.placement)
