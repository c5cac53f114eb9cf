"""Averages of the weights over steps, for evaluation."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Average(Protocol):
    """An average of a module's weights over steps."""

    def update(self, step: int) -> None:
        """Update the average after step `step`, counted from 1."""
        ...

    def average_parameters(self) -> AbstractContextManager[None]:
        """Swap the averages into the module inside the `with` block; restore its parameters after it."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return name -> averaged parameter."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        ...


def make_average(module: nn.Module, optimizer: Optimizer, decay: float) -> Average | None:
    """Return the average to evaluate: an `Ema` if `decay` > 0, else the optimizer's own, else None."""
    if decay:
        return Ema(module, decay)
    return OptimizerAverage(module, optimizer) if averages_weights(optimizer) else None


def averages_weights(optimizer: Optimizer | type[Optimizer]) -> bool:
    """Return whether an optimizer averages the weights itself, and so has `train()` and `eval()`."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


class OptimizerAverage:
    """The average of a schedule-free optimizer, by its `eval()` and `train()` (Defazio et al. 2024).

    It follows from the parameters and the optimizer's state, so there is nothing to load. The parameters are copied
    before `eval()`, because `eval()` and `train()` together round.

    Args:
        module: the model.
        optimizer: of its parameters; put into its training mode.
    """

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        self._live = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self._optimizer = optimizer
        self._optimizer.train()

    def update(self, step: int) -> None:
        """Do nothing: the optimizer updates its average."""

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Swap the averages into the module inside the `with` block; restore its parameters after it."""
        aside = {name: parameter.detach().clone() for name, parameter in self._live.items()}
        self._optimizer.eval()
        try:
            yield
        finally:
            self._optimizer.train()
            for name, parameter in self._live.items():
                parameter.data.copy_(aside[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return name -> averaged parameter."""
        with self.average_parameters():
            return {name: parameter.detach().clone() for name, parameter in self._live.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: the average follows from what the parameters and the optimizer loaded."""


class Ema:
    """Exponential moving average of the trainable parameters of a module.

    After step t, from 1: mean <- d * mean + (1 - d) * parameter with d = min(decay, t / (t + 9)). The smaller decay of
    the first steps forgets the random initialization soon.

    Args:
        module: the model; the average starts as a copy of its parameters.
        decay: in (0, 1); the average covers about 1 / (1 - decay) steps.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self._mean = {name: parameter.detach().clone() for name, parameter in self._live.items()}

    def update(self, step: int) -> None:
        """Update the average after step `step`, counted from 1."""
        weight = 1.0 - min(self._decay, step / (step + 9))
        torch._foreach_lerp_(list(self._mean.values()), [value.detach() for value in self._live.values()], weight)

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Swap the averages into the module inside the `with` block; restore its parameters after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """Return name -> averaged parameter."""
        return dict(self._mean)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; the average of a parameter that was frozen then is the parameter."""
        for name, value in self._mean.items():
            value.copy_(state.get(name, self._live[name].detach()))

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._live.items():
            kept = parameter.clone()
            parameter.copy_(self._mean[name])  # in place, as others hold references to the parameter's memory
            self._mean[name].copy_(kept)
