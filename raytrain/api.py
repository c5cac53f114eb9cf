"""The commands as functions of Python: train, search, federate, load and evaluate."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain.by_value import check_importable, name_objects
from raytrain.kinds import RunOptions, load_kind
from raytrain.reading import expand_shorthand, model_loader, parse_recipe, read_recipe, with_kind
from raytrain.recipe import Recipe, dotted_fields
from raytrain.registry import resolve
from raytrain.run.result import Result
from raytrain.tasks.task import Task

if TYPE_CHECKING:
    from raytrain.training.trained_model import TrainedModel

PathLike = str | os.PathLike[str]
RecipeLike = PathLike | Mapping[str, Any] | Recipe | Task | Callable[..., Task]
"""A shipped recipe's name, a file, a run's folder, nested data, a recipe, or a task or a function that returns one."""


def train(
    recipe: RecipeLike,
    /,
    *,
    out: PathLike | None = None,
    resume: bool = False,
    address: str | None = None,
    **fields: Any,
) -> Result:
    """Train a recipe as `raytrain train` does, and return how the run ended.

    Tasks, optimizers, schedules and callbacks may be given by value, also those of a notebook or a script. Modules that
    these import have to be installed on each machine of a cluster.

    Args:
        recipe: a shipped recipe's name, a file, a run's folder, nested data, or a task.
        out: the run's folder; default: runs/NAME-TIME.
        resume: continue the run in `out`, or in the folder that `recipe` is.
        address: of a Ray cluster, or "local" for a Ray of this machine; default: this machine, without Ray.
        fields: of the recipe, to change: `steps=100`, `optimizer="lion"`, `optimizer={"lr": 1e-3}`,
            `**{"optimizer.lr": 1e-3}`.

    Raises:
        RecipeError: a field or an argument is wrong, and nothing was started.
        TrainingError: the run failed; what was computed is in its folder.

    >>> folder = getfixture("tmp_path") / "digits"
    >>> result = train("digits", steps=20, task={"widths": [4]}, out=folder)
    >>> result.status, result.figures["steps"]
    ('done', 20)
    >>> train(folder, resume=True, steps=30).figures["steps"]
    30
    """
    return _run("train", recipe, fields, out, resume, address)


def search(
    recipe: RecipeLike,
    /,
    *,
    out: PathLike | None = None,
    resume: bool = False,
    address: str | None = None,
    **fields: Any,
) -> Result:
    """Search the fields of a recipe as `raytrain search` does, and return how the run ended.

    Args:
        recipe: a recipe of the kind search.
        out: as of `train`.
        resume: as of `train`.
        address: as of `train`; default: a Ray of this machine.
        fields: as of `train`.

    Raises:
        RaytrainError: as `train`.

    >>> fields = {"base.steps": 20, "base.task.widths": [4], "search.population": 4, "search.interval": 10}
    >>> result = search("digits-pbt", out=getfixture("tmp_path") / "search", **fields)
    >>> result.status, load(result).task.metric
    ('done', 'accuracy')
    """
    return _run("search", recipe, fields, out, resume, address)


def federate(
    recipe: RecipeLike,
    /,
    *,
    out: PathLike | None = None,
    resume: bool = False,
    address: str | None = None,
    **fields: Any,
) -> Result:
    """Run a recipe's federated rounds as `raytrain federate` does, and return how the run ended.

    Args:
        recipe: a recipe of the kind federate.
        out: as of `train`.
        resume: as of `train`.
        address: as of `train`; default: a Ray of this machine.
        fields: as of `train`.

    Raises:
        RaytrainError: as `train`.

    >>> fields = {"rounds": 1, "protocol.local_steps": 2, "clients.actors": 1}
    >>> result = federate("digits-fedkseed", out=getfixture("tmp_path") / "federated", **fields)
    >>> result.status, result.figures["rounds"]
    ('done', 1)
    """
    return _run("federate", recipe, fields, out, resume, address)


def load(run: PathLike | Result, /, *, trust: bool = False, **fields: Any) -> "TrainedModel":
    """Load the best model of a run: `load(run).module()` is the `torch.nn.Module`.

    Args:
        run: the folder of a run, or its result.
        trust: run the code that the recipe of a fetched run names.
        fields: of the recipe, to change, as other data: `task={"path": "test.tsv"}`. What was trained by value is given
            again in another process: `task=circle`.

    Raises:
        RecipeError: there is no run, or the changes do not fit it.
        CheckpointError: there is no model yet, or it is damaged.

    >>> result = train("digits", steps=20, task={"widths": [4]}, out=getfixture("tmp_path") / "digits")
    >>> model = load(result).module()
    >>> model(torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """
    folder = Path(run.folder if isinstance(run, Result) else run)
    trained: TrainedModel = resolve({}, model_loader(folder, trust=trust), "kind")(folder, _changes(fields))
    return trained


def evaluate(run: PathLike | Result, /, *, trust: bool = False, **fields: Any) -> dict[str, float]:
    """Evaluate the best model of a run on held-out data, and return its metrics and its step.

    Args:
        run: as of `load`.
        trust: as of `load`.
        fields: as of `load`.

    Raises:
        RaytrainError: as `load`.

    >>> result = train("digits", steps=20, task={"widths": [4]}, out=getfixture("tmp_path") / "digits")
    >>> evaluate(result)["step"]
    20
    """
    return load(run, trust=trust, **fields).evaluate()


def run_recipe(
    recipe: Recipe, source: object, out: Path | None, *, resume: bool = False, address: str | None = None
) -> Result:
    """Run a recipe of any kind.

    Args:
        recipe: to run.
        source: what it was read from; the run that is resumed, if that is a folder and `out` is not given.
        out: the run's folder; None: runs/NAME-TIME.
        resume: continue the run in the folder.
        address: of a Ray cluster; None: the kind decides.

    Raises:
        RaytrainError: as the kind's `run`.
    """
    folder = out or Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if resume and out is None:
        folder = Path(str(source))
    result: Result = resolve({}, load_kind(recipe.kind).run, "kind")(recipe, RunOptions(folder, resume, address))
    return replace(result, folder=str(folder.absolute()))


def _run(
    verb: str, source: RecipeLike, fields: Mapping[str, Any], out: PathLike | None, resume: bool, address: str | None
) -> Result:
    recipe = parse_recipe(_raw(source, verb), _changes(fields))
    if verb != "train":
        check_importable(recipe, "an actor of Ray")
    return run_recipe(recipe, source, Path(out) if out is not None else None, resume=resume, address=address)


def _raw(source: RecipeLike, verb: str) -> dict[str, Any]:
    """Return a recipe as nested data.

    Raises:
        RecipeError: there is none, or it is of another kind.
    """
    if isinstance(source, str | os.PathLike):
        return read_recipe(os.fspath(source), verb, trust=False)[0]
    raw = source.to_dict() if isinstance(source, Recipe) else source
    if not isinstance(raw, Mapping):
        place: str = name_objects(source)
        raw = {"name": place.partition(":")[2], **expand_shorthand(place, verb)}
    return with_kind(name_objects(raw), verb, "this")


def _changes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments as dotted fields."""
    return dict(dotted_fields(name_objects(fields)))
