"""Proxies of attention heads."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from raytrain.errors import TrainingError
from search.proxies.minibatch import Minibatch, working_copy

SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""Of torch's `scaled_dot_product_attention`, as far as they have a position."""


def head_confidence(module: nn.Module, batch: Minibatch) -> float:
    """Sum over heads, and their queries, keys and values, of the mean of the largest at any position.

    Of a query, say, of shape (examples, positions, channels) that is the maximum over positions, and the mean over
    examples and channels.

    Source: Serianni and Kalita 2023, Training-free NAS for RNNs and Transformers: attention confidence in their code.

    Raises:
        TrainingError: the model has no attention.
    """
    calls = _attention_calls(module, batch, "head-confidence")
    return sum(
        float(call[name].amax(dim=-2).mean(dim=(0, 2)).sum()) for call in calls for name in ("query", "key", "value")
    )


def softmax_confidence(module: nn.Module, batch: Minibatch) -> float:
    """Sum over heads of the mean, over examples and positions, of the largest attention weight.

    Source: Serianni and Kalita 2023; a head's confidence is that of Voita et al. 2019.

    Raises:
        TrainingError: the model has no attention.
    """
    calls = _attention_calls(module, batch, "softmax-confidence")
    return sum(float(attention_weights(**call).amax(dim=-1).mean(dim=(0, 2)).sum()) for call in calls)


def attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """Return the weights softmax(scale Q K^T + mask), shape (examples, heads, positions, keys).

    Args:
        query: shape (examples, heads, positions, channels).
        key: shape (examples, groups, keys, channels); each group of keys serves as many heads.
        attn_mask: boolean, True where a key is seen, or what is added; broadcast to the shape of the weights.
        is_causal: whether position i sees keys 0 to i only.
        scale: default: 1 / sqrt(channels).
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(dim=-1)


class _Calls(TorchFunctionMode):
    """Records the arguments of each call of torch's attention in a `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[Mapping[str, Any]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],  # noqa: ARG002 - torch's signature
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func is scaled_dot_product_attention:
            self.recorded.append({**dict(zip(SDPA_ARGUMENTS, args, strict=False)), **named})
        return func(*args, **named)


def _attention_calls(module: nn.Module, batch: Minibatch, proxy: str) -> list[Mapping[str, Any]]:
    """Return the arguments of each call of attention in a forward pass."""
    with working_copy(module) as working, torch.no_grad(), _Calls() as calls:
        batch.loss(working)
    recorded: list[Mapping[str, Any]] = calls.recorded
    if not recorded:
        raise TrainingError(
            f"{proxy}: expected a model that calls torch's scaled_dot_product_attention; {type(module).__name__} does "
            'not; of a Hugging Face model, load it with attention "sdpa"'
        )
    return recorded
