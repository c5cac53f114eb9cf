"""Statistics of the model of a recipe that cost no training."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from raytrain.models.options import PretrainedOptions
from raytrain.tasks.task import Batch, Task
from raytrain.training.build import build_task
from raytrain.training.recipe import TrainRecipe
from search.limits import STATISTICS

FREE = ("parameters", "flops", "memory_mb")
"""Statistics that take milliseconds for a model that is built here; pretrained ones and those of a user may not."""
SAMPLE = 2
"""Examples that memory is measured on: a batch norm refuses one."""
LATENCY_RUNS = 15
STATES = 4
"""Copies of the weights that training keeps: themselves, their gradients, and two moments of an optimizer like Adam."""
MEBIBYTE = 2**20


class ModelStatistics:
    """Measures the model that a recipe trains, without training it; adapters are left out.

    Parameters are counted on the meta device, which allocates nothing, except those of pretrained models and of a task
    that is not one of ours. The other statistics run one or two held-out examples through the model on this machine's
    processor. Recipes that differ in nothing that the model depends on are measured once.

    Args:
        base: the recipe that candidates change.
        wanted: statistics that are recorded.
        free: whether those that are free are recorded too.
    """

    def __init__(self, base: TrainRecipe, wanted: Collection[str] = (), *, free: bool = True) -> None:
        self._base = base
        self._real = isinstance(base.task, PretrainedOptions) or ":" in base.task.name
        self._recorded = [name for name in STATISTICS if name in wanted or (free and not self._real and name in FREE)]
        self._known: dict[tuple[str, str], float] = {}

    def __call__(self, changes: Mapping[str, Any]) -> dict[str, float]:
        """Return the recorded statistics after some changes of the base recipe, by name."""
        return {name: self.measure(name, changes) for name in self._recorded}

    def measure(self, name: str, changes: Mapping[str, Any]) -> float:
        """Return one statistic after some changes of the base recipe."""
        recipe = self._base.with_overrides(changes)
        batch = recipe.batch if name == "memory_mb" else ""
        key = (name, f"{recipe.task.model_dump_json()} {batch}")
        if key not in self._known:
            self._known[key] = self._count(recipe) if name == "parameters" else MEASURES[name](recipe)
        return self._known[key]

    def _count(self, recipe: TrainRecipe) -> int:
        _, module = _built(recipe, "cpu" if self._real else "meta")
        return sum(parameter.numel() for parameter in module.parameters())


def _flops(recipe: TrainRecipe) -> float:
    """Return the floating-point operations of a forward pass of one example, in layers that have a weight matrix.

    Such a layer multiplies and adds each weight once for each position of its output. Products of activations, as in
    attention, are not counted.
    """
    task, module = _built(recipe)
    total = 0.0

    def count(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal total
        if not (inputs and inputs[0].is_floating_point()):
            return
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.RNNBase):
            matrices = sum(own.numel() for own in layer.parameters() if own.ndim == 2)
            total += 2 * matrices * inputs[0].numel() / layer.input_size
        elif isinstance(weight, Tensor) and weight.ndim >= 2:
            channels = output.shape[-1] if weight.ndim == 2 else output.shape[1]
            total += 2 * weight.numel() * output.numel() / channels

    for layer in module.modules():
        layer.register_forward_hook(count)
    _forward(task, module, _batch(task, 1))
    return total


def _latency(recipe: TrainRecipe) -> float:
    """Return the milliseconds of a forward pass of one example on one thread, the fastest of some."""
    task, module = _built(recipe)
    batch, seconds = _batch(task, 1), []
    with _one_thread():
        for _ in range(LATENCY_RUNS):
            began = time.perf_counter()
            _forward(task, module, batch)
            seconds.append(time.perf_counter() - began)
    return 1000 * min(seconds)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: several wait for each other where the machine is busy with trials."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _memory(recipe: TrainRecipe) -> float:
    """Return an estimate of the memory that training takes, in MiB.

    That is the weights, their gradients, two moments, and what a forward pass of a batch keeps for the backward pass.
    """
    task, module = _built(recipe)
    own = {parameter.untyped_storage().data_ptr(): parameter.nbytes for parameter in module.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # which holds it, so that its address is not used again
        return tensor

    module.train()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = task.losses(module, _batch(task, SAMPLE))
    activations = sum(size for address, (size, _) in kept.items() if address not in own)
    del losses
    return (STATES * sum(own.values()) + activations / SAMPLE * recipe.batch) / MEBIBYTE


MEASURES: Mapping[str, Callable[[TrainRecipe], float]] = {
    "flops": _flops,
    "latency_ms": _latency,
    "memory_mb": _memory,
}


def _built(recipe: TrainRecipe, device: str = "cpu") -> tuple[Task, nn.Module]:
    """Return the task and its model, with the random numbers of whoever calls as they were."""
    task = build_task(recipe)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return task, task.model(recipe.seed).eval()


def _batch(task: Task, count: int) -> Batch:
    examples = task.data("valid")
    return task.collate([examples[index % len(examples)] for index in range(count)])


def _forward(task: Task, module: nn.Module, batch: Batch) -> None:
    with torch.no_grad():
        task.losses(module, batch)
