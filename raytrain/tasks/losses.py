"""Loss weights of a batch."""

import torch
from torch import Tensor

from raytrain.tasks.task import Batch, Task


def loss_weights(task: Task, batch: Batch, examples: int, device: torch.device) -> Tensor:
    """Return the weight of each loss of a batch, shape (n,), from `Task.weights` or 1."""
    return torch.ones(examples, device=device) if task.weights is None else task.weights(batch)
