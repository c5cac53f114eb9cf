"""LAMB."""

import math
from typing import Any

import torch
from torch import Tensor

from raytrain.optim.per_parameter import PerParameterOptimizer


class Lamb(PerParameterOptimizer):
    """Adam whose step on each parameter is as long as lr times the parameter itself (You et al. 2020, algorithm 2).

    A parameter of zeros takes Adam's step. Ours and not that of pytorch_optimizer, which divides the finished step by
    1 - beta1^t, so that the first ones are up to ten times too long, and keeps weight decay out of the ratio.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas, eps: of Adam.
        weight_decay: added to Adam's step before its length is taken.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                "expected lr, eps and weight_decay of at least 0 and betas from 0 up to 1; got "
                f"{lr}, {eps}, {weight_decay} and {betas}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def step_parameter(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Step on one parameter of a group."""
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - second ** state["step"])).add_(group["eps"])
        step = state["exp_avg"].div(1 - first ** state["step"]).div_(root).add_(parameter, alpha=group["weight_decay"])
        length, wanted = step.norm(), parameter.norm()
        ratio = torch.where((length > 0) & (wanted > 0), wanted / length, 1.0)
        parameter.addcmul_(step, ratio, value=-group["lr"])
