"""Spaces of the task `text`: a language model on bytes and its training recipe."""

from typing import Any

from search.chooser import Chooser
from search.spaces.recipe import adamw, choose_schedule


def gpt(choose: Chooser) -> dict[str, Any]:
    """GPT-2 on bytes, of up to 8 layers and 512 units."""
    return {**_transformer(choose), "task.model": "gpt", "task.dropout": choose.ordered("dropout", [0.0, 0.1, 0.2])}


def llama(choose: Chooser) -> dict[str, Any]:
    """Llama on bytes, of up to 8 layers and 512 units."""
    return {**_transformer(choose), "task.model": "llama"}


def rnn(choose: Chooser) -> dict[str, Any]:
    """Recurrent networks on bytes (Elman, GRU, LSTM), of up to 4 layers and 512 units."""
    return {
        "task.tokens": "bytes",
        "task.model": choose.one_of("cell", ["elman", "gru", "lstm"]),
        "task.layers": choose.int("layers", 1, 4),
        "task.width": choose.ordered("width", [32, 64, 128, 256, 512]),
        "task.dropout": choose.ordered("dropout", [0.0, 0.1, 0.2]),
        **_training(choose),
    }


def _transformer(choose: Chooser) -> dict[str, Any]:
    heads = choose.ordered("heads", [2, 4, 8])
    return {
        "task.tokens": "bytes",
        "task.layers": choose.int("layers", 1, 8),
        "task.heads": heads,
        "task.width": heads * choose.ordered("head_width", [16, 32, 64]),
        **_training(choose),
    }


def _training(choose: Chooser) -> dict[str, Any]:
    return {
        "batch": choose.ordered("batch", [8, 16, 32]),
        **adamw(choose, 3e-4, 1e-2),
        **choose_schedule(choose, 100),
    }
