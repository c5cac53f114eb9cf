"""The interface of tasks: a record of functions for model, data, loss and metrics.

A task does not depend on workers, optimizers or Ray. Losses have weights and metrics are (sum, count) instead of means,
so that averages over any sharding are exact.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from raytrain.data.source import LocalSource, SourceField
from raytrain.errors import RecipeError
from raytrain.recipe import Options, merge_options, options_parameter
from raytrain.registry import error_location

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = Any
"""Tensors, or dicts, lists and tuples of them, as `Task.collate` returns."""

TASKS: dict[str, str] = {
    "digits": "raytrain.tasks.digits:digits Classification of handwritten digits, 8 x 8 pixels.",
    "text": "raytrain.tasks.text:text Language modelling from scratch, on bytes or characters of files.",
    "classify": "raytrain.tasks.classify:classify Text classification with an encoder or a causal LM.",
    "causal-lm": "raytrain.tasks.causal_lm:causal_lm Language modelling with a pretrained causal LM.",
    "instruct": "raytrain.tasks.instruct:instruct Supervised fine-tuning (SFT) on conversations, by the chat template.",
}


class TaskOptions(Options):
    """Options of every task.

    Attributes:
        source: input pipeline of training examples: "local", "ray", or a user's generator function.
    """

    source: SourceField = LocalSource(name="local")

    def for_evaluation(self, trained: TaskOptions) -> Mapping[str, Any]:  # noqa: ARG002 - options with a path compare it
        """Return the changes of these options to evaluate a model that was trained with other ones: none.

        Options of other data than the training data hold out all of it, as none was trained on.
        """
        return {}


class Examples(Protocol):
    """A split of the data: any object with a length and items, such as a list or a torch Dataset."""

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Return example `index`, 0 <= index < len."""
        ...


class Labelled(Examples, Protocol):
    """Examples that also say what they are and where they come from, as federated partitions ask for."""

    def label(self, index: int, /) -> int:
        """Return the class of example `index`."""
        ...

    def domain(self, index: int, /) -> str:
        """Return the source of example `index`: a package, an author, a speaker."""
        ...


def stack_examples(examples: Sequence[Any]) -> Batch:
    """Stack examples as the default of torch's DataLoader does."""
    from torch.utils.data import default_collate  # noqa: PLC0415 - this module loads without torch

    return default_collate(list(examples))


def empty_mapping() -> dict[str, Any]:
    """Return no references, or no inferred options."""
    return {}


@dataclass(frozen=True, slots=True)
class Task:
    """A model, its data and its loss.

    Attributes:
        model: seed -> model, with equal parameters for equal seeds; it does not read data.
        data: "train" or "valid" -> examples of that split; a user's `task.source` replaces "train".
        losses: (model, batch) -> loss of each example, float, shape (examples,), differentiable; with `weights` of what
            these count, such as tokens. torch's losses return their mean unless `reduction="none"`.
        weights: batch -> weight of each loss, shape (n,), >= 0; None: each example counts 1.
        collate: examples -> batch; default: that of torch's DataLoader.
        length: example -> its number of tokens. The examples of a step are sorted by it before they are divided into
            micro-batches, so that less is padding.
        measure: (model, batch) -> metric -> (sum, count); sums over batches and workers are divided by counts. None:
            "loss", the weighted mean of the losses. Called without gradients, in evaluation mode.
        infer_options: () -> options of the task that follow from its training data and are stored with the run, such
            as the class names; without those that the recipe sets. Called before anything starts, so errors in the data
            are best raised here.
        init_head: (new model on the worker's device, seed) -> None; initializes its head from the training data in
            place. None: the head keeps the values that `model` gave it.
        metric: metric of `measure` that selects the best checkpoint.
        better: whether lower or higher values of it are better.
        references: () -> baselines from the data without a model, reported beside the metrics.
        inputs: file -> its examples, without labels, for `predict`.
        predict: (model in evaluation mode, examples) -> prediction for each, as plain data.
        export: (model, folder) -> None; writes the model to a Hugging Face folder.
    """

    model: Callable[[int], nn.Module]
    data: Callable[[Literal["train", "valid"]], Examples]
    losses: Callable[[nn.Module, Batch], Tensor]
    weights: Callable[[Batch], Tensor] | None = None
    collate: Callable[[Sequence[Any]], Batch] = stack_examples
    length: Callable[[Any], int] | None = None
    measure: Callable[[nn.Module, Batch], Mapping[str, tuple[float, float]]] | None = None
    infer_options: Callable[[], Mapping[str, Any]] = empty_mapping
    init_head: Callable[[nn.Module, int], None] | None = None
    metric: str = "loss"
    better: Literal["lower", "higher"] = "lower"
    references: Callable[[], Mapping[str, float]] = empty_mapping
    inputs: Callable[[Path], Examples] | None = None
    predict: Callable[[nn.Module, Sequence[Any]], Sequence[Mapping[str, Any]]] | None = None
    export: Callable[[nn.Module, Path], None] | None = None

    def improves(self, value: float, best: float | None) -> bool:
        """Return whether a value of the metric is better than the best so far, if it is finite."""
        return math.isfinite(value) and (best is None or (value < best if self.better == "lower" else value > best))


def task_options(factory: Any) -> type[TaskOptions]:
    """Return the class of a task's options: from the parameter of its function, or of every task.

    Raises:
        RecipeError: `factory` is neither, nor a function of one parameter annotated with a subclass of `Options`.
    """
    if isinstance(factory, Task):
        return TaskOptions
    if not callable(factory):
        raise RecipeError(f"task.name: expected a raytrain.Task or a function that returns one; got {factory!r}")
    options = options_parameter(factory)
    if len(inspect.signature(factory).parameters) != int(options is not Options):
        raise RecipeError(
            f"task.name: {factory.__module__}:{factory.__name__} must take nothing, or one parameter annotated with a "
            "subclass of raytrain.Options"
        )
    return merge_options(options, TaskOptions, "task.name")


def make_task(factory: Any, options: Options) -> Task:
    """Return the task of a factory and options.

    Raises:
        RecipeError: the factory raises an error, or returns something other than a `Task`.
    """
    if isinstance(factory, Task):
        return factory
    try:
        task = factory() if type(options) is TaskOptions else factory(options)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"task.name: {options.name} raised {type(error).__name__}: {error}{error_location(error)}"
        ) from error
    if not isinstance(task, Task):
        raise RecipeError(f"task.name: {options.name} returned {task!r}; expected a raytrain.Task")
    return task
