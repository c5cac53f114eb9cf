"""A task of one's own, trained on two workers, evaluated and loaded: python own_task.py."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from raytrain import Task, evaluate, load, train


def build_model(seed: int) -> nn.Module:
    """Return a small network with weights from a seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))


def read_points(split: Literal["train", "valid"]) -> list[tuple[Tensor, Tensor]]:
    """Return points, and whether they lie outside of a circle."""
    points = torch.randn(2000, 2, generator=torch.Generator().manual_seed({"train": 0, "valid": 1}[split]))
    return [(point, (point.norm() > 1.2).long()) for point in points]


def cross_entropies(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of each point."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


circle = Task(model=build_model, data=read_points, losses=cross_entropies)

result = train(circle, steps=300, workers=2, optimizer={"lr": 0.01}, log={"loggers": []})
print(result.status, evaluate(result))
print(load(result).module()(torch.tensor([[0.0, 0.0], [3.0, 0.0]])).argmax(dim=1))
