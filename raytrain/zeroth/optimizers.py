"""Zeroth-order optimizers: what to do with slopes along directions, in place of a gradient."""

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
from raytrain.models.blocks import repeated_blocks as blocks_of
from raytrain.seeds.directions import Directions, ParameterSlice
from raytrain.seeds.prng import Distribution
from raytrain.seeds.updates import SeedUpdate, apply_updates
from raytrain.tensors import at_least_float32_type
from raytrain.zeroth.perturbed import Closure, PerturbedModel

ProjectedGradients = Sequence[tuple[int, float]]
"""(seed, slope along its direction) of each probe."""


class ZerothOrderOptimizer(Optimizer, ABC):
    """An optimizer that is told slopes.

    A group's learning rate shapes the directions: with lr_scale = s they are sqrt(s) times as long there, so that the
    expected step is s times as large and the probes see most of what is moved most.
    """

    zeroth = True
    exact = False
    """Whether slopes are derivatives, and not differences."""
    selects = False
    """Whether it decides by a loss which way to go."""
    hybrid = False
    """Whether it takes gradients of some parameters."""

    def lr_ratio(self, group: Mapping[str, Any]) -> float:
        """Return a group's learning rate over the shared one, as `make_optimizer` noted both.

        It is rounded to float32, so that (s * lr) / lr does not depend on lr, nor how long directions are.
        """
        return float(torch.tensor(group["initial_lr"] / self.defaults["lr"], dtype=torch.float32))

    def bind(self, directions: Directions) -> None:
        """Learn the space of the directions, before the first step."""
        self.directions = directions

    def select(
        self, projected_gradients: ProjectedGradients, lr: float, model: PerturbedModel, closure: Closure
    ) -> ProjectedGradients:  # noqa: ARG002 - some look
        """Return the slopes to move by, which is these, unless more probes say otherwise."""
        return projected_gradients

    @abstractmethod
    def apply(self, projected_gradients: ProjectedGradients, lr: float) -> None:
        """Move the parameters by what the slopes say, their mean being the estimate; `rate` is a float32."""


class ZOSGD(ZerothOrderOptimizer):
    """Move against each direction by its slope (Malladi et al. 2023, MeZO)."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-5) -> None:
        super().__init__(params, {"lr": _positive(lr)})

    def apply(self, projected_gradients: ProjectedGradients, lr: float) -> None:
        """Move one direction after the other."""
        apply_updates(
            self.directions,
            [
                SeedUpdate(seed, -lr * self.step_length(slope) / len(projected_gradients))
                for seed, slope in projected_gradients
            ],
        )

    def step_length(self, projected_gradient: float) -> float:
        """Return how far to go for a slope."""
        return projected_gradient


class ZOSign(ZOSGD):
    """Move against each direction by the learning rate, whatever its slope (Zhang et al. 2024, ZO-Bench)."""

    def step_length(self, projected_gradient: float) -> float:
        """Return the sign."""
        return float(projected_gradient > 0) - float(projected_gradient < 0)


class ZOConservative(ZOSGD):
    """Move against a direction, along it, or not at all, whichever has the least loss now (Zhang et al. 2024)."""

    selects = True

    def select(
        self, projected_gradients: ProjectedGradients, lr: float, model: PerturbedModel, closure: Closure
    ) -> ProjectedGradients:
        """Try the three for each direction, from where the parameters are."""
        share, at_rest = lr / len(projected_gradients), float(model.loss(closure))
        return [
            (seed, slope * _best(seed, share * slope, model, closure, at_rest)) for seed, slope in projected_gradients
        ]


class ForwardGradient(ZOSGD):
    """Move against each direction by its exact slope, from forward-mode differentiation (Baydin et al. 2022)."""

    exact = True


class MomentEstimator(ZerothOrderOptimizer):
    """A stepper that holds averages of the estimated gradient, at least in float32: they consist of small numbers."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state over; torch would give its averages the types of the parameters."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for place, entries in state_dict["state"].items():  # parameters are counted, as `state_dict` does
            parameter = parameters[place]
            for name, value in entries.items():
                if value.shape == parameter.shape:
                    self.state[parameter][name] = value.to(parameter.device, at_least_float32_type(parameter.dtype))

    def _gradients(
        self, projected_gradients: ProjectedGradients, rate: float
    ) -> Iterator[tuple[nn.Parameter, Tensor, dict[str, Any], float]]:
        """Yield each parameter that moves, its estimated gradient, its group and the group's learning rate now."""
        parts = {part.tensor.data_ptr(): part for part in self.directions.slices if part.scale and part.tensor.numel()}
        for group in self.param_groups:
            lr = rate * self.lr_ratio(group)
            for parameter in group["params"]:
                if part := parts.get(parameter.data_ptr()):
                    yield parameter, self._gradient(part, projected_gradients), group, lr

    def _gradient(self, part: ParameterSlice, projected_gradients: ProjectedGradients) -> Tensor:
        gradient = torch.zeros_like(part.tensor, dtype=at_least_float32_type(part.tensor.dtype))
        for seed, slope in projected_gradients:  # the slope has the part's scale, and so has the direction
            self.directions.add_to(part, gradient, seed, slope / len(projected_gradients) / part.scale**2)
        return gradient


class ZOMomentum(MomentEstimator):
    """SGD with momentum on the estimated gradient (Polyak 1964), of which it holds the average.

    The estimate itself is there for one parameter at a time. Products and sums are rounded one by one, here and in
    `ZOAdam`: torch's own steps fuse them on some processors, and would not give the same bits on others.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-5, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": _positive(lr), "momentum": momentum})

    def apply(self, projected_gradients: ProjectedGradients, rate: float) -> None:
        """Take a step."""
        for parameter, gradient, group, lr in self._gradients(projected_gradients, rate):
            state = self.state[parameter]
            if not state:
                state["average"] = torch.zeros_like(gradient)
            average = state["average"].mul_(group["momentum"]).add_(gradient)
            parameter.data.copy_((average * -lr).add_(parameter.data))


class ZOAdam(MomentEstimator):
    """Adam on the estimated gradient (Kingma and Ba 2015), of which it holds two averages."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-5, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": _positive(lr), "betas": betas, "eps": eps})

    def apply(self, projected_gradients: ProjectedGradients, rate: float) -> None:
        """Take a step."""
        for parameter, gradient, group, lr in self._gradients(projected_gradients, rate):
            state, (first, second) = self.state[parameter], group["betas"]
            if not state:
                zeros = {name: torch.zeros_like(gradient) for name in ("mean", "square")}
                state |= {"step": torch.zeros(()), **zeros}
            state["step"] += 1
            steps = state["step"].item()
            mean = state["mean"].mul_(first).add_(gradient * (1 - first))
            square = state["square"].mul_(second).add_(gradient * gradient * (1 - second))
            length = square.sqrt().div_(math.sqrt(1 - second**steps)).add_(group["eps"])
            parameter.data.copy_((mean / length * (-lr / (1 - first**steps))).add_(parameter.data))


class ZOHybrid(ZerothOrderOptimizer, AdamW):
    """AdamW on the parameters that zo.first_order names, as the last blocks; zo-sgd on all others."""

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
        """Move one direction after the other, and take a step of AdamW where there are gradients."""
        apply_updates(
            self.directions,
            [SeedUpdate(seed, -lr * slope / len(projected_gradients)) for seed, slope in projected_gradients],
        )
        now = self.first_order_lr * lr / self.defaults["lr"]  # the schedule's factor is in both rates
        with _rates(self, [now * self.lr_ratio(group) for group in self.param_groups]):
            self.step()
        self.zero_grad()


def _best(seed: int, far: float, probe: PerturbedModel, loss: Closure, at_rest: float) -> float:
    """Return 1 to move against a direction, -1 to move along it, 0 to stay."""
    losses = {0.0: at_rest, **{way: float(probe.loss_at(seed, -way * far, loss)) for way in (1.0, -1.0)}}
    return min(losses, key=lambda way: losses[way] if math.isfinite(losses[way]) else math.inf)


def directions_of(
    module: nn.Module,
    optimizer: ZerothOrderOptimizer,
    *,
    distribution: Distribution,
    sparsity: float,
    blockwise: bool,
    first_order: Sequence[str] = (),
) -> Directions:
    """Return the space of what an optimizer moves.

    Args:
        module: the model, with its first weights.
        optimizer: of its parameters; each group's learning rate says how long directions are there.
        distribution: what directions consist of.
        sparsity: see `Directions.of`.
        first_order: patterns of names of parameters that have gradients, and no directions.
        blockwise: whether each repeated block of the model is a block of the space; all else is one more.

    Raises:
        RecipeError: a pattern is that of no parameter, or the model has no repeated blocks.
    """
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    for pattern in first_order:
        if not any(fnmatchcase(name, pattern) for name in trainable):
            raise RecipeError(
                f"zo.first_order: no trainable parameter is called {pattern!r}; there are "
                f"{', '.join(trainable[:3])}, ..., {trainable[-1]}"
            )
    if blockwise and not blocks_of(module):
        raise RecipeError("zo.blockwise: the model has no repeated blocks; take zo.blockwise = false")
    named = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not any(fnmatchcase(name, pattern) for pattern in first_order)
    }
    ratios = {id(one): optimizer.lr_ratio(group) for group in optimizer.param_groups for one in group["params"]}
    return Directions.of(
        named,
        distribution,
        scales={name: math.sqrt(ratios[id(one)]) for name, one in named.items()},
        sparsity=sparsity,
        blocks=_blocks_of(module, [name for name, one in named.items() if ratios[id(one)]]) if blockwise else None,
    )


def _blocks_of(module: nn.Module, moving: Sequence[str]) -> dict[str, int]:
    """Return the block of each parameter that moves; blocks are counted where something does."""
    places = {id(one): place for place, block in enumerate(blocks_of(module), start=1) for one in block.parameters()}
    found = {name: places.get(id(module.get_parameter(name)), 0) for name in moving}
    order = {place: count for count, place in enumerate(sorted(set(found.values())))}
    return {name: order[place] for name, place in found.items()}


def _positive(lr: float) -> float:
    if not 0 < lr < math.inf:
        raise ValueError(f"expected an lr above 0, by which directions are scaled; got {lr}")
    return lr


@contextmanager
def _rates(optimizer: Optimizer, rates: Sequence[float]) -> Iterator[None]:
    """Have each group step with a rate inside the `with` block."""
    before = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate
