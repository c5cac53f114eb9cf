"""Optimizers that treat hidden matrices as matrices, and leave embeddings, heads and vectors to AdamW."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from raytrain.optim.eager import eager
from raytrain.tensors import wide

Betas = tuple[float, float]


class MatrixOptimizer(ABC, Optimizer):
    """Takes its own step on the matrices of groups marked `hidden`, and AdamW's on all other parameters.

    Args:
        params: parameters, or groups of them.
        adamw: lr, betas, eps and weight_decay.
        own: options of the step on matrices.
    """

    splits_hidden: ClassVar[bool] = True
    mark: ClassVar[str]
    """An entry that the state of a matrix has, and that AdamW's has not."""

    def __init__(self, params: Any, adamw: dict[str, Any], own: dict[str, Any]) -> None:
        self._adamw = eager(AdamW)([torch.zeros(1)], fused=True, **adamw)
        super().__init__(params, {**self._adamw.defaults, "hidden": False, **own})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        others = []
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            mine = [parameter for parameter in moved if self.takes(parameter, group)]
            rest = [parameter for parameter in moved if not self.takes(parameter, group)]
            self._forget(mine, rest)
            for matrix in mine:
                self.move(matrix, matrix.grad, group)
            others.append({**group, "params": rest})
        self._adamw.param_groups, self._adamw.state = others, self.state
        self._adamw.step()
        return loss

    def takes(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Return whether a parameter is a matrix for `move`."""
        return bool(group["hidden"]) and parameter.dim() == 2

    @abstractmethod
    def move(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Step on a matrix of a group."""

    def _forget(self, mine: list[Tensor], rest: list[Tensor]) -> None:
        """Drop the state of parameters that the other part stepped on, in a run that was resumed with other options."""
        for parameters, ours in ((mine, True), (rest, False)):
            for parameter in parameters:
                if parameter in self.state and (self.mark in self.state[parameter]) != ours:
                    del self.state[parameter]


class Muon(MatrixOptimizer):
    """Momentum whose step on each hidden matrix is made orthogonal (Jordan et al. 2024), and AdamW for all else.

    The step's singular values lie between about 0.7 and 1.2: five Newton-Schulz iterations with these coefficients do
    not converge to 1. Ours and not torch.optim.Muon, which refuses a model that has anything but matrices and iterates
    in bfloat16 on CPUs too: where they have to emulate it, a matrix of 512 x 512 takes 2.4 s instead of 0.08 s.

    Args:
        params: parameters, or groups of them; a group with `hidden` holds hidden matrices.
        lr: learning rate.
        momentum: share of the old momentum, to which the step looks ahead as Nesterov's does.
        weight_decay: decoupled, in units of lr.
        adjust_lr_fn: "match_rms_adamw" scales a step on an (m, n) matrix by 0.2 sqrt(max(m, n)), so that one lr fits
            both parts (Liu et al. 2025, Muon is Scalable); "original" by sqrt(max(1, m / n)).
        betas, eps: of AdamW.
    """

    mark = "momentum_buffer"

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: Betas = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"expected momentum from 0 up to 1; got {momentum}")
        if adjust_lr_fn not in ADJUST:
            raise ValueError(f"expected adjust_lr_fn of {' or '.join(ADJUST)}; got {adjust_lr_fn!r}")
        own = {"momentum": momentum, "adjust_lr_fn": adjust_lr_fn}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, own)

    def move(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Take the orthogonal step on a matrix."""
        state, kept = self.state[matrix], group["momentum"]
        if not state:
            state[self.mark] = torch.zeros_like(matrix)
        ahead = torch.lerp(gradient, state[self.mark].lerp_(gradient, 1 - kept), kept)
        step = _lying(orthogonal(_lying(ahead, matrix)), matrix).to(matrix.dtype)
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(step, alpha=-group["lr"] * ADJUST[group["adjust_lr_fn"]](*matrix.shape))


ADJUST: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
}
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return about U V^T for the singular value decomposition U S V^T of a matrix that is not higher than wide.

    The coefficients, and how often, are those of Jordan et al. 2024; on GPUs in bfloat16.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16() if matrix.is_cuda else wide(matrix)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class GaLore(MatrixOptimizer):
    """AdamW whose moments of hidden matrices live in the subspace of the gradient's main directions (Zhao et al. 2024).

    A matrix of short side s and long side l keeps 2 r l numbers of moments and r s of the subspace's basis, instead of
    2 s l. Matrices with s <= rank, and all that is not a hidden matrix, take AdamW's step. Ours and not that of
    pytorch_optimizer, which keeps objects in its state that no checkpoint of ours can hold, shortens the first interval
    between new bases by a step, and saves nothing unless each group names its rank.

    Args:
        params: parameters, or groups of them; a group with `hidden` holds hidden matrices.
        lr: learning rate.
        betas: of Adam.
        weight_decay: decoupled, in units of lr.
        rank: directions r that the moments keep.
        update_proj_gap: steps between new bases; the moments stay as they are, although the basis turns.
        scale: factor of the step on a projected matrix.
    """

    mark = "basis"

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-2,
        betas: Betas = (0.9, 0.999),
        weight_decay: float = 0.0,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
    ) -> None:
        if rank < 1 or update_proj_gap < 1 or scale < 0:
            raise ValueError(
                "expected rank and update_proj_gap of at least 1 and scale of at least 0; got "
                f"{rank}, {update_proj_gap} and {scale}"
            )
        own = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale}
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, own)

    def takes(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Return whether the projection of a parameter is smaller than the parameter."""
        return super().takes(parameter, group) and min(parameter.shape) > group["rank"]

    def move(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Take Adam's step in the matrix's subspace."""
        lying = _lying(gradient, matrix)
        low, normal = self._moments(matrix, lying, group)
        step = self.direction(self.state[matrix], lying, low, normal)
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(_lying(step, matrix), alpha=-group["lr"] * group["scale"])

    def direction(self, state: dict[str, Any], gradient: Tensor, low: Tensor, normal: Tensor) -> Tensor:  # noqa: ARG002
        """Return the step on a matrix lying on its long side, shape (s, l).

        Args:
            state: of the matrix.
            gradient: shape (s, l).
            low: the gradient in the subspace, shape (r, l).
            normal: Adam's step there, shape (r, l).
        """
        step: Tensor = state["basis"] @ normal
        return step

    def _moments(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Move the moments by a step, and return the gradient and Adam's step in the subspace."""
        state, rank = self.state[matrix], group["rank"]
        if state and state["basis"].shape[1] != rank:
            state.clear()  # resumed with another rank
        if not state:
            state["step"] = 0
            state["exp_avg"] = gradient.new_zeros(rank, gradient.shape[1])
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        if state["step"] % group["update_proj_gap"] == 0:
            basis = torch.linalg.svd(wide(gradient), full_matrices=False).U[:, :rank]
            state["basis"] = basis.to(gradient.dtype).contiguous()
        low = state["basis"].T @ gradient
        state["step"] += 1
        first, second = group["betas"]
        state["exp_avg"].lerp_(low, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(low, low, value=1 - second)
        root = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - second ** state["step"])).add_(group["eps"])
        return low, state["exp_avg"].div(1 - first ** state["step"]).div_(root)


class Fira(GaLore):
    """GaLore that also steps along the rest of the gradient, scaled as Adam scaled its projection (Chen et al. 2024).

    Each column of the rest is scaled by the norm of Adam's step over that of the gradient in the subspace, and the
    rest's norm grows by 1% a step at most. The authors' code and pytorch_optimizer take `scale` times the projection
    from the gradient, so that what they call the rest is orthogonal to the subspace only for scale = 1; here `scale`
    is a factor of the whole step. A gradient of a rank below ours (fewer examples than `rank`) has no rest.
    """

    growth: ClassVar[float] = 1.01

    def direction(self, state: dict[str, Any], gradient: Tensor, low: Tensor, normal: Tensor) -> Tensor:
        """Return the step on a matrix lying on its long side, shape (s, l)."""
        rest: Tensor = gradient - state["basis"] @ low
        rest *= normal.norm(dim=0) / (low.norm(dim=0) + 1e-8)
        norm = rest.norm()
        limit = self.growth * state.get("rest_norm", norm)
        if 0 < limit < norm:
            rest *= limit / norm
            norm = limit
        state["rest_norm"] = norm
        return super().direction(state, gradient, low, normal) + rest


def _lying(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a matrix turned so that its long side is its second, or turned back; `like` is the matrix unturned."""
    return tensor.T if like.shape[0] >= like.shape[1] else tensor
