"""SGD-SaI: SGD with a learning rate for each parameter from its first gradient."""

from typing import Any

from torch import Tensor

from raytrain.optim.per_parameter import PerParameterOptimizer


class SGDSaI(PerParameterOptimizer):
    """SGD with momentum and lr scaled by the gradient's signal-to-noise ratio (Xu et al. 2024).

    m <- momentum * m + (1 - momentum) * g;  w <- w - lr * r * m, with r = norm(g_1) / (std(g_1) + eps).
    g_1 is the first non-zero gradient; r is about the square root of the number of elements, and 1 for one element. It
    replaces pytorch_optimizer's SGDSaI, which uses norm(g_1) for vectors: their rate then depends on the scale of the
    loss, and a clipped gradient nearly freezes them.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        momentum: decay of the momentum, which starts as g_1.
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
        """Update one parameter of a group."""
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
