"""Placement of workers on the nodes of a cluster."""

import math
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytrain.errors import RecipeError
from raytrain.sections import Resources

REACH_SECONDS = 5.0
MOST_ACTORS = 8


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a cluster that workers can be placed on.

    Attributes:
        cpus: CPUs of the node.
        slots: workers that fit by the other resources they take.
    """

    cpus: float
    slots: float = math.inf

    def fits(self, cpus: float) -> int:
        """Return how many workers of `cpus` CPUs fit."""
        return int(min(_count(self.cpus, cpus), self.slots))


NodeResources = tuple[Mapping[str, float], Mapping[str, str]]
"""Amounts of a node by resource, and its labels, as Ray reports them."""


@dataclass(frozen=True, slots=True)
class CpuShare:
    """CPUs of a worker and of its data actors.

    Attributes:
        cpus: of the worker.
        actors: data actors of the worker.
        actor_cpus: of each actor; 0: they share those of the worker.
    """

    cpus: float
    actors: int = 0
    actor_cpus: float = 0.0

    @property
    def total(self) -> float:
        """Return the CPUs of the worker and its actors."""
        return self.cpus + self.actors * self.actor_cpus


def available_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def allocate_cpus(nodes: Sequence[Node], workers: int, cpus: float, actors: int, actor_cpus: float) -> CpuShare:
    """Return the CPUs of each worker and of its data actors.

    Actors for which no CPU is left share those of their worker, which would otherwise wait for them for ever.

    Args:
        nodes: eligible nodes.
        workers: to be placed.
        cpus: of each worker, as the recipe says; 0: as many whole ones as leave room for its actors.
        actors: of each worker; 0: as many as fit beside the workers, at least one.
        actor_cpus: of each actor.

    Raises:
        RecipeError: the workers do not fit.
    """
    for per_worker in _choices(nodes, cpus):
        room = _actor_room(nodes, workers, per_worker, actor_cpus) // workers
        if room >= max(1, actors):
            return CpuShare(per_worker, actors or min(room, MOST_ACTORS), actor_cpus)
    return CpuShare(cpus_per_worker(nodes, workers, cpus), max(1, actors))


def _actor_room(nodes: Sequence[Node], workers: int, cpus: float, actor_cpus: float) -> int:
    """Return how many actors fit beside workers that fill one node after the other; 0 if the workers do not fit."""
    room = 0
    for node in nodes:
        here = min(workers, node.fits(cpus))
        workers -= here
        room += _count(node.cpus - here * cpus, actor_cpus)
    return 0 if workers else room


def _choices(nodes: Sequence[Node], cpus: float) -> Sequence[float]:
    return [cpus] if cpus else range(int(max((node.cpus for node in nodes), default=0)), 0, -1)


def _count(available: float, amount: float) -> int:
    """Return how many times an amount fits, counted as Ray does: in ten-thousandths."""
    return round(available * 10_000) // max(1, round(amount * 10_000))


def eligible_nodes(
    nodes: Sequence[NodeResources],
    workers: int,
    per_worker: Mapping[str, float],
    labels: Mapping[str, str],
    placement: str = "PACK",
) -> list[Node]:
    """Return the nodes that workers can be placed on.

    Args:
        nodes: all nodes of the cluster.
        workers: to be placed.
        per_worker: resources of each worker beside CPUs, by Ray's names.
        labels: label -> "value", "!value", "in(one, other)" or "!in(one, other)", which all nodes must match.
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
    for name, amount in per_worker.items():
        if sum(_count(resources.get(name, 0.0), amount) for resources in fit) < workers:
            raise _lacking(name, amount, workers, sum(resources.get(name, 0.0) for resources in fit), fit)
    found = [Node(resources.get("CPU", 0.0), _slots(resources, per_worker)) for resources in fit]
    if sum(node.slots for node in found) < workers:
        raise RecipeError(
            f"workers: {workers} workers of {', '.join(f'{per_worker[name]:g} {name}' for name in per_worker)} each do "
            f"not fit on {len(fit)} machine(s); set workers={max(1, sum(int(node.slots) for node in found))}"
        )
    return _strict(found, workers, placement)


def _strict(nodes: Sequence[Node], workers: int, placement: str) -> list[Node]:
    """Return the nodes as a strict placement sees them."""
    if placement == "STRICT_SPREAD":
        if len(nodes) < workers:
            raise RecipeError(
                f"resources.placement: STRICT_SPREAD takes a machine for each of {workers} workers, and there are "
                f"{len(nodes)} that have what a worker takes; set resources.placement=SPREAD, or workers to fewer"
            )
        return [Node(node.cpus, min(node.slots, 1)) for node in nodes]
    if placement == "STRICT_PACK":
        roomy = [node for node in nodes if node.slots >= workers]
        if not roomy:
            raise RecipeError(
                f"resources.placement: STRICT_PACK takes one machine for {workers} workers, and the largest has room "
                f"for {max(int(node.slots) for node in nodes)}; set resources.placement=PACK, or workers to fewer"
            )
        return [max(roomy, key=lambda node: node.cpus)]
    return list(nodes)


def _slots(resources: Mapping[str, float], per_worker: Mapping[str, float]) -> float:
    """Return how many workers fit on a node by the resources that they take beside CPUs."""
    return min((_count(resources.get(name, 0.0), amount) for name, amount in per_worker.items()), default=math.inf)


def _lacking(name: str, amount: float, workers: int, there: float, fit: Sequence[Mapping[str, float]]) -> RecipeError:
    """Return the error of workers that do not fit by their amount of the resource `name`."""
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
    """Return whether a label matches Ray's selector `wanted`; a missing label equals no value."""
    inside = re.fullmatch(r"in\((.*)\)", wanted.removeprefix("!"))
    values = [value.strip() for value in inside[1].split(",")] if inside else [wanted.removeprefix("!")]
    return (have in values) is not wanted.startswith("!")


def cpus_per_worker(nodes: Sequence[Node], workers: int, cpus: float) -> float:
    """Return the CPUs of each worker.

    Args:
        nodes: eligible nodes.
        workers: to be placed.
        cpus: of each worker, as the recipe says; 0: as many whole ones as fit.

    Raises:
        RecipeError: the workers do not fit.
    """
    for per_worker in _choices(nodes, cpus):
        if sum(node.fits(per_worker) for node in nodes) >= workers:
            return per_worker
    per_worker = cpus or 1
    fit = sum(node.fits(per_worker) for node in nodes)
    there = " + ".join(f"{node.cpus:g}" for node in nodes) or "no"
    if cpus and not fit:
        raise RecipeError(
            f"resources.cpus: a worker of {per_worker:g} CPU does not fit on any machine: they have {there} CPUs"
        )
    shared = math.floor(100 * max(1, sum(node.cpus for node in nodes)) / workers) / 100
    raise RecipeError(
        f"workers: {workers} workers of {per_worker:g} CPU each do not fit on {len(nodes)} machine(s) with {there} "
        f"CPUs; set workers={max(1, fit)}, or resources.cpus={shared:g} to share CPUs"
    )


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


def nodes_here(workers: int, resources: Resources) -> list[Node]:
    """Return this machine as the only node of a private cluster.

    Raises:
        RecipeError: it lacks a resource of a worker.
    """
    here: NodeResources = ({"CPU": available_cpus()}, {})
    return eligible_nodes([here], workers, resources.custom, resources.labels, resources.placement)
