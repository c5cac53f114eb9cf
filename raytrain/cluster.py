"""Fitting workers onto machines, and asking early whether a cluster can be reached and runs the same code."""

import hashlib
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import raytrain
from raytrain.errors import RecipeError

REACH_SECONDS = 5.0
MOST_ACTORS = 8


@dataclass(frozen=True, slots=True)
class Share:
    """What each worker gets of the processors.

    Attributes:
        cpus: for itself.
        actors: how many actors prepare its data.
        actor_cpus: for each of them; 0: they share its own.
    """

    cpus: float
    actors: int = 0
    actor_cpus: float = 0.0

    @property
    def total(self) -> float:
        """Return all that the worker and its actors get."""
        return self.cpus + self.actors * self.actor_cpus


def own_cpus() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))


def share_cpus(machines: Sequence[float], workers: int, cpus: float, actors: int, actor_cpus: float) -> Share:
    """Return what each worker gets, and the actors that prepare its data.

    Actors for which nothing is left share the processors of their worker, because a worker whose actors cannot start
    would wait for ever.

    Args:
        machines: processors of each machine.
        workers: how many there are to place.
        cpus: what the recipe asks for each worker; 0: as many whole ones as leave room for its actors.
        actors: how many each worker has; 0: as many as there is room for beside the workers, at least one.
        actor_cpus: what each actor takes.

    Raises:
        RecipeError: the workers do not fit.
    """
    for each in _choices(machines, cpus):
        room = _room(machines, workers, each, actor_cpus) // workers
        if room >= max(1, actors):
            return Share(each, actors or min(room, MOST_ACTORS), actor_cpus)
    return Share(cpus_per_worker(machines, workers, cpus), max(1, actors))


def _room(machines: Sequence[float], workers: int, cpus: float, actor_cpus: float) -> int:
    """Return how many actors fit beside workers that fill one machine after the other; 0 if these do not fit."""
    room = 0
    for machine in machines:
        here = min(workers, _fitting(machine, cpus))
        workers -= here
        room += _fitting(machine - here * cpus, actor_cpus)
    return 0 if workers else room


def _choices(machines: Sequence[float], cpus: float) -> Sequence[float]:
    return [cpus] if cpus else range(int(max(machines, default=0)), 0, -1)


def cpus_per_worker(machines: Sequence[float], workers: int, cpus: float) -> float:
    """Return how many processors each worker gets.

    Args:
        machines: processors of each machine.
        workers: how many there are to place.
        cpus: what the recipe asks for; 0: as many whole ones as fit.

    Raises:
        RecipeError: the workers do not fit.
    """
    for each in _choices(machines, cpus):
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
