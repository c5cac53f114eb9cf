"""The `ServerApp` of a deployment: it plays the rounds of a recipe with the clients of SuperNodes."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from federated.build import task_of
from federated.encodings import PayloadError
from federated.flower.deployed import WHO, introduced, recipe_of
from federated.flower.guard import check_closed
from federated.flower.runs import FederatedRun, run_of
from federated.flower.seed_run import SeedRun
from federated.records import RunRecords
from federated.results import result_of
from raytrain.errors import RecipeError
from raytrain.run.directory import RunDirectory
from raytrain.terminal import printable_line
from raytrain.training.build import options_from_data

ARRIVAL_SECONDS = 1.0
INTRODUCTION_SECONDS = 120.0
"""How long a client may take to say who it is: its process starts, and builds the model."""

logger = logging.getLogger(__name__)

app = ServerApp()


@app.main()
def serve_federated(grid: Grid, context: Context) -> None:
    """Play the rounds of the recipe that the run's configuration names, from what its folder holds of them.

    Raises:
        RecipeError: the deployment is open to strangers, or the recipe is wrong.
    """
    config = context.run_config
    check_closed("flower-superlink", insecure=bool(config.get("insecure", False)))
    directory = RunDirectory(Path(str(config["out"])).absolute())
    recipe = recipe_of(config)
    recipe = recipe.with_overrides(options_from_data(task_of(recipe), directory))
    torch.set_num_threads(recipe.threads())
    run = run_of(recipe)
    with directory.session(resume=directory.recipe.is_file()):
        run.resume(directory.path)
        directory.prepare(recipe.to_toml())
        nodes = nodes_of(grid, run, float(str(config["wait-seconds"])))
        directory.record_attempt(recipe.to_toml(), run.version, [{"nodes": len(nodes)}])
        with RunRecords(directory, run, every=recipe.evaluation.every) as records:
            for played in run.play(grid, nodes, directory.path, records.add):
                heard = f"heard {len(played.heard)} of {len(played.clients)}"
                print(f"round {played.number + 1}/{recipe.rounds}: {heard}", flush=True)
        size, done = run.parameter_bytes(), run.is_done()
        directory.write_result(result_of(directory, run.task, size, done=done, error=""))


def nodes_of(grid: Grid, run: FederatedRun, wait_seconds: float) -> list[int]:
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


def _problem(run: FederatedRun, client: int, origin: str, known: Mapping[int, int]) -> str:
    """Return why a node cannot take part as the client that it says it is; "": it can."""
    if client >= run.partition.clients or client in known:
        return f"expected a client below {run.partition.clients} that is not there yet; got {client}"
    try:
        if isinstance(run, SeedRun):
            run.server.check_origin(client, origin)
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
