"""Spaces of the task `digits`: a network and its training recipe."""

from typing import Any

from search.chooser import Chooser
from search.spaces.recipe import adamw, choose_schedule

NORMS = ["none", "batch", "layer"]


def mlp(choose: Chooser) -> dict[str, Any]:
    """Multi-layer perceptrons of one to three hidden layers."""
    return {"task.model": "mlp", **_network(choose, [16, 32, 64, 128], layers=3)}


def cnn(choose: Chooser) -> dict[str, Any]:
    """Convolutional networks of one to three widths."""
    return {"task.model": "cnn", **_network(choose, [8, 16, 32, 64], layers=3), "task.depth": choose.int("depth", 1, 2)}


def _network(choose: Chooser, widths: list[int], layers: int) -> dict[str, Any]:
    chosen = [choose.ordered(f"width{layer}", widths) for layer in range(choose.int("layers", 1, layers))]
    return {
        "task.widths": chosen,
        "task.norm": choose.one_of("norm", NORMS),
        "task.dropout": choose.float("dropout", 0.0, 0.5),
        "batch": choose.ordered("batch", [16, 32, 64]),
        **adamw(choose, 1e-4, 3e-2),
        **choose_schedule(choose, 50),
    }
