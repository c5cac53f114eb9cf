"""A private Ray cluster on this machine."""

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray._common.utils import get_default_system_temp_dir
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # its stub lacks them

from raytrain.environment import environment
from raytrain.sync.transport import LOOPBACK


@contextmanager
def private_cluster() -> Iterator[dict[str, Any]]:
    """Configure `ray.init` to start a cluster for this user only, inside the `with` block, which has to end it.

    Its processes, and the process groups of torch in them, listen on this machine's loopback address alone. All of
    Ray's ask for a token, which is new each time. The token, Ray's sockets and its logs lie in a folder that no other
    user can enter, and that goes with the cluster.

    Yields:
        What `ray.init` is to be called with.
    """
    # Ray's own place for temporary files: the paths of sockets in it have to be short.
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir=get_default_system_temp_dir(), ignore_cleanup_errors=True
    ) as folder:
        token = Path(folder) / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        closed = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_AUTH_TOKEN": None,  # it would come first
            "GLOO_SOCKET_IFNAME": LOOPBACK,
            "NCCL_SOCKET_IFNAME": LOOPBACK,
        }
        try:
            with environment(closed), _on_loopback():
                reload_ray_environment()
                yield {"_temp_dir": str(Path(folder) / "ray"), "include_dashboard": False}
        finally:
            reload_ray_environment()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Give nodes that Ray starts here the loopback address, on which alone their processes then listen.

    `ray.init(_node_ip_address="127.0.0.1")` takes another address of the machine instead, unless Ray was told not to
    build clusters of several machines, which it reads from the environment when it is imported.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def reload_ray_environment() -> None:
    """Make Ray read the authentication mode and token from the environment again."""
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")
