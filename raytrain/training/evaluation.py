"""Evaluation over a whole split, exact on any number of replicas."""

import json
from collections.abc import Callable

import torch
from torch import nn

from raytrain.errors import TrainingError
from raytrain.sync.averaging import Exchange
from raytrain.tasks.losses import loss_weights
from raytrain.tasks.task import Batch, Examples, Task
from raytrain.tensors import to_device, weighted_sum

Sums = dict[str, tuple[float, float]]


def share(count: int, rank: int, members: int) -> range:
    """Return the part of `count` things that replica `rank` of `members` takes; the parts differ by one at most."""
    return range(count * rank // members, count * (rank + 1) // members)


def evaluate(
    task: Task,
    module: nn.Module,
    examples: Examples,
    batch: int,
    exchange: Exchange,
    *,
    autocast: torch.dtype | None = None,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return the measured values over all the examples.

    Each replica measures a part of them, which may be empty; sums and counts are added in the order of the replicas, so
    no value is a mean of means and all replicas return the same. All run the model equally often, as a sharded one asks
    for: whoever has fewer batches runs an example for nothing, while the others are still at work.

    Args:
        task: what to measure.
        module: the model; it is left in the mode it was in.
        examples: the split.
        batch: examples at a time.
        exchange: the replicas.
        autocast: the type to compute in, or None for that of the parameters.
        beat: called after each batch, to show that the evaluation is alive.

    Raises:
        TrainingError: the task's metric was not measured.
    """
    transport = exchange.transport
    parameter = next(module.parameters())
    mine = share(len(examples), transport.rank, len(transport.members))
    longest = -(-len(examples) // len(transport.members))
    starts = range(mine.start, mine.start + longest, batch)
    was_training = module.training
    module.eval()
    sums: Sums = {}
    # Not inference_mode: what a model keeps from a forward pass (a mask, a table) must serve the next training step.
    with torch.no_grad(), torch.autocast(parameter.device.type, dtype=autocast, enabled=autocast is not None):
        for start in starts:
            indices = range(start, min(start + batch, mine.stop))
            part = [examples[index] for index in indices or [0]]
            found = measure(task, module, to_device(task.collate(part), parameter.device, parameter.dtype), len(part))
            _add(sums, found if indices else {})
            beat()
    module.train(was_training)
    total: Sums = {}
    for sums_of_one in exchange.gather(json.dumps(sums).encode()):
        _add(total, json.loads(sums_of_one))
    values = {name: value / count for name, (value, count) in total.items() if count > 0}
    if task.metric not in values:
        raise TrainingError(
            f"evaluation over {len(examples)} examples measured {', '.join(sorted(values)) or 'nothing'}, but the "
            f"task's metric is {task.metric!r}: look at the held-out data, Task.measure and Task.metric"
        )
    return values


def measure(task: Task, module: nn.Module, batch: Batch, examples: int) -> Sums:
    """Return (sum, count) of each measured value of one batch of `examples`."""
    if task.measure is not None:
        return {name: (float(value), float(count)) for name, (value, count) in task.measure(module, batch).items()}
    losses = task.losses(module, batch).double()
    weights = loss_weights(task, batch, examples, losses.device).double()
    return {"loss": (float(weighted_sum(losses, weights)), float(weights.sum()))}


def _add(total: Sums, more: Sums) -> None:
    for name, (value, count) in more.items():
        before = total.get(name, (0.0, 0.0))
        total[name] = (before[0] + value, before[1] + count)
