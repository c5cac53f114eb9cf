"""SGD-SaI."""

from typing import Any

from torch import Tensor

from raytrain.optim.per_parameter import PerParameterOptimizer


class SGDSaI(PerParameterOptimizer):
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

    def step_parameter(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
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
