"""The zeroth-order training step: estimate and exchange projected gradients, update parameters."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from raytrain.errors import TrainingError
from raytrain.seeds.prng import fold_in
from raytrain.sync.scalars import ScalarExchange
from raytrain.zeroth.estimators import ProjectedGradient, directional_derivative, projected_gradient, reject_outliers
from raytrain.zeroth.optimizers import ProjectedGradients, ZerothOrderOptimizer
from raytrain.zeroth.perturbed import Closure, PerturbedModel
from raytrain.zeroth.trajectory import Trajectory

MAX_EMPTY_STEPS = 20
"""Consecutive steps without a usable projected gradient after which a run stops."""


@dataclass(slots=True)
class ZeroOrderStep:
    """The zeroth-order step of one replica.

    Each of n replicas estimates g_k along `num_perturbations` directions of its own on its share of the batch. All
    replicas then know all seeds and all g_k, and apply the same update.

    Attributes:
        model: the replica's, to be evaluated at perturbed parameters.
        optimizer: updates the parameters.
        sync: exchanges projected gradients with the other replicas.
        num_perturbations: directions per replica and step.
        eps: length of a perturbation.
        estimator: "central" or "forward" differences; forward ones share one evaluation without a perturbation.
        train_mode: whether the model is in training mode when it is evaluated.
        objective: a metric of the task to optimize in place of the loss; "": the loss.
        outlier_threshold: robust standard deviations beyond which projected gradients are dropped; 0: none is.
        weighted: whether losses have weights, so that replicas may count differently.
        first_order: parameters that are updated from gradients.
        trajectory: log of the updates, on the first replica.
    """

    model: PerturbedModel
    optimizer: ZerothOrderOptimizer
    sync: ScalarExchange
    num_perturbations: int
    eps: float
    estimator: Literal["central", "forward"]
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
        """Estimate, exchange, reject outliers, update and log.

        Args:
            closure: evaluates the loss of this replica's share of the batch.
            module: the model.
            seed: the run's.
            position: the step and this replica's rank.
            lr_factor: of the learning rate in this step.

        Returns:
            "loss" of this replica; "projected_gradient", the root mean square of all that were used; "skipped", the
            number of those that were not.

        Raises:
            TrainingError: no projected gradient was usable for `MAX_EMPTY_STEPS` steps.
        """
        step, rank = position
        seeds = [
            [self.direction_seed(seed, step, member, k) for k in range(self.num_perturbations)]
            for member in range(self.sync.members)
        ]
        with torch.no_grad(), _module_mode(module, self.train_mode):
            estimates = self._estimate(closure, seeds[rank])
            gathered, shares = self._exchange(estimates, seeds)
            used = self._reject_outliers(gathered)
            lr = float(torch.tensor(self.optimizer.defaults["lr"] * lr_factor))
            applied: ProjectedGradients = []
            if used:
                # Rounded to float32, as a trajectory stores them; one that is not used counts as 0 in the mean.
                weighted = [(one, float(np.float32(used.get(one, 0.0) * shares[one]))) for one, _ in gathered]
                applied = self._update(closure, weighted, lr)
            if self.trajectory:
                self.trajectory.append(step, lr, applied)
        loss = sum(one.loss for one in estimates) / len(estimates)
        self._check_progress(step, bool(used), loss)
        mean_square = sum(value**2 for value in used.values()) / max(1, len(used))
        return {"loss": loss, "projected_gradient": math.sqrt(mean_square), "skipped": len(gathered) - len(used)}

    def _update(self, closure: Closure, weighted: ProjectedGradients, lr: float) -> ProjectedGradients:
        """Update the parameters, and return the projected gradients that were applied."""
        if self.first_order:
            self._backward(closure)
        selected = self.optimizer.select(weighted, lr, self.model, closure)
        self.optimizer.apply(selected, lr)
        return selected

    def _check_progress(self, step: int, updated: bool, loss: float) -> None:
        self._steps_without_update = 0 if updated else self._steps_without_update + 1
        if self._steps_without_update == MAX_EMPTY_STEPS:
            raise TrainingError(
                f"no perturbation of steps {step + 2 - MAX_EMPTY_STEPS} to {step + 1} gave a usable projected "
                f"gradient, and the objective is {loss:g}; a lower optimizer.lr or zo.eps may help"
            )

    def _backward(self, closure: Closure) -> None:
        """Compute the gradients of `first_order`, by a graph that ends at these parameters."""
        own = set(self.first_order)
        others = [one for group in self.optimizer.param_groups for one in group["params"] if one not in own]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            with torch.enable_grad():
                closure().backward()
        finally:
            for parameter in others:
                parameter.requires_grad_(True)
        if not all(one.grad is None or torch.isfinite(one.grad).all() for one in self.first_order):
            raise TrainingError(
                "the gradient of zo.first_order is not finite; a lower optimizer.first_order_lr or "
                "optimizer.lr may help"
            )

    @staticmethod
    def direction_seed(seed: int, step: int, rank: int, index: int) -> int:
        """Return the seed of direction `index` of a replica in a step, derived from the run's seed."""
        return fold_in(seed, step, rank, index, 1)

    def _estimate(self, closure: Closure, seeds: Sequence[int]) -> list[ProjectedGradient]:
        if self.optimizer.exact:
            return [directional_derivative(closure, self.model, seed) for seed in seeds]
        base_loss = float(self.model.loss(closure)) if self.estimator == "forward" else None
        return [projected_gradient(closure, self.model, seed, self.eps, base_loss=base_loss) for seed in seeds]

    def _exchange(
        self, estimates: Sequence[ProjectedGradient], seeds: Sequence[Sequence[int]]
    ) -> tuple[ProjectedGradients, dict[int, float]]:
        """Return the projected gradients of all replicas, and seed -> its weight in the mean, 1 on average.

        Args:
            estimates: this replica's.
            seeds: of each replica.
        """
        typical = [median_low(one) if one else 0.0 for one in self._history()]
        sizes = [[typical[one % len(typical)] for one in row] for row in seeds]
        heard, shares = self.sync.all_gather([one.value for one in estimates], sizes, weighted=self.weighted)
        gathered = [pair for row, values in zip(seeds, heard, strict=True) for pair in zip(row, values, strict=True)]
        return gathered, {one: share for row, share in zip(seeds, shares, strict=True) for one in row}

    def _history(self) -> list[list[float]]:
        """Return recent magnitudes of projected gradients for each block, equal on all replicas.

        They are kept in the optimizer's first group, and so are part of its state in a checkpoint.
        """
        blocks, history = self.model.directions.block_count, self.optimizer.param_groups[0].get("history", ())
        return [list(one) for one in history] if len(history) == blocks else [[] for _ in range(blocks)]

    def _reject_outliers(self, gathered: ProjectedGradients) -> Mapping[int, float]:
        """Return seed -> projected gradient of those used, equal on all replicas; update the history."""
        used, self.optimizer.param_groups[0]["history"] = reject_outliers(
            gathered, self._history(), self.outlier_threshold
        )
        return used


@contextmanager
def _module_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Put a module into training or evaluation mode inside the `with` block."""
    before = module.training
    module.train(training)
    try:
        yield
    finally:
        module.train(before)
