"""A Ray session: this process joins a cluster, or starts one of its own, and leaves it."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.job_config import JobConfig

from raytrain.environment import environment
from raytrain.errors import RecipeError
from raytrain.launch.private_cluster import private_cluster
from raytrain.launch.resources import Machine, Node, machines_for, own_cpus
from raytrain.loggers import restored_loggers
from raytrain.sections import Resources

# Ray Train reads these when it starts; what the user has set stays. Without the first, a report takes 2 s.
SETTINGS = {
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
OWN = "local"
"""The address of a cluster that starts and ends with this process."""


@contextlib.contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Join a Ray cluster, or start one on this machine, unless this process is in one already.

    Args:
        address: "auto" or "HOST:PORT" of a cluster; None: start one.

    Raises:
        RecipeError: it does not work.
    """
    if ray.is_initialized():
        yield
        return
    with session(address, own_cpus()):
        yield


@contextlib.contextmanager
def session(address: str | None, cpus: int) -> Iterator[None]:
    """Use the Ray cluster at `address` inside the `with` block, or one of `cpus` processors that nobody else can use.

    The environment and the loggers of this process are afterwards as they were.

    Raises:
        RecipeError: it does not work.
    """
    with (
        environment({name: os.environ.get(name, value) for name, value in {**SETTINGS, **SET_BY_RAY}.items()}),
        restored_loggers("ray"),
        contextlib.nullcontext(_joining(address)) if address else private_cluster() as how,
    ):
        # "local" and not None: Ray would join any cluster that was once started on this machine.
        own = {} if address else {"num_cpus": cpus, "object_store_memory": OBJECT_STORE_BYTES}
        try:
            _start_ray(address, **how, **own)
            yield
        finally:
            ray.shutdown()


def _start_ray(address: str | None, **how: Any) -> None:
    """Join or start a Ray cluster; if Ray's own processes take too long to start, try it once more.

    Raises:
        RecipeError: it does not work.
    """
    workers = JobConfig()  # `ray.init(logging_config=...)` would change the root logger of this process too
    workers.set_py_logging_config(ray.LoggingConfig(log_level="ERROR"))
    quiet = {"logging_level": logging.ERROR, "job_config": workers}
    what = f"--address: cannot join the Ray cluster at {address}" if address else "cannot start Ray on this machine"
    on_terminate = signal.getsignal(signal.SIGTERM)
    for last in (False, True):
        try:
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


def _joining(address: str) -> dict[str, Any]:
    """Return how to join a cluster: Ray Train's own helpers look for it anew, and may see another on their machine."""
    return {"runtime_env": {"env_vars": {"RAY_ADDRESS": address}}} if address != "auto" else {}


def machines_here(workers: int, resources: Resources) -> list[Machine]:
    """Return this machine, as it will be in a cluster of its own.

    Raises:
        RecipeError: it has not what a worker takes.
    """
    here: Node = ({"CPU": own_cpus()}, {})
    return machines_for([here], workers, resources.custom, resources.labels, resources.placement)


def machines(workers: int, resources: Resources) -> list[Machine]:
    """Return the machines of the cluster that have what a worker takes.

    Raises:
        RecipeError: there are too few.
    """
    nodes = [(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]
    return machines_for(nodes, workers, resources.beside_cpus(), resources.labels, resources.placement)
