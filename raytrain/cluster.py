"""Fitting workers onto machines, and asking early whether a cluster can be reached and runs the same code."""

import hashlib
import math
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import raytrain
from raytrain.errors import RecipeError

REACH_SECONDS = 5.0


def own_cpus() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))


def cpus_per_worker(machines: Sequence[float], workers: int, cpus: float) -> float:
    """Return how many processors each worker gets.

    Args:
        machines: processors of each machine.
        workers: how many there are to place.
        cpus: what the recipe asks for; 0: as many whole ones as fit.

    Raises:
        RecipeError: the workers do not fit.
    """
    for each in [cpus] if cpus else range(int(max(machines, default=0)), 0, -1):
        if sum(_fitting(machine, each) for machine in machines) >= workers:
            return each
    each = cpus or 1
    fit = sum(_fitting(machine, each) for machine in machines)
    if cpus and not fit:
        raise RecipeError(
            f"resources.cpus: a worker of {each:g} CPU does not fit on any machine: they have "
            f"{' + '.join(f'{machine:g}' for machine in machines) or 'no'} CPUs"
        )
    shared = math.floor(100 * max(1, sum(machines)) / workers) / 100
    raise RecipeError(
        f"workers: {workers} workers of {each:g} CPU each do not fit on {len(machines)} machine(s) with "
        f"{' + '.join(f'{machine:g}' for machine in machines) or 'no'} CPUs; set workers={max(1, fit)}, or "
        f"resources.cpus={shared:g} to share CPUs"
    )


def _fitting(machine: float, each: float) -> int:
    """Return how many shares of `each` a machine has, counted as Ray does: in ten-thousandths."""
    return round(machine * 10_000) // max(1, round(each * 10_000))


def check_reachable(address: str) -> None:
    """Check that something listens at "HOST:PORT"; other forms of address are left to Ray.

    Raises:
        RecipeError: nothing answers.
    """
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address:
        return
    if not port.isdigit():
        raise RecipeError(f"--address: expected HOST:PORT, as in 10.0.0.1:6379; got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RecipeError(
            f"--address: no Ray cluster answers at {address} ({error}); is `ray start --head` running there, and its "
            "port open to this machine? Leave --address out to start Ray here"
        ) from None


def fingerprint() -> str:
    """Return a hash of this package's source, to tell whether two machines run the same."""
    root = Path(raytrain.__file__).parent
    total = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        total.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return total.hexdigest()
