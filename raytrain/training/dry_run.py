"""One step of a recipe in this process, without Ray: whether it runs, and what it takes."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raytrain.data.source import GeneratorSource, RayDataSource
from raytrain.errors import RecipeError
from raytrain.optim.optimizers import state_bytes
from raytrain.run.directory import RunDirectory
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.options import FsdpOptions
from raytrain.sync.transport import LocalTransport
from raytrain.tasks.task import Batch, Task
from raytrain.terminal import format_mib
from raytrain.training.build import resolve_recipe, trainable
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import Replica
from raytrain.training.segment import segment


def dry_run(recipe: TrainRecipe) -> Iterator[str]:
    """Read the data, build the model, take one step, and yield lines about each.

    Raises:
        RecipeError: the recipe does not fit its data or its model.
        TrainingError: the loss or the gradient is not a finite number.
    """
    recipe = _without_processes(recipe)
    with tempfile.TemporaryDirectory() as folder:
        recipe, task = resolve_recipe(recipe, RunDirectory(Path(folder)))
    examples, held_out = len(task.data("train")), len(task.data("valid"))
    batch = recipe.batch * recipe.accumulate * recipe.workers
    epochs = f"; {recipe.steps:,} steps are {recipe.steps * batch / examples:.3g} epochs" if examples else ""
    yield f"data: {examples:,} examples to train on, {held_out:,} held out{epochs}"
    watch = _StepWatch(task)
    replica = trainable(recipe, watch.task, ExactAverager(LocalTransport()), new=True)
    trained = [one for one in replica.module.parameters() if one.requires_grad]
    size = sum(one.numel() for one in replica.module.parameters())
    yield f"model: {size:,} parameters, of which {sum(one.numel() for one in trained):,} are trained"
    with torch.autograd.graph.saved_tensors_hooks(watch.keep, lambda saved: saved):
        began = time.perf_counter()
        segment(recipe, watch.task, replica, 1, watch)
        seconds = time.perf_counter() - began
    yield f"batch: {watch.shapes}"
    per_worker = recipe.batch * recipe.accumulate
    yield f"step: {per_worker} examples, {watch.losses:,} losses on each of {recipe.workers} worker(s)"
    yield f"loss: {watch.loss:.4f}; the first step took {seconds:.2f} s here"
    yield _memory(replica, watch.activation_bytes)


def _without_processes(recipe: TrainRecipe) -> TrainRecipe:
    """Return the recipe without what needs other processes."""
    changes: dict[str, Any] = {}
    if isinstance(recipe.task.source, GeneratorSource):
        raise RecipeError(
            f"task.source.name: {recipe.task.source.name} makes examples in actors, which a dry run does not start"
        )
    if isinstance(recipe.task.source, RayDataSource):
        changes["task.source"] = {"name": "local"}
    if isinstance(recipe.sync, FsdpOptions):
        changes["sync"] = {"name": "ddp"}
    return recipe.with_overrides(changes)


def _memory(replica: Replica, activation_bytes: int) -> str:
    parameters = list(replica.module.parameters())
    trained = [one for one in parameters if one.requires_grad]
    parts = {
        "parameters": sum(one.nbytes for one in parameters),
        "gradients": 0 if replica.zero_order else sum(one.nbytes for one in trained),
        "optimizer": sum(state_bytes(replica.optimizer, replica.local_parameters).values()),
        "activations": activation_bytes,
    }
    each = ", ".join(f"{name} {format_mib(size)}" for name, size in parts.items())
    return f"memory of a worker, estimated: {format_mib(sum(parts.values()))} ({each})"


@dataclass
class _StepWatch:
    """What surrounds the loop of a single step; nothing is evaluated and saved.

    Attributes:
        original: the task.
        shapes: of the batch.
        losses: in the step.
        loss: of the step.
        activation_bytes: largest amount that a forward pass kept for its backward pass.
    """

    original: Task
    shapes: str = ""
    losses: int = 0
    loss: float = 0.0
    activation_bytes: int = 0
    _kept: dict[int, int] = field(default_factory=dict)
    _counted: set[int] = field(default_factory=set)

    @property
    def task(self) -> Task:
        """The task, which tells its batches and losses."""
        return replace(self.original, losses=self._count_losses)

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is kept for the backward pass, if it is no parameter."""
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            self._kept[storage.data_ptr()] = storage.nbytes()
            self.activation_bytes = max(self.activation_bytes, sum(self._kept.values()))
        return tensor

    def stop_requested(self) -> bool:
        """Return that the step is taken."""
        return False

    def on_step(self, replica: Replica, values: dict[str, float]) -> None:  # noqa: ARG002 - a callback of the loop
        """Keep the loss."""
        self.loss = values["loss"]

    def evaluate(self, replica: Replica) -> dict[str, float]:  # noqa: ARG002 - a callback of the loop
        """Return that nothing was measured."""
        return {self.original.metric: float("nan")}

    def save(self, replica: Replica) -> None:
        """Do nothing."""

    def save_metrics(self, replica: Replica, metrics: dict[str, float]) -> None:
        """Do nothing."""

    def _count_losses(self, module: nn.Module, batch: Batch) -> Tensor:
        self._kept.clear()
        losses = self.original.losses(module, batch)
        self.shapes = ", ".join(_shapes(batch))
        if id(batch) not in self._counted:  # a zeroth-order step evaluates each several times
            self._counted.add(id(batch))
            self.losses += losses.numel()
        return losses


def _shapes(batch: Batch, name: str = "") -> Iterator[str]:
    """Yield name, shape and type of each tensor of a batch."""
    if isinstance(batch, Tensor):
        yield f"{name} {tuple(batch.shape)} {str(batch.dtype).removeprefix('torch.')}".strip()
    elif isinstance(batch, list | tuple):
        for inner in batch:
            yield from _shapes(inner, name)
    elif isinstance(batch, dict):
        for key, inner in batch.items():
            yield from _shapes(inner, str(key))
