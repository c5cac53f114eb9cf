"""Averages of the weights, which are evaluated in their place."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Average(Protocol):
    """An average of the weights of a module."""

    def update(self, step: int) -> None:
        """Learn that step `step`, counted from 1, is done."""
        ...

    def average_parameters(self) -> AbstractContextManager[None]:
        """Let the module hold the average inside the `with` block, and its own parameters, to the bit, after it."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return name -> averaged parameter."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        ...


def make_average(module: nn.Module, optimizer: Optimizer, decay: float) -> Average | None:
    """Return the average that is evaluated: an `Ema` if `decay` is above 0, else the optimizer's own if it has one."""
    if decay:
        return Ema(module, decay)
    return OptimizerAverage(module, optimizer) if averages_weights(optimizer) else None


def averages_weights(optimizer: Optimizer | type[Optimizer]) -> bool:
    """Return whether an optimizer averages the weights itself: it then has a mode to train and one to evaluate in."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


class OptimizerAverage:
    """The average that an optimizer without a schedule keeps, seen through its `eval()` and `train()`.

    It follows from the parameters and the optimizer's state, so there is nothing to load. The parameters that training
    goes on from are kept aside meanwhile, because the way there and back rounds.

    Args:
        module: whose parameters.
        optimizer: of these parameters; it is put into its mode for training.
    """

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        self._live = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self._optimizer = optimizer
        self._optimizer.train()

    def update(self, step: int) -> None:
        """Do nothing: the optimizer did."""

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Let the module hold the average inside the `with` block, and its own parameters after it."""
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
    """Averages the trained parameters of a module over steps; all others, and buffers, are the module's own.

    After step t (from 1) the average moves by 1 - min(decay, t / (t + 9)) towards the parameters: a short memory at
    first, so that the random start is soon forgotten.

    Args:
        module: whose parameters; the average starts as a copy of them.
        decay: in (0, 1); the average reaches back about 1 / (1 - decay) steps.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self._mean = {name: parameter.detach().clone() for name, parameter in self._live.items()}

    def update(self, step: int) -> None:
        """Move the average towards the parameters after step `step`, counted from 1."""
        share = 1.0 - min(self._decay, step / (step + 9))
        torch._foreach_lerp_(list(self._mean.values()), [value.detach() for value in self._live.values()], share)

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
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
        """Put back what `state_dict` returned; what was frozen then begins as the parameter, which did not move."""
        for name, value in self._mean.items():
            value.copy_(state.get(name, self._live[name].detach()))

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._live.items():
            kept = parameter.clone()
            parameter.copy_(self._mean[name])  # in place: whoever computes with the parameter knows its memory
            self._mean[name].copy_(kept)
