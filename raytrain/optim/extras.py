"""Optimizers that no library has, or none has right, and noise that any optimizer can take."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import NAdam, Optimizer


class NAdamW(NAdam):
    """Adam with Nesterov momentum (Dozat 2016) and decoupled weight decay (Loshchilov and Hutter 2019).

    This is torch.optim.NAdam with decoupled_weight_decay.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        momentum_decay: float = 4e-3,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay=True, foreach=foreach
        )


class OneByOne(ABC, Optimizer):
    """An optimizer that steps on one parameter after the other."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, parameter.grad, group)
        return loss

    @abstractmethod
    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Step on one parameter of a group."""


class Lamb(OneByOne):
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

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
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


class SGDSaI(OneByOne):
    """SGD with momentum and a rate for each parameter from its first gradient's signal-to-noise ratio (Xu et al. 2024).

    The ratio is the norm of the gradient over the standard deviation of its entries, which is about the square root of
    their number. It is taken from the first gradient that is not zero; a parameter of one entry has the ratio 1. Ours
    and not that of pytorch_optimizer, which takes the mere norm for vectors: their rate then depends on the scale of
    the loss, and a clipped gradient all but freezes them.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        momentum: share of the old momentum, which starts as the first gradient.
        weight_decay: decoupled, in units of lr.
        eps: added to the standard deviation.
    """

    def __init__(
        self, params: Any, *, lr: float = 1e-2, momentum: float = 0.9, weight_decay: float = 1e-2, eps: float = 1e-8
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or eps < 0:
            raise ValueError(
                "expected lr, weight_decay and eps of at least 0 and momentum from 0 up to 1; got "
                f"{lr}, {weight_decay}, {eps} and {momentum}"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps})

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Step on one parameter of a group."""
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        state = self.state[parameter]
        if not state:
            if not gradient.any():
                return
            noise = gradient.std() + group["eps"] if gradient.numel() > 1 else gradient.norm()
            state["ratio"] = gradient.norm() / noise
            state["momentum"] = gradient.clone()
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        parameter.addcmul_(state["momentum"], state["ratio"], value=-group["lr"])


def add_noise(module: nn.Module, seed: int, step: int, variance: float, decay: float) -> None:
    """Add Gaussian noise of variance `variance` / (1 + step)^decay to the gradients (Neelakantan et al. 2015).

    What is drawn follows from the seed, the step and the parameter's name alone. So all replicas draw the same, however
    many they are, and a resumed run draws what the uninterrupted one would.

    Args:
        module: whose gradients.
        seed: of the run.
        step: counted from 0.
        variance: eta of the paper, which tries 0.01, 0.3 and 1.
        decay: gamma of the paper, 0.55 there.
    """
    deviation = math.sqrt(variance / (1 + step) ** decay)
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            drawn = hashlib.sha256(f"{seed} {step} {name}".encode()).digest()
            generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(drawn[:8]) >> 1)
            noise = torch.empty_like(parameter.grad).normal_(generator=generator)
            parameter.grad.add_(noise, alpha=deviation)
