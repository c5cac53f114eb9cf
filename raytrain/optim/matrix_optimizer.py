"""Optimizers that treat hidden matrices as matrices, and leave embeddings, heads and vectors to AdamW."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from raytrain.optim.eager import without_compiler


class MatrixOptimizer(ABC, Optimizer):
    """Takes its own step on the matrices of groups marked `hidden`, and AdamW's on all other parameters.

    Args:
        params: parameters, or groups of them.
        adamw: lr, betas, eps and weight_decay.
        own: options of the step on matrices.
    """

    splits_hidden: ClassVar[bool] = True
    state_key: ClassVar[str]
    """An entry that the state of a matrix has, and that AdamW's has not."""

    def __init__(self, params: Any, adamw: dict[str, Any], own: dict[str, Any]) -> None:
        self._adamw = without_compiler(AdamW)([torch.zeros(1)], fused=True, **adamw)
        super().__init__(params, {**self._adamw.defaults, "hidden": False, **own})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        others = []
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            mine = [parameter for parameter in moved if self.handles(parameter, group)]
            rest = [parameter for parameter in moved if not self.handles(parameter, group)]
            self._forget(mine, rest)
            for matrix in mine:
                self.step_matrix(matrix, matrix.grad, group)
            others.append({**group, "params": rest})
        self._adamw.param_groups, self._adamw.state = others, self.state
        self._adamw.step()
        return loss

    def handles(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Return whether a parameter is a matrix for `move`."""
        return bool(group["hidden"]) and parameter.dim() == 2

    @abstractmethod
    def step_matrix(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Step on a matrix of a group."""

    def _forget(self, mine: list[Tensor], rest: list[Tensor]) -> None:
        """Drop the state of parameters that the other part stepped on, in a run that was resumed with other options."""
        for parameters, ours in ((mine, True), (rest, False)):
            for parameter in parameters:
                if parameter in self.state and (self.state_key in self.state[parameter]) != ours:
                    del self.state[parameter]


def orient(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a matrix turned so that its long side is its second, or turned back; `like` is the matrix unturned."""
    return tensor.T if like.shape[0] >= like.shape[1] else tensor
