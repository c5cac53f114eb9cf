"""Parallel prediction for the examples of a file, on Ray."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util import ActorPool

from raytrain.errors import RaytrainError, RecipeError, TrainingError
from raytrain.launch.resources import check_reachable, cpus_per_worker, nodes_here
from raytrain.launch.session import OWN_CLUSTER, cluster_nodes, ray_session
from raytrain.registry import error_location, resolve
from raytrain.tasks.task import Examples
from raytrain.training.trained_model import TrainedModel


def predict_file(
    load: str, folder: Path, overrides: Mapping[str, Any], source: Path, target: Path, address: str | None
) -> int:
    """Predict each example of a file with the best model of a run, on as many workers as the run has.

    Args:
        load: `Kind.load` of the run's kind.
        folder: the run's; workers on all machines must see it, and `source`.
        overrides: changes to its recipe.
        source: file of examples without labels.
        target: file with one line of JSON for each example, in order; written atomically.
        address: of a running Ray cluster; None or "local": start Ray on this machine.

    Returns:
        How many lines were written.

    Raises:
        RecipeError: the task cannot predict, or a file or the cluster does not allow it.
        TrainingError: a prediction failed.
    """
    trained = _load(load, folder, overrides)
    count = len(_inputs(trained, source))
    address = None if address == OWN_CLUSTER else address
    workers, resources = trained.workers, trained.resources
    if address is not None:
        check_reachable(address)
    elif not ray.is_initialized():
        cpus_per_worker(nodes_here(workers, resources), workers, resources.cpus)
    aside = target.absolute().with_name(f".{target.name}.partial")
    try:
        with aside.open("w", encoding="utf-8") as lines, ray_session(address):
            cpus = cpus_per_worker(cluster_nodes(workers, resources), workers, resources.cpus)
            for line in _lines(trained, cpus, count, (load, folder.absolute(), dict(overrides), source.absolute())):
                lines.write(line + "\n")
        aside.replace(target)
    except OSError as error:
        raise RecipeError(f"--output: cannot write {target}: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)
    return count


def _load(load: str, folder: Path, overrides: Mapping[str, Any]) -> TrainedModel:
    trained: TrainedModel = resolve({}, load, "kind")(folder, overrides)
    return trained


def _inputs(trained: TrainedModel, source: Path) -> Examples:
    task = trained.task
    if task.inputs is None or task.predict is None:
        raise RecipeError(
            f"task.name: {trained.task_name} cannot predict from a file: its Task has no `inputs` and `predict`"
        )
    try:
        return task.inputs(source)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"--input: {source}: {type(error).__name__}: {error}{error_location(error)}") from error


def _lines(
    trained: TrainedModel, cpus: float, count: int, model: tuple[str, Path, dict[str, Any], Path]
) -> Iterator[str]:
    """Yield predictions in order, as JSON."""
    batch, resources = trained.batch, trained.resources
    workers = min(trained.workers, math.ceil(count / batch))
    where = {"resources": resources.custom, "label_selector": resources.labels or None}
    kind = ray.remote(num_cpus=cpus, num_gpus=resources.gpus, **where)(_Predictor)
    pool = ActorPool([kind.remote(*model, max(1, int(cpus)), os.getcwd()) for _ in range(workers)])
    ranges = [(start, min(start + batch, count)) for start in range(0, count, batch)]
    try:
        for lines in pool.map(lambda worker, part: worker.lines.remote(*part), ranges):
            yield from lines
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, RaytrainError):
            raise cause from None
        raise TrainingError(f"predicting failed on a worker: {type(cause).__name__}: {cause}") from error


class _Predictor:
    """An actor with the model."""

    def __init__(
        self, load: str, folder: Path, overrides: dict[str, Any], source: Path, threads: int, import_from: str
    ) -> None:
        sys.path.append(import_from)
        torch.set_num_threads(threads)
        trained = _load(load, folder, overrides)
        self._task = trained.task
        self._autocast = trained.autocast
        self._device = torch.device("cuda" if trained.resources.gpus else "cpu")
        self._module = trained.module().to(self._device).eval()
        self._examples = _inputs(trained, source)

    def lines(self, start: int, stop: int) -> list[str]:
        """Return the predictions for the examples from `start` to `stop`, as lines of JSON."""
        examples = [self._examples[index] for index in range(start, stop)]
        with torch.no_grad(), torch.autocast(self._device.type, dtype=self._autocast, enabled=bool(self._autocast)):
            predicted = self._task.predict(self._module, examples) if self._task.predict else []
        if len(predicted) != len(examples):
            raise TrainingError(f"Task.predict returned {len(predicted)} predictions for {len(examples)} examples")
        return [json.dumps(each, ensure_ascii=False) for each in predicted]
