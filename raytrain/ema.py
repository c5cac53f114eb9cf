"""An exponential moving average of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """Averages the parameters of a module over steps; buffers are the module's own.

    After step t (from 1) the average moves by 1 - min(decay, t / (t + 9)) towards the parameters: a short memory at
    first, so that the random start is soon forgotten.

    Args:
        module: whose parameters; the average starts as a copy of them.
        decay: in (0, 1); the average reaches back about 1 / (1 - decay) steps.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = dict(module.named_parameters())
        self._mean = {name: parameter.detach().clone() for name, parameter in self._live.items()}

    def update(self, step: int) -> None:
        """Move the average towards the parameters after step `step`, counted from 1."""
        share = 1.0 - min(self._decay, step / (step + 9))
        torch._foreach_lerp_(list(self._mean.values()), [value.detach() for value in self._live.values()], share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the module hold the average inside the `with` block, and its own parameters after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """Return name -> averaged parameter."""
        return dict(self._mean)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        for name, value in self._mean.items():
            value.copy_(state[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._live.items():
            kept = parameter.clone()
            parameter.copy_(self._mean[name])  # in place: whoever computes with the parameter knows its memory
            self._mean[name].copy_(kept)
