"""The model of a finished run, of any kind: evaluated, exported, and loaded to predict."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from raytrain.errors import RecipeError
from raytrain.models.adapters import merge_adapter
from raytrain.sections import Resources
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.tasks.task import Task
from raytrain.training.evaluation import evaluate


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """The best model of a run, to evaluate, export and predict with.

    Attributes:
        task: what it was trained on.
        task_name: of the task, for messages.
        step: of the checkpoint: optimizer steps, rounds, or what else the kind counts.
        module: () -> the model, read from the checkpoint; with averaged weights if there are any.
        adapted: whether it has an adapter, which an export merges into its layers.
        batch: examples of a forward pass.
        autocast: the type of a forward pass, if it is not that of the weights.
        workers: predict in parallel.
        resources: of each worker.
    """

    task: Task
    task_name: str
    step: int
    module: Callable[[], nn.Module]
    adapted: bool = False
    batch: int = 256
    autocast: torch.dtype | None = None
    workers: int = 1
    resources: Resources = Resources()

    def evaluate(self) -> dict[str, float]:
        """Return its metrics on the held-out examples, measured in this process, and the step that they are of."""
        averager, valid = ExactAverager(LocalTransport()), self.task.data("valid")
        metrics = evaluate(self.task, self.module(), valid, self.batch, averager, autocast=self.autocast)
        return {"step": self.step, **metrics}

    def export(self, target: Path) -> None:
        """Write it as a folder that Hugging Face's `from_pretrained` reads, adapters merged.

        Args:
            target: a folder that does not exist or is empty; it is complete afterwards, or as it was.

        Raises:
            RecipeError: the task's model has no such form, or the folder is not empty.
        """
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise RecipeError(f"DIR: {target} exists and is not an empty folder; name another")
        if self.task.export is None:
            raise RecipeError(f"task.name: the model of {self.task_name} has no form to export: Task.export is None")
        module = self.module()
        if self.adapted:
            merge_adapter(module)
        aside = target.absolute().with_name(f".{target.absolute().name}.partial")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            self.task.export(module.eval(), aside)
            aside.rename(target)
        except OSError as error:
            raise RecipeError(f"DIR: cannot write {target}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
