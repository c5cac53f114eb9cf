"""Zeroth-order steps in a training loop of the user's own."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from raytrain.errors import RecipeError
from raytrain.recipe import explain_errors
from raytrain.registry import resolve
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.loop import join_replicas
from raytrain.sync.options import SCALAR_EXCHANGES, ScalarOptions
from raytrain.sync.scalars import ScalarExchange
from raytrain.sync.transport import Transport
from raytrain.tensors import at_least_float32, seed_everything_at
from raytrain.training.build import make_zero_order
from raytrain.training.recipe import Perturbation
from raytrain.zeroth.optimizers import ZerothOrderOptimizer


class ZeroOrder:
    """Trains a model by forward passes alone, as a recipe with a zeroth-order optimizer does, to the bit.

    In a `torch.distributed` group each replica evaluates directions of its own on its own batch, and all apply all
    updates: they exchange the projected gradients.

    Args:
        model: the replica, on its device; all take the weights of the first one.
        optimizer: of its parameters, such as `raytrain.zeroth.optimizers.ZOSGD`. A schedule of torch's may change its
            learning rate.
        seed: of the directions; equal on all replicas.
        sync: "scalars" or "one-byte".
        transport: to the other replicas; None: the default group of `torch.distributed`, if there is one.
        options: as in a recipe's section [zo]: `eps`, `num_perturbations`, `estimator`, `distribution`, `sparsity`, ...

    Attributes:
        steps: done so far; set it to resume.

    Raises:
        RecipeError: an option is wrong, or does not fit the model.

    >>> from raytrain.zeroth.optimizers import ZOSGD
    >>> model, inputs = torch.nn.Linear(2, 1), torch.ones(4, 2)
    >>> zero_order = ZeroOrder(model, ZOSGD(model.parameters(), lr=0.05), eps=1e-3)
    >>> losses = [zero_order.step(lambda: model(inputs).square().mean())["loss"] for _ in range(50)]
    >>> losses[-1] < 1e-2 * losses[0]
    True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: ZerothOrderOptimizer,
        *,
        seed: int = 0,
        sync: str = "scalars",
        transport: Transport | None = None,
        **options: Any,
    ) -> None:
        try:
            zo = Perturbation.model_validate(options)
        except ValidationError as error:
            raise RecipeError(explain_errors(error, "ZeroOrder")) from None
        if zo.objective:
            raise RecipeError("ZeroOrder.objective: expected none; the closure of `step` may return any value")
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # which a schedule multiplies
        self.steps = 0
        self._model = model
        self._optimizer = optimizer
        self._seed = seed
        self._device = next(model.parameters()).device
        settings = ScalarOptions(name=sync)
        self._transport = transport or join_replicas(self._device, settings.timeout_seconds)
        make = resolve(SCALAR_EXCHANGES, sync, "sync.name")
        exchange: ScalarExchange = make(ExactAverager(self._transport), settings)
        exchange.attach(model)
        self._step = make_zero_order(model, optimizer, exchange, zo, weighted=False)

    def step(self, closure: Callable[[], Tensor]) -> dict[str, Any]:
        """Estimate the gradient, and update the parameters.

        Args:
            closure: evaluates the loss of this replica's batch, shape (). Random draws are the same in each call.

        Returns:
            "loss" of this replica; "slope", the root mean square of the projected gradients; "skipped", the number of
            those that were not used.

        Raises:
            TrainingError: replicas have diverged, or no projected gradient was usable for many steps.
        """
        place, group = (self.steps, self._transport.rank), self._optimizer.param_groups[0]

        def loss() -> Tensor:
            seed_everything_at(self._seed, self._transport.rank, self.steps)
            return at_least_float32(closure())

        with _kept_generators(self._device):
            figures = self._step.step(loss, self._model, self._seed, place, group["lr"] / group["initial_lr"])
        self._step.sync.before_step(figures["loss"], stop=False)
        self._step.sync.after_step(group["lr"])
        self.steps += 1
        return figures


@contextmanager
def _kept_generators(device: torch.device) -> Iterator[None]:
    """Leave the random generators of the user's loop after the `with` block as they were before."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - a user's loss may use the global one
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
