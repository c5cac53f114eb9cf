"""LAMB: Adam with layer-wise trust ratios."""

import math
from typing import Any

import torch
from torch import Tensor

from raytrain.optim.per_parameter import PerParameterOptimizer


class Lamb(PerParameterOptimizer):
    """Adam with a step of length lr * norm(w) on each parameter (You et al. 2020, Algorithm 2, LAMB).

    u = m_hat / (sqrt(v_hat) + eps) + weight_decay * w;  w <- w - lr * norm(w) / norm(u) * u.
    The ratio is 1 where a norm is 0. It replaces pytorch_optimizer's Lamb, which divides the final step by 1 - beta1^t,
    so that first steps are up to ten times too long, and excludes weight decay from the ratio.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas, eps: of Adam.
        weight_decay: added to Adam's step before its norm is computed.
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
        """Update one parameter of a group."""
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
