"""What `raytrain check` says of a federated recipe: its clients, the bytes of a round, the memory of a process."""

from collections.abc import Iterable

from federated.broadcast import payload_bytes
from federated.build import SIZES_SHOWN, initial_module, partition_of, protocol_of, task_of
from federated.partition import Partition
from federated.recipe import FederateRecipe
from raytrain.run.result import Result

ENVELOPE_DOWN_BYTES, ENVELOPE_UP_BYTES = 325, 391
"""What Flower 1.41 adds to a payload and to a report, to 16 bytes: headers of its objects, ids, names. A reply also
names the message that it answers, by 64 characters."""
SMALL_FALL = 0.1
"""Of the loss in a whole run, as a share of that at the start, below which the learning rate is to blame."""
COPIES = 3
"""Of the model in a process: w0, the model of the round, and the working copy of a client."""


def federated_preview(recipe: FederateRecipe) -> list[str]:
    """Return what follows from a recipe before anything is started.

    Raises:
        RecipeError: the recipe does not fit the data or the model.
    """
    task = task_of(recipe)
    partition = partition_of(recipe, task)
    parameters = [parameter for parameter in initial_module(recipe, task).parameters() if parameter.requires_grad]
    size = sum(parameter.nbytes for parameter in parameters)
    head = [run_summary(recipe, partition), ""]
    if not recipe.seeded:
        return [*head, f"{recipe.strategy.name} sends {size:,} bytes of parameters down and as many up."]
    return [
        *head,
        *preview_table(traffic_rows(recipe, partition.clients)),
        f"FedAvg of the same parameters sends {size:,} bytes down and as many up.",
        f"Each process keeps {COPIES} copies of the parameters: {COPIES * size:,} bytes.",
    ]


def run_summary(recipe: FederateRecipe, partition: Partition) -> str:
    """Return a line about a run: its clients, its rounds and its protocol."""
    sizes = [partition.size(client) for client in range(min(partition.clients, SIZES_SHOWN))]
    drawn = ", drawn with replacement" if partition.with_replacement else ""
    return (
        f"{recipe.name}: {partition.clients:,} clients ({recipe.partition.name}; {min(sizes)} to {max(sizes)} "
        f"examples{drawn}), {recipe.clients.per_round:,} a round, {recipe.rounds:,} rounds of {recipe.protocol.name} "
        f"with {recipe.protocol.local_steps} local steps"
    )


def advice_on_learning_rate(recipe: FederateRecipe, result: Result) -> list[str]:
    """Return a line for a run without gradients whose loss moved little or the wrong way; nothing for another.

    >>> from raytrain.run.result import Result
    >>> recipe = FederateRecipe.parse({"kind": "federate", "task": "digits", "optimizer": {"lr": 1e-5}})
    >>> ended = Result("done", metrics={"loss": 1.01}, references={"loss_at_start": 1.06})
    >>> advice_on_learning_rate(recipe, ended)
    ['the loss fell by 5%: try a larger optimizer.lr; it is 1e-05, and networks from random weights take 1e-3 to 1e-2']
    """
    before, after = result.references.get("loss_at_start"), result.metrics.get("loss")
    if not recipe.seeded or result.status != "done" or not before or after is None:
        return []
    fall, lr = 1 - after / before, recipe.optimizer.arguments()["lr"]
    if not fall > 0:
        return [f"the loss rose: try a smaller optimizer.lr; it is {lr:g}"]
    if fall < SMALL_FALL:
        usual = "networks from random weights take 1e-3 to 1e-2"
        return [f"the loss fell by {fall:.0%}: try a larger optimizer.lr; it is {lr:g}, and {usual}"]
    return []


def traffic_rows(recipe: FederateRecipe, clients: int) -> list[list[str]]:
    """Return the bytes of one client in a round: of payload and report, and with what Flower adds to each message.

    Args:
        recipe: of the run.
        clients: how many there are, of which `clients.per_round` take part in a round.
    """
    protocol, heard = protocol_of(recipe), recipe.clients.per_round
    period = max(1, round(clients / heard))
    rows = [["bytes of a client in a round", "down", "up", "with Flower's envelopes"]]
    for missed, when in {1: "took part in the last round", period: f"takes part every {period:,} rounds"}.items():
        down, up = payload_bytes(protocol, heard, missed)
        shipped_down, shipped_up = down + ENVELOPE_DOWN_BYTES, up + ENVELOPE_UP_BYTES
        shipped = f"{shipped_down:,} + {shipped_up:,} = {shipped_down + shipped_up:,}"
        rows.append([when, f"{down:,}", f"{up:,}", shipped])
    return rows


def preview_table(rows: Iterable[list[str]]) -> list[str]:
    """Return rows of cells as lines with columns."""
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in cells
    ]
