"""GaLore and Fira."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from raytrain.optim.matrix_optimizer import MatrixOptimizer, orient
from raytrain.tensors import at_least_float32


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

    state_key = "basis"

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
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

    def handles(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Return whether the projection of a parameter is smaller than the parameter."""
        return super().handles(parameter, group) and min(parameter.shape) > group["rank"]

    def step_matrix(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Take Adam's step in the matrix's subspace."""
        lying = orient(gradient, matrix)
        low, normal = self._moments(matrix, lying, group)
        step = self.update(self.state[matrix], lying, low, normal)
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(orient(step, matrix), alpha=-group["lr"] * group["scale"])

    def update(self, state: dict[str, Any], gradient: Tensor, low: Tensor, normal: Tensor) -> Tensor:  # noqa: ARG002
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
            basis = torch.linalg.svd(at_least_float32(gradient), full_matrices=False).U[:, :rank]
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

    def update(self, state: dict[str, Any], gradient: Tensor, low: Tensor, normal: Tensor) -> Tensor:
        """Return the step on a matrix lying on its long side, shape (s, l)."""
        rest: Tensor = gradient - state["basis"] @ low
        rest *= normal.norm(dim=0) / (low.norm(dim=0) + 1e-8)
        norm = rest.norm()
        limit = self.growth * state.get("rest_norm", norm)
        if 0 < limit < norm:
            rest *= limit / norm
            norm = limit
        state["rest_norm"] = norm
        return super().update(state, gradient, low, normal) + rest
