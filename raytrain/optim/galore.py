"""GaLore and Fira: Adam in a low-rank subspace of the gradient."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from raytrain.optim.matrix_optimizer import MatrixOptimizer, orient
from raytrain.tensors import at_least_float32


class GaLore(MatrixOptimizer):
    """AdamW with moments in the gradient's leading singular subspace (Zhao et al. 2024, Algorithm 2).

    For a hidden matrix W with gradient G, shape (s, l), s <= l, and basis P, shape (s, r):
    R = P^T G;  N = Adam step for R;  W <- W - lr * scale * P N.
    The state has 2 r l + r s elements instead of 2 s l. Matrices with s <= rank, and all other parameters, get AdamW's
    step. It replaces pytorch_optimizer's GaLore, whose state has objects that a checkpoint cannot store, whose first
    interval between bases is a step shorter, and which needs a rank in each group to save memory.

    Args:
        params: parameters, or groups of them; a group with `hidden` holds hidden matrices.
        lr: learning rate.
        betas: of Adam.
        weight_decay: decoupled, in units of lr.
        rank: dimension r of the subspace.
        update_proj_gap: steps between new bases; moments are not transformed to the new basis.
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
        """Return whether a parameter is a hidden matrix whose short side exceeds the rank."""
        return super().handles(parameter, group) and min(parameter.shape) > group["rank"]

    def step_matrix(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Apply Adam's step in the subspace of a matrix."""
        wide = orient(gradient, matrix)
        low, normal = self._moments(matrix, wide, group)
        step = self.update(self.state[matrix], wide, low, normal)
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(orient(step, matrix), alpha=-group["lr"] * group["scale"])

    def update(self, state: dict[str, Any], gradient: Tensor, low: Tensor, normal: Tensor) -> Tensor:  # noqa: ARG002
        """Return the update of a matrix in its wide orientation, shape (s, l).

        Args:
            state: of the matrix.
            gradient: shape (s, l).
            low: projected gradient R, shape (r, l).
            normal: Adam's step N for it, shape (r, l).
        """
        step: Tensor = state["basis"] @ normal
        return step

    def _moments(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Update the moments, and return the projected gradient R and Adam's step N for it."""
        state, rank = self.state[matrix], group["rank"]
        if state and state["basis"].shape[1] != rank:
            state.clear()  # the run was resumed with another rank
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
    """GaLore that also uses the residual of the projection, scaled by column (Chen et al. 2024).

    Update: P N + phi * (G - P R), with phi_j = norm(N_j) / norm(R_j) for column j; the residual's norm grows by 1 % per
    step at most. The authors' code and pytorch_optimizer subtract `scale` times the projection from G, so their
    residual is orthogonal to the subspace for scale = 1 only; here `scale` is a factor of the whole update. A
    gradient of a rank below `rank` (fewer examples than `rank`) has no residual.
    """

    growth: ClassVar[float] = 1.01

    def update(self, state: dict[str, Any], gradient: Tensor, low: Tensor, normal: Tensor) -> Tensor:
        """Return the update of a matrix in its wide orientation, shape (s, l)."""
        residual: Tensor = gradient - state["basis"] @ low
        residual *= normal.norm(dim=0) / (low.norm(dim=0) + 1e-8)
        norm = residual.norm()
        limit = self.growth * state.get("rest_norm", norm)
        if 0 < limit < norm:
            residual *= limit / norm
            norm = limit
        state["rest_norm"] = norm
        return super().update(state, gradient, low, normal) + residual
