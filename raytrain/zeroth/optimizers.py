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
from raytrain.models.blocks import blocks as blocks_of
from raytrain.seeds.directions import Part, Space
from raytrain.seeds.prng import Mode
from raytrain.seeds.updates import Nudge, replay_log
from raytrain.tensors import wide_type
from raytrain.zeroth.perturbed import Loss, Probe

Slopes = Sequence[tuple[int, float]]
"""(seed, slope along its direction) of each probe."""


class ZerothOrder(Optimizer, ABC):
    """An optimizer that is told slopes.

    A group's learning rate shapes the directions: with lr_scale = s they are sqrt(s) times as long there, so that the
    expected step is s times as large and the probes see most of what is moved most.
    """

    zeroth = True
    exact = False
    """Whether slopes are derivatives, and not differences."""
    decides = False
    """Whether it decides by a loss which way to go."""
    hybrid = False
    """Whether it takes gradients of some parameters."""

    def ratio(self, group: Mapping[str, Any]) -> float:
        """Return a group's learning rate over the shared one, as `make_optimizer` noted both.

        It is rounded to float32, so that (s * lr) / lr does not depend on lr, nor how long directions are.
        """
        return float(torch.tensor(group["initial_lr"] / self.defaults["lr"], dtype=torch.float32))

    def shape(self, space: Space) -> None:
        """Learn the space of the directions, before the first step."""
        self.space = space

    def decide(self, slopes: Slopes, rate: float, probe: Probe, loss: Loss) -> Slopes:  # noqa: ARG002 - some look
        """Return the slopes to move by, which is these, unless more probes say otherwise."""
        return slopes

    @abstractmethod
    def move(self, slopes: Slopes, rate: float) -> None:
        """Move the parameters by what the slopes say, their mean being the estimate; `rate` is a float32."""


class ZOSGD(ZerothOrder):
    """Move against each direction by its slope (Malladi et al. 2023, MeZO)."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-5) -> None:
        super().__init__(params, {"lr": _positive(lr)})

    def move(self, slopes: Slopes, rate: float) -> None:
        """Move one direction after the other."""
        replay_log(self.space, [Nudge(seed, -rate * self.length(slope) / len(slopes)) for seed, slope in slopes])

    def length(self, slope: float) -> float:
        """Return how far to go for a slope."""
        return slope


class ZOSign(ZOSGD):
    """Move against each direction by the learning rate, whatever its slope (Zhang et al. 2024, ZO-Bench)."""

    def length(self, slope: float) -> float:
        """Return the sign."""
        return float(slope > 0) - float(slope < 0)


class ZOConservative(ZOSGD):
    """Move against a direction, along it, or not at all, whichever has the least loss now (Zhang et al. 2024)."""

    decides = True

    def decide(self, slopes: Slopes, rate: float, probe: Probe, loss: Loss) -> Slopes:
        """Try the three for each direction, from where the parameters are."""
        share, at_rest = rate / len(slopes), float(probe.at_rest(loss))
        return [(seed, slope * _best(seed, share * slope, probe, loss, at_rest)) for seed, slope in slopes]


class ForwardGradient(ZOSGD):
    """Move against each direction by its exact slope, from forward-mode differentiation (Baydin et al. 2022)."""

    exact = True


class Averaging(ZerothOrder):
    """A stepper that holds averages of the estimated gradient, at least in float32: they consist of small numbers."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state over; torch would give its averages the types of the parameters."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for place, entries in state_dict["state"].items():  # parameters are counted, as `state_dict` does
            parameter = parameters[place]
            for name, value in entries.items():
                if value.shape == parameter.shape:
                    self.state[parameter][name] = value.to(parameter.device, wide_type(parameter.dtype))

    def _gradients(self, slopes: Slopes, rate: float) -> Iterator[tuple[nn.Parameter, Tensor, dict[str, Any], float]]:
        """Yield each parameter that moves, its estimated gradient, its group and the group's learning rate now."""
        parts = {part.tensor.data_ptr(): part for part in self.space.parts if part.scale and part.tensor.numel()}
        for group in self.param_groups:
            lr = rate * self.ratio(group)
            for parameter in group["params"]:
                if part := parts.get(parameter.data_ptr()):
                    yield parameter, self._gradient(part, slopes), group, lr

    def _gradient(self, part: Part, slopes: Slopes) -> Tensor:
        gradient = torch.zeros_like(part.tensor, dtype=wide_type(part.tensor.dtype))
        for seed, slope in slopes:  # the slope has the part's scale, and so has the direction
            self.space.add(part, gradient, seed, slope / len(slopes) / part.scale**2)
        return gradient


class ZOMomentum(Averaging):
    """SGD with momentum on the estimated gradient (Polyak 1964), of which it holds the average.

    The estimate itself is there for one parameter at a time. Products and sums are rounded one by one, here and in
    `ZOAdam`: torch's own steps fuse them on some processors, and would not give the same bits on others.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-5, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": _positive(lr), "momentum": momentum})

    def move(self, slopes: Slopes, rate: float) -> None:
        """Take a step."""
        for parameter, gradient, group, lr in self._gradients(slopes, rate):
            state = self.state[parameter]
            if not state:
                state["average"] = torch.zeros_like(gradient)
            average = state["average"].mul_(group["momentum"]).add_(gradient)
            parameter.data.copy_((average * -lr).add_(parameter.data))


class ZOAdam(Averaging):
    """Adam on the estimated gradient (Kingma and Ba 2015), of which it holds two averages."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-5, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": _positive(lr), "betas": betas, "eps": eps})

    def move(self, slopes: Slopes, rate: float) -> None:
        """Take a step."""
        for parameter, gradient, group, lr in self._gradients(slopes, rate):
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


class ZOHybrid(ZerothOrder, AdamW):
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

    def move(self, slopes: Slopes, rate: float) -> None:
        """Move one direction after the other, and take a step of AdamW where there are gradients."""
        replay_log(self.space, [Nudge(seed, -rate * slope / len(slopes)) for seed, slope in slopes])
        now = self.first_order_lr * rate / self.defaults["lr"]  # the schedule's factor is in both rates
        with _rates(self, [now * self.ratio(group) for group in self.param_groups]):
            self.step()
        self.zero_grad()


def _best(seed: int, far: float, probe: Probe, loss: Loss, at_rest: float) -> float:
    """Return 1 to move against a direction, -1 to move along it, 0 to stay."""
    losses = {0.0: at_rest, **{way: float(probe.at(seed, -way * far, loss)) for way in (1.0, -1.0)}}
    return min(losses, key=lambda way: losses[way] if math.isfinite(losses[way]) else math.inf)


def space_of(
    module: nn.Module,
    optimizer: ZerothOrder,
    *,
    mode: Mode,
    sparsity: float,
    blocks: bool,
    first_order: Sequence[str] = (),
) -> Space:
    """Return the space of what an optimizer moves.

    Args:
        module: the model, with its first weights.
        optimizer: of its parameters; each group's learning rate says how long directions are there.
        mode: what directions consist of.
        sparsity: see `Space.of`.
        first_order: patterns of names of parameters that have gradients, and no directions.
        blocks: whether each repeated block of the model is a block of the space; all else is one more.

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
    if blocks and not blocks_of(module):
        raise RecipeError("zo.blockwise: the model has no repeated blocks; take zo.blockwise = false")
    named = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not any(fnmatchcase(name, pattern) for pattern in first_order)
    }
    ratios = {id(one): optimizer.ratio(group) for group in optimizer.param_groups for one in group["params"]}
    return Space.of(
        named,
        mode,
        scales={name: math.sqrt(ratios[id(one)]) for name, one in named.items()},
        sparsity=sparsity,
        blocks=_blocks_of(module, [name for name, one in named.items() if ratios[id(one)]]) if blocks else None,
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
