"""What has to be known of a base recipe before a search of its fields can start."""

from collections.abc import Mapping
from dataclasses import dataclass

from raytrain.errors import RecipeError
from raytrain.recipe import Recipe
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.tasks.task import Task
from raytrain.training.build import build_replica, build_task
from raytrain.training.evaluation import evaluate
from raytrain.training.recipe import TrainRecipe
from search.checks import check_candidates, check_shapes
from search.recipe import SearchRecipe
from search.scheduling.segments import Objective

SOME = 8
"""Examples that are evaluated to learn which metrics there are."""


@dataclass(frozen=True, slots=True)
class CheckedSearch:
    """A search that can start.

    Attributes:
        recipe: of the search, with the options of its base recipe that the training data decides.
        base: its base recipe.
        objective: what it improves.
        in_segments: whether each slot trains segments of members by itself; otherwise a trial is a whole run of the
            base recipe's kind, in a folder of its own.
    """

    recipe: SearchRecipe
    base: Recipe
    objective: Objective
    in_segments: bool = True

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What the Pareto front is of, `objective` first."""
        return self.recipe.objectives(self.objective)


def check_search(recipe: SearchRecipe) -> CheckedSearch:
    """Check what takes the base recipe's task and model.

    Raises:
        RecipeError: the base recipe cannot be searched so.
    """
    if not isinstance(recipe.base, TrainRecipe):
        return _check_of_any_kind(recipe)
    base = recipe.base.with_overrides({"resources.cpus": recipe.base.resources.cpus or 1.0})  # which sums depend on
    if base.epochs:
        raise RecipeError(f"base.epochs: a search counts steps; got {base.epochs:g}; set base.steps")
    if base.phases:
        raise RecipeError("base.phases: expected none, because the search decides when fields change")
    task = build_task(base)
    if found := task.infer_options():  # what an earlier attempt has decided is in the recipe already
        known = {name: getattr(base.task, name, None) or value for name, value in found.items()}
        base = base.with_overrides({f"task.{name}": value for name, value in known.items()})
        task = build_task(base)
    objective = recipe.objective(task.metric, task.better, _measured(recipe, base, task))
    mode = "min" if objective.better == "lower" else "max"
    search = recipe.search.model_copy(update={"metric": objective.metric, "mode": mode})  # for readers of the recipe
    recipe = recipe.model_copy(update={"base": base, "search": search})
    check_shapes(base, recipe.search, BaseShapes())
    check_candidates(recipe.search, recipe.space(), recipe.seed)
    return CheckedSearch(recipe, base, objective)


def _check_of_any_kind(recipe: SearchRecipe) -> CheckedSearch:
    """Check a search whose trials are runs of another kind than `train`.

    Raises:
        RecipeError: it does not say which of the metrics of such a run it improves.
    """
    for field in ("metric", "mode"):
        if not getattr(recipe.search, field):
            raise RecipeError(
                f"search.{field}: required with a base recipe of the kind {recipe.base.kind}; search.metric is one of "
                "the metrics in the result of its runs, search.mode is min or max"
            )
    return CheckedSearch(recipe, recipe.base, recipe.objective(recipe.search.metric, "lower"), in_segments=False)


def _measured(recipe: SearchRecipe, base: TrainRecipe, task: Task) -> tuple[str, ...]:
    """Return the names of all metrics, where the recipe asks for others than the task's own."""
    if recipe.search.metric in ("", task.metric) and not recipe.search.objectives:
        return ()
    exchange, valid = ExactAverager(LocalTransport()), task.data("valid")
    some = [valid[index] for index in range(min(SOME, len(valid)))]
    return tuple(evaluate(task, build_replica(base, task, exchange).module, some, SOME, exchange))


class BaseShapes:
    """Shapes of a model by parameter; recipes that differ in nothing that could change them build one model."""

    def __init__(self) -> None:
        self._known: dict[str, Mapping[str, tuple[int, ...]]] = {}

    def __call__(self, recipe: Recipe) -> Mapping[str, tuple[int, ...]]:
        """Return parameter -> shape."""
        if not isinstance(recipe, TrainRecipe):
            raise TypeError(type(recipe))
        key = recipe.task.model_dump_json() + recipe.adapter.model_dump_json()
        if key not in self._known:
            module = build_replica(recipe, build_task(recipe), ExactAverager(LocalTransport()), init_head=False).module
            self._known[key] = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        return self._known[key]
