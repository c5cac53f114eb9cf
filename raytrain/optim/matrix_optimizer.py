"""Base class of optimizers for hidden matrices, with AdamW for embeddings, heads and vectors."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from raytrain.optim.eager import without_compiler


class MatrixOptimizer(ABC, Optimizer):
    """Updates matrices of groups with `hidden` = True by a step of its own, and other parameters by AdamW.

    Args:
        params: parameters, or groups of them.
        adamw: lr, betas, eps and weight_decay.
        own: options of the step on matrices.
    """

    splits_hidden: ClassVar[bool] = True
    state_key: ClassVar[str]
    """A key in the state of a matrix that AdamW's state does not have."""

    def __init__(self, params: Any, adamw: dict[str, Any], own: dict[str, Any]) -> None:
        self._adamw = without_compiler(AdamW)([torch.zeros(1)], fused=True, **adamw)
        super().__init__(params, {**self._adamw.defaults, "hidden": False, **own})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        others = []
        for group in self.param_groups:
            updated = [parameter for parameter in group["params"] if parameter.grad is not None]
            mine = [parameter for parameter in updated if self.handles(parameter, group)]
            rest = [parameter for parameter in updated if not self.handles(parameter, group)]
            self._forget(mine, rest)
            for matrix in mine:
                self.step_matrix(matrix, matrix.grad, group)
            others.append({**group, "params": rest})
        self._adamw.param_groups, self._adamw.state = others, self.state
        self._adamw.step()
        return loss

    def handles(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Return whether `step_matrix` updates a parameter."""
        return bool(group["hidden"]) and parameter.dim() == 2

    @abstractmethod
    def step_matrix(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update one matrix of a group."""

    def _forget(self, mine: list[Tensor], rest: list[Tensor]) -> None:
        """Drop state of the other part, in a run that was resumed with other options."""
        for parameters, ours in ((mine, True), (rest, False)):
            for parameter in parameters:
                if parameter in self.state and (self.state_key in self.state[parameter]) != ours:
                    del self.state[parameter]


def orient(tensor: Tensor, like: Tensor) -> Tensor:
    """Transpose a matrix if `like`, the original matrix, is not wide; also the inverse of itself."""
    return tensor.T if like.shape[0] >= like.shape[1] else tensor
