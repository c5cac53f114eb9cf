"""Fitting workers onto machines, and asking early whether a cluster can be reached and runs the same code."""

import math
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from raytrain.errors import RecipeError

REACH_SECONDS = 5.0
MOST_ACTORS = 8


@dataclass(frozen=True, slots=True)
class CpuShare:
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


def available_cpus() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))


def allocate_cpus(machines: Sequence[float], workers: int, cpus: float, actors: int, actor_cpus: float) -> CpuShare:
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
            return CpuShare(each, actors or min(room, MOST_ACTORS), actor_cpus)
    return CpuShare(cpus_per_worker(machines, workers, cpus), max(1, actors))


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


class Machine(float):
    """The processors of a machine.

    Attributes:
        places: how many workers it has room for by what else they take.
    """

    places: float

    def __new__(cls, cpus: float, places: float = math.inf) -> Self:
        """Return the machine."""
        machine = super().__new__(cls, cpus)
        machine.places = places
        return machine


Node = tuple[Mapping[str, float], Mapping[str, str]]
"""What a machine of a Ray cluster has: amounts by name, and labels."""


def eligible_nodes(
    nodes: Sequence[Node],
    workers: int,
    each: Mapping[str, float],
    labels: Mapping[str, str],
    placement: str = "PACK",
) -> list[Machine]:
    """Return the machines that workers can be placed on.

    Args:
        nodes: all machines.
        workers: how many workers there are to place.
        each: what a worker takes beside processors, by the cluster's names.
        labels: what the labels of a machine must be: "value", "!value", "in(one, other)" or "!in(one, other)".
        placement: "STRICT_SPREAD": one worker on each; "STRICT_PACK": all on one, which is the one returned.

    Raises:
        RecipeError: there are too few, and the workers would wait for ever.
    """
    fit = [resources for resources, have in nodes if all(_matches(have.get(key), labels[key]) for key in labels)]
    if not fit:
        known = sorted({f"{key}={value}" for _, have in nodes for key, value in have.items() if "node-id" not in key})
        raise RecipeError(
            f"resources.labels: no machine has {', '.join(f'{key}={value}' for key, value in labels.items())}; there "
            f"are {', '.join(known) or 'none'}; a machine gets labels by `ray start --labels`"
        )
    for name, amount in each.items():
        if sum(_fitting(resources.get(name, 0.0), amount) for resources in fit) < workers:
            raise _lacking(name, amount, workers, sum(resources.get(name, 0.0) for resources in fit), fit)
    machines = [Machine(resources.get("CPU", 0.0), _slots(resources, each)) for resources in fit]
    if sum(machine.places for machine in machines) < workers:
        raise RecipeError(
            f"workers: {workers} workers of {', '.join(f'{each[name]:g} {name}' for name in each)} each do not fit on "
            f"{len(fit)} machine(s); set workers={max(1, sum(int(machine.places) for machine in machines))}"
        )
    return _strict(machines, workers, placement)


def _strict(machines: Sequence[Machine], workers: int, placement: str) -> list[Machine]:
    """Return the machines as a strict placement sees them."""
    if placement == "STRICT_SPREAD":
        if len(machines) < workers:
            raise RecipeError(
                f"resources.placement: STRICT_SPREAD takes a machine for each of {workers} workers, and there are "
                f"{len(machines)} that have what a worker takes; set resources.placement=SPREAD, or workers to fewer"
            )
        return [Machine(machine, min(machine.places, 1)) for machine in machines]
    if placement == "STRICT_PACK":
        roomy = [machine for machine in machines if machine.places >= workers]
        if not roomy:
            raise RecipeError(
                f"resources.placement: STRICT_PACK takes one machine for {workers} workers, and the largest has room "
                f"for {max(int(machine.places) for machine in machines)}; set resources.placement=PACK, or workers to "
                "fewer"
            )
        return [max(roomy)]
    return list(machines)


def _slots(resources: Mapping[str, float], each: Mapping[str, float]) -> float:
    """Return how many workers a machine has room for by what they take beside processors."""
    return min((_fitting(resources.get(name, 0.0), amount) for name, amount in each.items()), default=math.inf)


def _lacking(name: str, amount: float, workers: int, there: float, fit: Sequence[Mapping[str, float]]) -> RecipeError:
    """Return the error of workers that do not fit by what they take of `name`."""
    if name == "GPU":
        return RecipeError(
            f"resources.gpus: {workers} workers of {amount:g} GPU each do not fit on {there:g} GPU(s); set "
            "resources.gpus=0 to train on CPUs, or workers to fewer"
        )
    if there:
        return RecipeError(
            f"resources.custom.{name}: {workers} workers of {amount:g} each do not fit on machines that have "
            f"{' + '.join(f'{resources[name]:g}' for resources in fit if name in resources)}; set workers to fewer"
        )
    others = sorted({key for resources in fit for key in resources if ":" not in key and "memory" not in key})
    return RecipeError(
        f"resources.custom.{name}: no machine has it; there are {', '.join(others)}; a machine gets it by "
        f"`ray start --resources='{{\"{name}\": 1}}'`"
    )


def _matches(have: str | None, wanted: str) -> bool:
    """Return whether a label is what Ray's selector `wanted` asks for; one that is not there is not any value."""
    inside = re.fullmatch(r"in\((.*)\)", wanted.removeprefix("!"))
    values = [value.strip() for value in inside[1].split(",")] if inside else [wanted.removeprefix("!")]
    return (have in values) is not wanted.startswith("!")


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
    shares = round(machine * 10_000) // max(1, round(each * 10_000))
    return int(min(shares, machine.places)) if isinstance(machine, Machine) else shares


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
            "port open to this machine? Leave --address out to train on this machine"
        ) from None
