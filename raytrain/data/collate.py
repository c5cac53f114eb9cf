"""Padded batches of token sequences, and the token losses of a causal language model."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raytrain.tensors import at_least_float32

IGNORE_INDEX = -100
"""Target of positions without a loss, as in torch's cross_entropy."""

Tokens = Sequence[int]


def pad(rows: Sequence[Tokens], pad_id: int, *, left: bool = False) -> Tensor:
    """Pad rows to the longest, shape (rows, longest).

    >>> pad([[5, 6], [7]], 0).tolist()
    [[5, 6], [7, 0]]
    """
    longest = max(len(row) for row in rows)
    table = np.full((len(rows), longest), pad_id, np.int64)
    for place, row in enumerate(rows):
        table[place, slice(longest - len(row), None) if left else slice(len(row))] = row
    return torch.from_numpy(table)


def model_inputs(rows: Sequence[Tokens], pad_id: int, *, left: bool = False) -> dict[str, Tensor]:
    """Return {"input_ids", "attention_mask"}, each of shape (rows, longest); the mask is 0 at padding."""
    ones = [[1] * len(row) for row in rows]
    return {"input_ids": pad(rows, pad_id, left=left), "attention_mask": pad(ones, 0, left=left)}


def lm_batch(rows: Sequence[Tokens], targets: Sequence[Tokens], pad_id: int) -> dict[str, Tensor]:
    """Return a batch of a causal language model, for `token_losses`.

    Args:
        rows: input tokens.
        targets: for each input token the next token, or `IGNORE_INDEX`.
        pad_id: padding token.

    Returns:
        What `model_inputs` returns; "keep", the positions with a target in any row, shape (kept,); and "targets" at
        these, shape (rows, kept).
    """
    table = pad(targets, IGNORE_INDEX)
    keep = (table != IGNORE_INDEX).any(dim=0).nonzero()[:, 0]
    return {**model_inputs(rows, pad_id), "keep": keep, "targets": table[:, keep]}


def target_logits(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits at the kept positions, (rows, kept, vocabulary), in float32 at least."""
    keep = batch["keep"]
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits = module(**given, use_cache=False, logits_to_keep=keep).logits
    return at_least_float32(
        logits if logits.shape[1] == len(keep) else logits[:, keep]
    )  # some models ignore logits_to_keep


def token_losses(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss at each kept position, shape (rows * kept,), 0 without a target."""
    return token_cross_entropy(target_logits(module, batch), batch["targets"])


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each prediction, shape (rows * predictions,), 0 without a target.

    Args:
        logits: shape (rows, predictions, vocabulary).
        targets: shape (rows, predictions).
    """
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE_INDEX)


def token_weights(batch: dict[str, Tensor]) -> Tensor:
    """Return 1 for each kept position with a target and 0 for others, shape (rows * kept,)."""
    return (batch["targets"].flatten() != IGNORE_INDEX).float()
