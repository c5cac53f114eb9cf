"""Weights of the losses of a batch."""

import torch
from torch import Tensor

from raytrain.tasks.task import Batch, Task


def loss_weights(task: Task, batch: Batch, examples: int, device: torch.device) -> Tensor:
    """Return what each loss of a batch counts, shape (n,); without `Task.weights`, an example's one loss counts 1."""
    return torch.ones(examples, device=device) if task.weights is None else task.weights(batch)
