"""Spaces of the task `classify`: how a pretrained model is fine-tuned."""

from typing import Any

from search.chooser import Chooser
from search.spaces.recipe import adamw, choose_schedule


def fine_tuning(choose: Chooser) -> dict[str, Any]:
    """Head, learning rate and schedule of full fine-tuning, or of a LoRA adapter of rank 2 to 16."""
    head = choose.one_of("head", ["own", "mean"])
    lora = choose.bool("lora")
    adapter = {"adapter.name": "lora", "adapter.r": choose.ordered("rank", [2, 4, 8, 16])} if lora else {}
    with choose.under("lora" if lora else "full"):  # adapters take learning rates ten times as high
        optimizer = adamw(choose, 1e-4, 3e-3) if lora else adamw(choose, 1e-5, 3e-4)
    return {
        "task.head": head,
        "task.head_init": choose.one_of("head_init", ["random", "prototypes", "discriminant"]),
        "batch": choose.ordered("batch", [8, 16, 32]),
        **adapter,
        **optimizer,
        **choose_schedule(choose, 100),
    }
