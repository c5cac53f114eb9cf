"""Fitting workers onto machines, and asking early whether a cluster can be reached."""

import math
import os
import re
import socket
from collections.abc import Mapping, Sequence
from typing import Self

from raytrain.errors import RecipeError

REACH_SECONDS = 5.0


def own_cpus() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))


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


def machines_for(
    nodes: Sequence[Node], workers: int, each: Mapping[str, float], labels: Mapping[str, str]
) -> list[Machine]:
    """Return the machines that workers can be placed on.

    Args:
        nodes: all machines.
        workers: how many workers there are to place.
        each: what a worker takes beside processors, by the cluster's names.
        labels: what the labels of a machine must be: "value", "!value", "in(one, other)" or "!in(one, other)".

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
    machines = [Machine(resources.get("CPU", 0.0), _places(resources, each)) for resources in fit]
    if sum(machine.places for machine in machines) < workers:
        raise RecipeError(
            f"workers: {workers} workers of {', '.join(f'{each[name]:g} {name}' for name in each)} each do not fit on "
            f"{len(fit)} machine(s); set workers={max(1, sum(int(machine.places) for machine in machines))}"
        )
    return machines


def _places(resources: Mapping[str, float], each: Mapping[str, float]) -> float:
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
            "port open to this machine? Leave --address out to start Ray here"
        ) from None
