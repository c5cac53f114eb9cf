"""The objective of a zeroth-order step: the loss, or a metric, on the micro-batches of one step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from raytrain.errors import RecipeError
from raytrain.tasks.task import Batch, Task
from raytrain.tensors import seed_everything_at, weighted_sum


def make_closure(
    task: Task,
    module: nn.Module,
    batches: Sequence[tuple[Batch, Tensor]],
    position: tuple[int, int, int] | tuple[()],
    autocast: torch.dtype | None,
    objective: str,
) -> Callable[[], Tensor]:
    """Return a closure of the mean loss over micro-batches, with the same dropout in every call.

    Args:
        task: of the model.
        module: the model.
        batches: micro-batches, each with the weights of its losses.
        position: the run's seed, the replica's rank and the step, which seed dropout; (): nothing is random.
        autocast: type to compute in; None: that of the parameters.
        objective: a metric of the task to maximize in place of the loss; with a leading minus, to minimize.

    Raises:
        RecipeError: the task has no such metric, or lower values of it are better.
    """
    total = sum(float(weights.sum()) for _, weights in batches) or 1.0
    device = next(module.parameters()).device
    lower, name = objective.startswith("-"), objective.removeprefix("-")
    if not lower and name and name == (task.metric if task.better == "lower" else "loss"):
        raise RecipeError(f"zo.objective: lower values of {name} are better; expected '-{name}', to minimize it")

    def closure() -> Tensor:
        if position:
            seed_everything_at(*position)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            if objective:
                value = torch.tensor(_mean_metric(task, module, batches, name), dtype=torch.float64)
                return value if lower else -value
            sums = [weighted_sum(task.losses(module, batch), weights) for batch, weights in batches]
        return torch.stack(sums).sum() / total

    return closure


def _mean_metric(task: Task, module: nn.Module, batches: Sequence[tuple[Batch, Tensor]], name: str) -> float:
    if task.measure is None:
        raise RecipeError(f"zo.objective: the task has no metrics; got {name!r}; '' is the loss")
    sums = [task.measure(module, batch) for batch, _ in batches]
    if name not in sums[0]:
        raise RecipeError(
            f"zo.objective: expected one of the task's metrics {', '.join(sorted(sums[0]))}; got {name!r}"
        )
    return sum(one[name][0] for one in sums) / (sum(one[name][1] for one in sums) or 1.0)
