"""Zeroth-order optimizers: update parameters from projected gradients instead of gradients.

A projected gradient g_k estimates the derivative of the loss along the direction z(seed_k). The n of a step estimate
the gradient as (1 / n) * sum over k of g_k * z(seed_k).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from raytrain.errors import RecipeError
from raytrain.models.blocks import repeated_blocks
from raytrain.seeds.directions import Directions, ParameterSlice
from raytrain.seeds.prng import Distribution
from raytrain.seeds.updates import SeedUpdate, apply_updates
from raytrain.tensors import at_least_float32_type
from raytrain.zeroth.perturbed import Closure, PerturbedModel

ProjectedGradients = Sequence[tuple[int, float]]
"""(seed, projected gradient) of each direction of a step."""


class ZerothOrderOptimizer(Optimizer, ABC):
    """Zeroth-order optimizer: updates parameters from projected gradients instead of `.grad`.

    A group with lr_scale = s has directions sqrt(s) times as long. So its expected update is s times as large, and the
    perturbations are largest where the updates are.
    """

    zeroth = True
    exact = False
    """Whether projected gradients are exact (forward mode) rather than finite differences."""
    selects = False
    """Whether `select` evaluates the loss, which only one worker can do."""
    hybrid = False
    """Whether some parameters are updated from gradients."""

    def lr_ratio(self, group: Mapping[str, Any]) -> float:
        """Return a group's initial learning rate over the optimizer's, which `make_optimizer` recorded.

        It is rounded to float32, so that neither (s * lr) / lr nor the length of directions depends on lr.
        """
        return float(torch.tensor(group["initial_lr"] / self.defaults["lr"], dtype=torch.float32))

    def bind(self, directions: Directions) -> None:
        """Set the directions that seeds stand for, before the first step."""
        self.directions = directions

    def select(
        self,
        projected_gradients: ProjectedGradients,
        lr: float,  # noqa: ARG002 - some optimizers evaluate candidate updates
        model: PerturbedModel,  # noqa: ARG002
        closure: Closure,  # noqa: ARG002
    ) -> ProjectedGradients:
        """Return the projected gradients to apply: by default those that are given.

        Args:
            projected_gradients: of this step, in float32.
            lr: learning rate of this step, a float32.
            model: to evaluate candidate updates.
            closure: evaluates the loss.
        """
        return projected_gradients

    @abstractmethod
    def apply(self, projected_gradients: ProjectedGradients, lr: float) -> None:
        """Update the parameters; the gradient estimate is the mean over directions.

        Args:
            projected_gradients: of this step; its length is the n of the mean.
            lr: learning rate of this step, a float32.
        """


class ZOSGD(ZerothOrderOptimizer):
    """SGD: theta <- theta - lr / n * g_k * z(seed_k) for each k (Malladi et al. 2023, MeZO)."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-5) -> None:
        super().__init__(params, {"lr": _positive(lr)})

    def apply(self, projected_gradients: ProjectedGradients, lr: float) -> None:
        """Apply one update for each direction, in order."""
        count = len(projected_gradients)
        apply_updates(
            self.directions,
            [SeedUpdate(seed, -lr * self.step_length(value) / count) for seed, value in projected_gradients],
        )

    def step_length(self, projected_gradient: float) -> float:
        """Return the factor of lr / n for one direction: here the projected gradient itself."""
        return projected_gradient


class ZOSign(ZOSGD):
    """Sign SGD: theta <- theta - lr / n * sign(g_k) * z(seed_k) for each k (Zhang et al. 2024, ZO-Bench)."""

    def step_length(self, projected_gradient: float) -> float:
        """Return the sign of the projected gradient."""
        return float(projected_gradient > 0) - float(projected_gradient < 0)


class ZOConservative(ZOSGD):
    """SGD that keeps the best of -z, +z and no update by the loss (Zhang et al. 2024, ZO-Bench)."""

    selects = True

    def select(
        self, projected_gradients: ProjectedGradients, lr: float, model: PerturbedModel, closure: Closure
    ) -> ProjectedGradients:
        """Evaluate the three candidates of each direction at the current parameters, and return the best."""
        lr_per_direction, base_loss = lr / len(projected_gradients), float(model.loss(closure))
        return [
            (seed, value * _best_sign(seed, lr_per_direction * value, model, closure, base_loss))
            for seed, value in projected_gradients
        ]


class ForwardGradient(ZOSGD):
    """SGD on exact directional derivatives from forward-mode differentiation (Baydin et al. 2022)."""

    exact = True


class MomentEstimator(ZerothOrderOptimizer):
    """A zeroth-order optimizer with moments of the estimated gradient, in float32 at least."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, keeping the moments' types; torch would cast them to those of the parameters."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, entries in state_dict["state"].items():  # parameters are numbered, as in `state_dict`
            parameter = parameters[index]
            for name, value in entries.items():
                if value.shape == parameter.shape:
                    dtype = at_least_float32_type(parameter.dtype)
                    self.state[parameter][name] = value.to(parameter.device, dtype)

    def _gradients(
        self, projected_gradients: ProjectedGradients, lr: float
    ) -> Iterator[tuple[nn.Parameter, Tensor, dict[str, Any], float]]:
        """Yield (parameter, estimated gradient, its group, the group's current learning rate), one at a time."""
        parts = {part.tensor.data_ptr(): part for part in self.directions.slices if part.scale and part.tensor.numel()}
        for group in self.param_groups:
            group_lr = lr * self.lr_ratio(group)
            for parameter in group["params"]:
                if part := parts.get(parameter.data_ptr()):
                    yield parameter, self._gradient(part, projected_gradients), group, group_lr

    def _gradient(self, part: ParameterSlice, projected_gradients: ProjectedGradients) -> Tensor:
        """Return (1 / n) * sum over k of g_k * z(seed_k) / scale^2; g_k and z(seed_k) both contain the scale."""
        gradient = torch.zeros_like(part.tensor, dtype=at_least_float32_type(part.tensor.dtype))
        for seed, value in projected_gradients:
            self.directions.add_to(part, gradient, seed, value / len(projected_gradients) / part.scale**2)
        return gradient


class ZOMomentum(MomentEstimator):
    """SGD with momentum: m <- momentum * m + g, theta <- theta - lr * m (Polyak 1964).

    The estimated gradient exists for one parameter at a time. Products and sums are rounded separately, here and in
    `ZOAdam`: torch's own optimizers fuse them on some processors, and so would return other bits there.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-5, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": _positive(lr), "momentum": momentum})

    def apply(self, projected_gradients: ProjectedGradients, lr: float) -> None:
        """Apply one step of SGD with momentum."""
        for parameter, gradient, group, group_lr in self._gradients(projected_gradients, lr):
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
            parameter.data.copy_((momentum * -group_lr).add_(parameter.data))


class ZOAdam(MomentEstimator):
    """Adam on the estimated gradient (Kingma and Ba 2015, Algorithm 1)."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-5, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": _positive(lr), "betas": betas, "eps": eps})

    def apply(self, projected_gradients: ProjectedGradients, lr: float) -> None:
        """Apply one step of Adam."""
        for parameter, gradient, group, group_lr in self._gradients(projected_gradients, lr):
            state, (beta1, beta2) = self.state[parameter], group["betas"]
            if not state:
                zeros = {name: torch.zeros_like(gradient) for name in ("exp_avg", "exp_avg_sq")}
                state |= {"step": torch.zeros(()), **zeros}
            state["step"] += 1
            steps = state["step"].item()
            first = state["exp_avg"].mul_(beta1).add_(gradient * (1 - beta1))
            second = state["exp_avg_sq"].mul_(beta2).add_(gradient * gradient * (1 - beta2))
            scale = second.sqrt().div_(math.sqrt(1 - beta2**steps)).add_(group["eps"])
            parameter.data.copy_((first / scale * (-group_lr / (1 - beta1**steps))).add_(parameter.data))


class ZOHybrid(ZerothOrderOptimizer, AdamW):
    """AdamW on the parameters of zo.first_order, e.g. the last blocks, and zo-sgd on all others."""

    hybrid = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        first_order_lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
    ) -> None:
        AdamW.__init__(self, params, lr=_positive(lr), betas=betas, weight_decay=weight_decay)
        self.first_order_lr = first_order_lr

    def apply(self, projected_gradients: ProjectedGradients, lr: float) -> None:
        """Apply one update for each direction, and a step of AdamW where there are gradients."""
        count = len(projected_gradients)
        apply_updates(self.directions, [SeedUpdate(seed, -lr * value / count) for seed, value in projected_gradients])
        adamw_lr = self.first_order_lr * lr / self.defaults["lr"]  # lr contains the factor of the schedule
        with _learning_rates(self, [adamw_lr * self.lr_ratio(group) for group in self.param_groups]):
            self.step()
        self.zero_grad()


def _best_sign(seed: int, length: float, model: PerturbedModel, closure: Closure, base_loss: float) -> float:
    """Return the s of least loss at theta - s * length * z(seed): 1, -1, or 0 for no update."""
    losses = {0.0: base_loss, **{sign: float(model.loss_at(seed, -sign * length, closure)) for sign in (1.0, -1.0)}}
    return min(losses, key=lambda sign: losses[sign] if math.isfinite(losses[sign]) else math.inf)


def directions_of(
    module: nn.Module,
    optimizer: ZerothOrderOptimizer,
    *,
    distribution: Distribution,
    sparsity: float,
    blockwise: bool,
    first_order: Sequence[str] = (),
) -> Directions:
    """Return the directions over the parameters that an optimizer updates without gradients.

    Args:
        module: the model, with its initial weights.
        optimizer: of its parameters; each group's `lr_ratio` scales the directions in it.
        distribution: "rademacher" or "gaussian".
        sparsity: see `Directions.of`.
        blockwise: whether a direction perturbs one repeated block of the model only; parameters outside of all blocks
            are one more block.
        first_order: patterns of names of parameters that are updated from gradients instead.

    Raises:
        RecipeError: a pattern matches no parameter, or the model has no repeated blocks.
    """
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    for pattern in first_order:
        if not any(fnmatchcase(name, pattern) for name in trainable):
            raise RecipeError(
                f"zo.first_order: {pattern!r} matches no trainable parameter; there are "
                f"{', '.join(trainable[:3])}, ..., {trainable[-1]}"
            )
    if blockwise and not repeated_blocks(module):
        raise RecipeError("zo.blockwise: the model has no repeated blocks; set zo.blockwise = false")
    named = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not any(fnmatchcase(name, pattern) for pattern in first_order)
    }
    ratios = {id(one): optimizer.lr_ratio(group) for group in optimizer.param_groups for one in group["params"]}
    updated = [name for name, one in named.items() if ratios[id(one)]]
    return Directions.of(
        named,
        distribution,
        scales={name: math.sqrt(ratios[id(one)]) for name, one in named.items()},
        sparsity=sparsity,
        blocks=_block_indices(module, updated) if blockwise else None,
    )


def _block_indices(module: nn.Module, updated: Sequence[str]) -> dict[str, int]:
    """Return name -> index of its block, for parameters that are updated; blocks without any get no index."""
    blocks = enumerate(repeated_blocks(module), start=1)
    block_of = {id(parameter): index for index, block in blocks for parameter in block.parameters()}
    found = {name: block_of.get(id(module.get_parameter(name)), 0) for name in updated}
    order = {index: count for count, index in enumerate(sorted(set(found.values())))}
    return {name: order[index] for name, index in found.items()}


def _positive(lr: float) -> float:
    if not 0 < lr < math.inf:
        raise ValueError(f"expected an lr above 0, by which directions are scaled; got {lr}")
    return lr


@contextmanager
def _learning_rates(optimizer: Optimizer, rates: Sequence[float]) -> Iterator[None]:
    """Set the learning rate of each group inside the `with` block."""
    before = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate
