"""NAdam with decoupled weight decay."""

from typing import Any

from torch.optim import NAdam


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
