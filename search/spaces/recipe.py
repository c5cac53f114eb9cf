"""Parts of spaces that most recipes share."""

from typing import Any

from search.chooser import Chooser


def adamw(choose: Chooser, low: float, high: float) -> dict[str, Any]:
    """Return an AdamW: learning rate between two bounds, weight decay and the averaging of its squared gradients."""
    return {
        "optimizer.name": "adamw",
        "optimizer.lr": choose.float("lr", low, high, log=True),
        "optimizer.weight_decay": choose.float("weight_decay", 1e-3, 0.5, log=True),
        "optimizer.betas": [0.9, choose.float("beta2", 0.9, 0.999, one_minus=True)],
    }


def choose_schedule(choose: Chooser, warmup: int) -> dict[str, Any]:
    """Return a schedule: its shape, up to `warmup` steps of warm-up, and the final learning rate."""
    return {
        "schedule.name": choose.one_of("schedule", ["linear", "cosine", "wsd"]),
        "schedule.warmup": choose.int("warmup", 0, warmup),
        "schedule.min_lr_ratio": choose.ordered("min_lr_ratio", [0.0, 0.03, 0.1]),
    }
