"""What is trained: a task is a record of functions, and a user's own is one too.

A task says how to make the model, where examples come from, and what a batch of them costs. It knows nothing of
workers, optimizers or Ray. Weights make every average exact: a loss counts as much as its weight on any sharding, and a
measured value is a (sum, count), never a mean.
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
"""Tensors, or dicts, lists and tuples of them: what `Task.collate` makes of some examples."""

TASKS: dict[str, str] = {
    "digits": "raytrain.tasks.digits:digits",
    "text": "raytrain.tasks.text:text",
    "classify": "raytrain.tasks.classify:classify",
    "causal-lm": "raytrain.tasks.causal_lm:causal_lm",
    "instruct": "raytrain.tasks.instruct:instruct",
}


class TaskOptions(Options):
    """What every task takes beside the options that it declares.

    Attributes:
        source: where the training examples come from: "local", "ray", or a function of the user's that makes them.
    """

    source: SourceField = LocalSource(name="local")

    def for_evaluation(self, trained: TaskOptions) -> Mapping[str, Any]:  # noqa: ARG002 - those that have data look
        """Return which options change to measure with these what was `trained` with others: none.

        Options of data that has another place hold all of it out, because nothing of it was learned from.
        """
        return {}


class Examples(Protocol):
    """A split of the data: anything with a length and items, a list or a torch Dataset included."""

    def __len__(self) -> int:
        """Return how many examples there are."""
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
    """Stack examples as torch's DataLoader does."""
    from torch.utils.data import default_collate  # noqa: PLC0415 - this module loads without torch

    return default_collate(list(examples))


def empty_mapping() -> dict[str, Any]:
    """Return no figures to compare with, or no options to settle."""
    return {}


@dataclass(frozen=True, slots=True)
class Task:
    """A model, its data and its loss.

    Attributes:
        model: seed -> the model, with equal parameters for equal seeds. It looks at no data, so that it can be made
            anew where there is none.
        data: "train" or "valid" -> the examples of that split; a source of the user's takes the place of "train".
        losses: (model, batch) -> the loss of each example or token, float, shape (n,), with its graph.
        weights: batch -> what each of those losses counts, shape (n,), not negative; None: each counts 1.
        collate: examples -> a batch; the default stacks them as torch's DataLoader does.
        length: example -> its number of tokens. The examples of a step are sorted by it before they are divided into
            micro-batches, so that less is padding.
        measure: (model, batch) -> name -> (sum, count), added up over batches and workers and then divided; None: the
            weighted mean of the losses under the name "loss". Called without gradients and in evaluation mode.
        infer_options: () -> options of the task that follow from its training data and are stored with the run, such
            as the class names; without those that the recipe sets. Called before anything starts, so errors in the data
            are best raised here.
        init_head: (new model on the worker's device, seed) -> None; initializes its head from the training data in
            place. None: the head keeps the values that `model` gave it.
        metric: the name in `measure` that decides which checkpoint is best.
        better: whether a lower or a higher metric is better.
        references: () -> figures to stand beside the metrics in the result, found from the data without a model.
        inputs: a file to predict on -> its examples, without labels.
        predict: (model in evaluation mode, examples) -> for each of them what is predicted, as plain data.
        export: (model, folder) -> writes the model as others load it, a folder of Hugging Face's form.
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
        """Return whether `value` of the metric is better than `best`; any number is better than None, NaN is never."""
        return math.isfinite(value) and (best is None or (value < best if self.better == "lower" else value > best))


def task_options(factory: Any) -> type[TaskOptions]:
    """Return the options of a task: those of every task for a `Task` or a function that takes nothing.

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
    """Return the task that `factory` makes of `options`.

    Raises:
        RecipeError: it raises an error, or what it returns is not a `Task`.
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
