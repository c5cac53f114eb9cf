"""A step without gradients: probe some directions, share what they say, and move."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raytrain.errors import RecipeError, TrainingError
from raytrain.seeds.prng import fold_in
from raytrain.sync.scalars import ScalarExchange
from raytrain.tasks.task import Batch, Task
from raytrain.tensors import seed_everything_at, weighted_sum
from raytrain.zeroth.estimators import ProjectedGradient, directional_derivative, projected_gradient, reject_outliers
from raytrain.zeroth.optimizers import ProjectedGradients, ZerothOrderOptimizer
from raytrain.zeroth.perturbed import Closure, PerturbedModel
from raytrain.zeroth.trajectory import Trajectory

MAX_EMPTY_STEPS = 20
"""Steps without one usable slope, after which a run is given up."""


@dataclass(slots=True)
class ZeroOrderStep:
    """How a replica probes and moves.

    Attributes:
        model: of its model.
        optimizer: what moves it.
        sync: shares slopes.
        num_perturbations: directions of each replica in each step.
        eps: how far a probe goes.
        sides: 2 for central differences, 1 for forward ones, with one probe more for all directions.
        train_mode: whether probes see the model in training mode.
        objective: a value that the task measures, to improve in place of the loss; "": the loss.
        outlier_threshold: slopes beyond so many standard deviations, as the median of recent ones has it, are left out; 0: none.
        weighted: whether losses have weights, so that replicas may count differently.
        first_order: parameters that are moved by a gradient.
        trajectory: what the moves are written to, on the first replica.
    """

    model: PerturbedModel
    optimizer: ZerothOrderOptimizer
    sync: ScalarExchange
    num_perturbations: int
    eps: float
    sides: int
    train_mode: bool
    objective: str
    outlier_threshold: float
    weighted: bool
    first_order: Sequence[nn.Parameter] = ()
    trajectory: Trajectory | None = None
    _steps_without_update: int = 0

    def step(
        self, closure: Closure, module: nn.Module, seed: int, position: tuple[int, int], lr_factor: float
    ) -> dict[str, Any]:
        """Probe, share and move.

        Args:
            closure: of this replica's share of the step.
            module: the model.
            seed: the run's.
            position: the step and this replica's rank.
            lr_factor: of the learning rate, in this step.

        Returns:
            "loss", this replica's, "slope", the root of the mean square of all, and "skipped", how many of all were not
            used, because they are not finite or far out.

        Raises:
            TrainingError: no slope was usable for many steps.
        """
        step, rank = position
        with torch.no_grad(), _mode(module, self.train_mode):
            seeds = [
                [self.direction_seed(seed, step, member, k) for k in range(self.num_perturbations)]
                for member in range(self.sync.members)
            ]
            found = self._probed(closure, seeds[rank])
            slopes, shares = self._exchanged(found, seeds)
            usable = self._usable(slopes)
            rate = float(torch.tensor(self.optimizer.defaults["lr"] * lr_factor))
            if usable:
                if self.first_order:
                    self._backward(closure)
                # As a trajectory holds them: in float32.
                kept = [(one, float(np.float32(usable.get(one, 0.0) * shares[one]))) for one, _ in slopes]
                moves = self.optimizer.select(kept, rate, self.model, closure)
                self.optimizer.apply(moves, rate)
            if self.trajectory:
                self.trajectory.append(step, rate, moves if usable else [])
        self._steps_without_update = 0 if usable else self._steps_without_update + 1
        mean_loss = sum(one.loss for one in found) / len(found)
        if self._steps_without_update == MAX_EMPTY_STEPS:
            raise TrainingError(
                f"no probe of steps {step + 2 - MAX_EMPTY_STEPS} to {step + 1} gave a usable slope, and what is lowered is "
                f"{mean_loss:g}; a lower optimizer.lr or zo.eps may help"
            )
        square = sum(value**2 for value in usable.values()) / max(1, len(usable))
        return {"loss": mean_loss, "slope": math.sqrt(square), "skipped": len(slopes) - len(usable)}

    def _backward(self, loss: Closure) -> None:
        """Find the gradient of some parameters, with a graph that reaches no further back than they are."""
        own = set(self.first_order)
        still = [one for group in self.optimizer.param_groups for one in group["params"] if one not in own]
        for parameter in still:
            parameter.requires_grad_(False)
        try:
            with torch.enable_grad():
                loss().backward()
        finally:
            for parameter in still:
                parameter.requires_grad_(True)
        if not all(one.grad is None or torch.isfinite(one.grad).all() for one in self.first_order):
            raise TrainingError(
                "the gradient of zo.first_order is not finite; a lower optimizer.first_order_lr or "
                "optimizer.lr may help"
            )

    @staticmethod
    def direction_seed(seed: int, step: int, rank: int, place: int) -> int:
        """Return the seed of a direction: of a run, a step, a replica and its place among those of the replica."""
        return fold_in(seed, step, rank, place, 1)

    def _probed(self, loss: Closure, seeds: Sequence[int]) -> list[ProjectedGradient]:
        if self.optimizer.exact:
            return [directional_derivative(loss, self.model, seed) for seed in seeds]
        at_rest = float(self.model.loss(loss)) if self.sides == 1 else None
        return [projected_gradient(loss, self.model, seed, self.eps, base_loss=at_rest) for seed in seeds]

    def _exchanged(
        self, found: Sequence[ProjectedGradient], seeds: Sequence[Sequence[int]]
    ) -> tuple[ProjectedGradients, dict[int, float]]:
        """Return the slopes that all replicas found, and by their seeds how much each counts, 1 on average.

        Args:
            found: this replica's.
            seeds: of each replica.
        """
        typical = [median_low(one) if one else 0.0 for one in self._recent()]
        sizes = [[typical[one % len(typical)] for one in row] for row in seeds]
        heard, shares = self.sync.all_gather([one.value for one in found], sizes, weighted=self.weighted)
        slopes = [pair for row, values in zip(seeds, heard, strict=True) for pair in zip(row, values, strict=True)]
        return slopes, {one: share for row, share in zip(seeds, shares, strict=True) for one in row}

    def _recent(self) -> list[list[float]]:
        """Return how large the slopes of each block were in the last steps, equal on all replicas."""
        blocks, sizes = self.model.directions.block_count, self.optimizer.param_groups[0].get("sizes", ())
        return [list(one) for one in sizes] if len(sizes) == blocks else [[] for _ in range(blocks)]

    def _usable(self, slopes: ProjectedGradients) -> Mapping[int, float]:
        """Return the slopes that are used; all replicas take the same."""
        used, self.optimizer.param_groups[0]["sizes"] = reject_outliers(slopes, self._recent(), self.outlier_threshold)
        return used


def make_closure(
    task: Task,
    module: nn.Module,
    batches: Sequence[tuple[Batch, Tensor]],
    position: tuple[int, int, int] | tuple[()],
    autocast: torch.dtype | None,
    objective: str,
) -> Closure:
    """Return the mean loss over micro-batches as a function of nothing, which draws the same dropout in every call.

    Args:
        task: what is learned.
        module: the model.
        batches: with the weights of their losses.
        position: the run's seed, the replica's rank and the step; (): the model and the loss draw nothing.
        autocast: the type to compute in; None: that of the parameters.
        objective: a value that the task measures, to raise in place of lowering the loss; with a minus before it, to
            lower.

    Raises:
        RecipeError: the task measures no such value, or less of it is better.
    """
    total = sum(float(weights.sum()) for _, weights in batches) or 1.0
    device = next(module.parameters()).device
    lower, name = objective.startswith("-"), objective.removeprefix("-")
    if not lower and name and name == (task.metric if task.better == "lower" else "loss"):
        raise RecipeError(f"zo.objective: less of {name} is better; expected '-{name}', to lower it")

    def loss() -> Tensor:
        if position:
            seed_everything_at(*position)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            if objective:
                value = torch.tensor(_measured(task, module, batches, name), dtype=torch.float64)
                return value if lower else -value
            parts = [weighted_sum(task.losses(module, batch), weights) for batch, weights in batches]
        return torch.stack(parts).sum() / total

    return loss


def _measured(task: Task, module: nn.Module, batches: Sequence[tuple[Batch, Tensor]], name: str) -> float:
    if task.measure is None:
        raise RecipeError(f"zo.objective: the task measures nothing; got {name!r}; '' is the loss")
    sums = [task.measure(module, batch) for batch, _ in batches]
    if name not in sums[0]:
        raise RecipeError(f"zo.objective: the task measures {', '.join(sorted(sums[0]))}; got {name!r}")
    return sum(one[name][0] for one in sums) / (sum(one[name][1] for one in sums) or 1.0)


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = module.training
    module.train(training)
    try:
        yield
    finally:
        module.train(before)
