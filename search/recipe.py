"""The recipe of a search: a base recipe of any kind, and how to search its fields."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from pydantic_core import PydanticCustomError

from raytrain.errors import RecipeError
from raytrain.kinds import load_kinds
from raytrain.overrides import apply_overrides
from raytrain.recipe import Recipe, dotted_fields, options_by_name, options_parameter, read_toml
from raytrain.registry import resolve, suggest
from search.checks import (
    check_factors,
    check_guesses,
    check_objectives,
    check_space,
    check_statistics,
    check_steps,
)
from search.limits import Limit
from search.options import SearchOptions, rename_field
from search.pbt.options import PBTOptions
from search.scheduling.scheduler import Problem, Scheduler
from search.scheduling.segments import Objective
from search.space import Space, make_space
from search.sweep.options import GridOptions, PrunerOptions, SweepOptions
from search.tables import SEARCHES

LIMITS = "search.limits"
MODEL_STATISTICS = "search.model_statistics:ModelStatistics"
MODES: dict[str, Literal["lower", "higher"]] = {"min": "lower", "max": "higher"}
FUNCTION_SEARCH = "gp"
"""The method for a space that is a function, where none is named."""


def _read_base(value: Any) -> Recipe:
    """Read a base recipe: a name or a file, also with fields to lay over it, or a whole recipe with its kind."""
    if isinstance(value, Recipe):
        return value
    section = {"name": value} if isinstance(value, str) else value
    if not isinstance(section, Mapping) or not isinstance(section.get("kind", section.get("name")), str):
        raise PydanticCustomError(
            "no_base", "expected the name of a recipe or a file, or a table with a name or a kind"
        )
    kinds = load_kinds()
    raw = dict(section)
    if "kind" not in section:
        source = section["name"]
        if ":" in source:
            raw = {"name": source.partition(":")[2], "task": source}
        else:
            raw, file = read_toml(source, [kind.recipes for kind in kinds.values() if kind.recipes])
            raw = {"name": file.stem, **raw}
        rest = {field: inner for field, inner in section.items() if field != "name"}
        raw = apply_overrides({"kind": "train", **raw}, dict(dotted_fields(rest)))
    if raw["kind"] not in kinds or raw["kind"] == "search":
        raise RecipeError(f"base.kind: no such kind {raw['kind']!r}; {suggest(raw['kind'], kinds.keys() - {'search'})}")
    try:
        return kinds[raw["kind"]].recipe_class().model_validate(raw)
    except RecipeError as error:  # of what a name stands for; those of pydantic get their place by themselves
        raise RecipeError(f"base.{error}") from None


BaseField = Annotated[SerializeAsAny[Recipe], BeforeValidator(_read_base)]
SearchField = Annotated[
    SerializeAsAny[SearchOptions],
    options_by_name(SEARCHES, "search", partial(options_parameter, base=SearchOptions), "pbt"),
]


class SearchRecipe(Recipe):
    """How to search the fields of another recipe.

    `recipe` is another word for `base`, and takes its place; a `base` without a name or a kind is laid over it.

    Attributes:
        base: the recipe whose fields are searched: a name or a file, also as base.name with fields to lay over it, or a
            whole recipe with its kind.
        search: the method, its budget and the space. Without a name, a table of dimensions is searched by "pbt", and a
            function, whose configurations can differ in shape, by "gp".
        slots: members that train side by side; 0: as many as the cluster has room for.
    """

    kind: Literal["search"] = "search"
    base: BaseField
    search: SearchField
    slots: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        section = raw.get("search")
        if isinstance(section, Mapping) and isinstance(section.get("space"), str):
            raw = {**raw, "search": {"name": FUNCTION_SEARCH, **section}}
        base, recipe = raw.get("base"), raw.get("recipe")
        if recipe and isinstance(base, Mapping) and not {"name", "kind"} & base.keys():
            raw = {**raw, "recipe": {**({"name": recipe} if isinstance(recipe, str) else recipe), **base}}
        spelled = rename_field(raw, "recipe", "base")
        if "base" not in spelled:
            raise RecipeError("base: expected the recipe whose fields are searched, as in recipe=digits; got none")
        return spelled

    @model_validator(mode="after")
    def _fit(self) -> Self:
        check_steps(self.base, self.search)
        check_statistics(self.base, self.search)
        space = make_space(self.search.space)
        check_space(self.base, self.search, space)
        check_factors(self.search, space)
        check_guesses(self.search, space)
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps of a whole training; 1 for kinds without, whose runs are done at once."""
        return int(getattr(self.base, "steps", 1))

    @property
    def members(self) -> int:
        """Members of the population, or trials of the sweep at most."""
        return self.search.population if isinstance(self.search, PBTOptions) else getattr(self.search, "trials", 1)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all members together; 0 where the search decides on them as it goes."""
        if isinstance(self.search, PrunerOptions | GridOptions):
            return getattr(self.search, "total_steps", 0)
        return getattr(self.search, "total_steps", 0) or self.members * self.steps

    def space(self) -> Space:
        """Return the space that is searched, within its limits."""
        space, bounds = make_space(self.search.space), self._bounds()
        if not bounds:
            return space
        statistics = self._model_statistics()
        limits = (Limit(f"{LIMITS}.{name}", bound, partial(statistics.measure, name)) for name, bound in bounds.items())
        return space.limited(*limits)

    def statistics(self) -> Callable[[Mapping[str, Any]], Mapping[str, float]]:
        """Return what is recorded of the model of each candidate: changes -> statistic -> value."""
        if self.base.kind != "train":
            return lambda _: {}
        found: Callable[[Mapping[str, Any]], Mapping[str, float]] = self._model_statistics()
        return found

    def _bounds(self) -> Mapping[str, float]:
        return self.search.limits.bounds() if isinstance(self.search, SweepOptions) else {}

    def _model_statistics(self) -> Any:
        """Import what needs torch, which most commands do without."""
        wanted = {*self._bounds(), *self.search.objectives}
        return resolve({}, MODEL_STATISTICS, LIMITS)(self.base, wanted, free=isinstance(self.search, SweepOptions))

    def objective(self, metric: str, better: Literal["lower", "higher"], measured: Collection[str] = ()) -> Objective:
        """Return what is improved.

        Args:
            metric: of the base recipe's task.
            better: which values of it are better.
            measured: all metrics that the task measures, if known.

        Raises:
            RecipeError: the recipe asks for a metric that is not measured, or does not say which values are better.
        """
        wanted = self.search.metric or metric
        if measured and wanted not in measured:
            raise RecipeError(f"search.metric: the task does not measure {wanted!r}; {suggest(wanted, measured)}")
        check_objectives(self.search, wanted, measured)
        if wanted != metric and not self.search.mode:
            raise RecipeError(
                f"search.mode: required with the metric {wanted!r}, which is not the task's own ({metric}); min or max"
            )
        return Objective(wanted, MODES.get(self.search.mode, better))

    def objectives(self, first: Objective) -> tuple[Objective, ...]:
        """Return what the Pareto front is of: what is improved, and the other objectives of the recipe."""
        return (first, *(Objective(name, MODES[mode]) for name, mode in self.search.objectives.items()))

    def _rates(self, changes: Mapping[str, Any]) -> list[float]:
        """Return the learning-rate factor of each step of a trial."""
        factor = getattr(self.base.with_overrides(changes), "schedule").factor(self.steps)  # noqa: B009 - of the kind train
        return [factor(step) for step in range(self.steps)]

    def scheduler(self, objective: Objective) -> Scheduler:
        """Return the engine of the search."""
        rates = self._rates if self.base.kind == "train" else None
        problem = Problem(self.space(), objective, self.steps, self.seed, self.base.seed, rates)
        engine: Scheduler = resolve(SEARCHES, self.search.name, "search.name")(problem, self.search)
        return engine
