"""Which client is on which node: asked at the start of a run, because nodes have names of their own."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from federated.encodings import PayloadError
from federated.flower.deployed import WHO, introduced
from federated.flower.seed_run import SeedRun
from federated.flower.strategy_run import StrategyRun
from raytrain.errors import RecipeError
from raytrain.terminal import printable_line

ARRIVAL_SECONDS = 1.0
INTRODUCTION_SECONDS = 120.0
"""How long a client may take to say who it is: its process starts, and builds the model."""

logger = logging.getLogger(__name__)


def nodes_of(grid: Grid, run: SeedRun | StrategyRun, wait_seconds: float) -> list[int]:
    """Return the node of each client, as soon as all are there; client i is the one that says so.

    Raises:
        RecipeError: not all are there in time.
    """
    known: dict[int, int] = {}
    left_out: set[int] = set()
    give_up, count = time.monotonic() + wait_seconds, run.partition.clients
    while len(known) < count:
        if time.monotonic() > give_up:
            raise RecipeError(f"clients.count: expected {count} clients within {wait_seconds:g} s; got {len(known)}")
        for node, client, origin in _ask_who(grid, set(grid.get_node_ids()) - left_out - {*known.values()}):
            if problem := _problem(run, client, origin, known):
                left_out.add(node)
                logger.warning("node %d is left out: %s", node, problem)
            else:
                known[client] = node
        time.sleep(ARRIVAL_SECONDS)
    return [known[client] for client in range(count)]


def _problem(run: SeedRun | StrategyRun, client: int, origin: str, known: Mapping[int, int]) -> str:
    """Return why a node cannot take part as the client that it says it is; "": it can."""
    if client >= run.partition.clients or client in known:
        return f"expected a client below {run.partition.clients} that is not there yet; got {client}"
    try:
        run.check_origin(client, origin)
    except RecipeError as error:
        return printable_line(str(error))
    return ""


def _ask_who(grid: Grid, nodes: Iterable[int]) -> Iterator[tuple[int, int, str]]:
    """Yield (node, client, digest of what it begins with) of each node that answers."""
    sent = [Message(RecordDict(), dst_node_id=node, message_type=f"query.{WHO}") for node in sorted(nodes)]
    for reply in grid.send_and_receive(sent, timeout=INTRODUCTION_SECONDS) if sent else []:
        node = reply.metadata.src_node_id
        try:
            if reply.has_error():
                raise PayloadError(reply.error.reason or "no reason given")
            yield node, *introduced(reply.content)
        except PayloadError as error:
            logger.warning("node %d does not say who it is: %s", node, printable_line(str(error)))
