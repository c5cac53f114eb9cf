"""Where the slots of a search are: processes of this machine, or actors on a Ray cluster."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from raytrain.data.source import ActorSource
from raytrain.launch.forkserver import start_forkserver
from raytrain.launch.resources import Node, nodes_here
from raytrain.recipe import Recipe
from raytrain.training.recipe import TrainRecipe
from search.launch.slots import SlotResources, SlotWorkers
from search.launch.trial_options import TrialOptions


@dataclass(frozen=True, slots=True)
class SlotBackend:
    """Where slots are.

    Attributes:
        nodes: that have what a worker takes.
        start: starts the processes of a slot.
    """

    nodes: Sequence[Node]
    start: Callable[[TrialOptions, SlotResources], SlotWorkers]


def searches_here(base: Recipe, address: str | None) -> bool:
    """Return whether slots are processes of this machine.

    They are without an address, where a member is trained by one process without a GPU; other members, and whole runs
    of other kinds, have Ray to place them.
    """
    if address is not None or not isinstance(base, TrainRecipe) or isinstance(base.task.source, ActorSource):
        return False
    return base.workers == 1 and not base.resources.extra_resources() and not base.resources.labels


def start_slot_server() -> None:
    """Start the server that slots on this machine are forked from, unless it runs; it imports torch meanwhile."""
    start_forkserver("search.launch.processes")


@contextlib.contextmanager
def slot_backend(base: Recipe, address: str | None, say: Callable[[str], None]) -> Iterator[SlotBackend]:
    """Yield where the slots of a search are, inside the `with` block.

    Args:
        base: the recipe whose fields are searched.
        address: of a Ray cluster, as in `RunOptions`.
        say: prints a line.

    Raises:
        RecipeError: a worker fits on no machine, or Ray cannot be reached or started.
    """
    if isinstance(base, TrainRecipe) and searches_here(base, address):
        start_slot_server()
        from search.launch.processes import SlotProcess  # noqa: PLC0415

        yield SlotBackend(nodes_here(1, base.resources), lambda options, each: SlotProcess(options))  # noqa: ARG005
        return
    from raytrain.launch.session import OWN_CLUSTER, cluster_nodes, ray_session  # noqa: PLC0415 - slow to import
    from search.launch.actors import SlotActors  # noqa: PLC0415

    cluster = None if address == OWN_CLUSTER else address
    say(f"connecting to Ray at {cluster}" if cluster else "starting Ray")
    with ray_session(cluster):
        nodes = cluster_nodes(base.workers, base.resources) if isinstance(base, TrainRecipe) else []
        yield SlotBackend(nodes, SlotActors)
