"""Evaluation over a whole split, exact for any number of replicas."""

import json
from collections.abc import Callable

import torch
from torch import nn

from raytrain.errors import TrainingError
from raytrain.sync.averaging import Averager
from raytrain.tasks.losses import loss_weights
from raytrain.tasks.task import Batch, Examples, Task
from raytrain.tensors import to_device, weighted_sum

Sums = dict[str, tuple[float, float]]


def evaluation_shard(count: int, rank: int, members: int) -> range:
    """Return the indices of `count` examples that replica `rank` evaluates; shards differ in size by one at most."""
    return range(count * rank // members, count * (rank + 1) // members)


def evaluate(
    task: Task,
    module: nn.Module,
    examples: Examples,
    batch: int,
    averager: Averager,
    *,
    autocast: torch.dtype | None = None,
    heartbeat: Callable[[], None] = lambda: None,
    required: bool = True,
) -> dict[str, float]:
    """Return metrics over all examples.

    Each replica evaluates a shard of the examples, which may be empty. Sums and counts are added in rank order, so no
    metric is a mean of means, and all replicas return the same. All run the model equally often, which a sharded model
    requires: a replica with fewer batches repeats an example that does not count.

    Args:
        task: with its metrics.
        module: the model, whose mode is restored.
        examples: of the split.
        batch: examples in a forward pass.
        averager: over the replicas.
        autocast: type of the forward pass, or None for that of the parameters.
        heartbeat: called after each batch.
        required: whether the task's metric has to be among them.

    Raises:
        TrainingError: the task's metric was not measured, and is required.
    """
    transport = averager.transport
    parameter = next(module.parameters())
    mine = evaluation_shard(len(examples), transport.rank, len(transport.members))
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
            found = measure_batch(
                task, module, to_device(task.collate(part), parameter.device, parameter.dtype), len(part)
            )
            _add(sums, found if indices else {})
            heartbeat()
    module.train(was_training)
    total: Sums = {}
    for sums_of_one in averager.all_gather_bytes(json.dumps(sums).encode()):
        _add(total, json.loads(sums_of_one))
    values = {name: value / count for name, (value, count) in total.items() if count > 0}
    if required and task.metric not in values:
        raise TrainingError(
            f"evaluation over {len(examples)} examples measured {', '.join(sorted(values)) or 'nothing'}, but the "
            f"task's metric is {task.metric!r}: look at the held-out data, Task.measure and Task.metric"
        )
    return values


def measure_batch(task: Task, module: nn.Module, batch: Batch, examples: int) -> Sums:
    """Return (sum, count) of each metric over a batch of `examples` examples."""
    if task.measure is not None:
        return {name: (float(value), float(count)) for name, (value, count) in task.measure(module, batch).items()}
    losses = task.losses(module, batch).double()
    weights = loss_weights(task, batch, examples, losses.device).double()
    return {"loss": (float(weighted_sum(losses, weights)), float(weights.sum()))}


def _add(total: Sums, more: Sums) -> None:
    for name, (value, count) in more.items():
        before = total.get(name, (0.0, 0.0))
        total[name] = (before[0] + value, before[1] + count)
