"""Checks of a search before anything starts: does the base recipe take what the search will ask of it?"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from raytrain.errors import RecipeError
from raytrain.recipe import Recipe
from raytrain.registry import suggest
from search.domains import Float
from search.limits import STATISTICS
from search.options import SearchOptions
from search.prior import read_priors
from search.rng import keyed_generator
from search.space import SPACE_FIELD, Dimension, Space, field_line, guessed, make_space, parse_dimensions
from search.sweep.options import PriorOptions, SweepOptions

CHECKED_SAMPLES = 32
"""Configurations of a space function that are tried."""

Shapes = Callable[[Recipe], Mapping[str, tuple[int, ...]]]
"""recipe -> the shapes of its model's parameters."""

WAY_OUT_OF_ZERO = "a step, which is added, or set search.explore = 'resample'"


def check_steps(base: Recipe, search: SearchOptions) -> None:
    """Check that trainings can be cut where the search decides.

    Raises:
        RecipeError: the interval does not fit the base recipe's steps, or it has none.
    """
    if getattr(search, "interval", None) is None:
        return
    steps = getattr(base, "steps", None)
    if steps is None:
        raise RecipeError(
            f"search.name: {search.name} trains a recipe part by part, and {base.kind} has no steps; use random, grid "
            "or tpe"
        )
    search.check_interval(steps)


def check_statistics(base: Recipe, search: SearchOptions) -> None:
    """Check that a statistic of the model is asked of a recipe that has one, and is an objective to be lowered.

    Raises:
        RecipeError: the base recipe is of another kind, or more parameters are called better.
    """
    limits = search.limits.bounds() if isinstance(search, SweepOptions) else {}
    asked = [f"limits.{name}" for name in limits]
    for name, mode in search.objectives.items():
        if name in STATISTICS:
            asked.append(f"objectives.{name}")
            if mode == "max":
                raise RecipeError(f"search.objectives.{name}: expected min, as for each statistic of a model; got max")
    if asked and base.kind != "train":
        raise RecipeError(f"search.{asked[0]}: a statistic of the model of a training recipe; base is a {base.kind}")


def check_objectives(search: SearchOptions, metric: str, measured: Collection[str]) -> None:
    """Check that each objective is another metric than the one that is searched by, or a statistic.

    Args:
        search: how fields are searched.
        metric: what is searched by.
        measured: the metrics of the task, if known.

    Raises:
        RecipeError: one is neither.
    """
    known = (*measured, *STATISTICS)
    for name in search.objectives:
        if name == metric:
            raise RecipeError(f"search.objectives.{name}: the search goes by this metric, which is an objective anyway")
        if measured and name not in known:
            raise RecipeError(
                f"search.objectives.{name}: neither measured by the task nor a statistic; {suggest(name, known)}"
            )


def check_space(base: Recipe, search: SearchOptions, space: Space) -> None:
    """Check that the base recipe takes both bounds, or all values, of each dimension; of a function, some draws.

    Raises:
        RecipeError: it refuses one; the message has its own reason, and of a function all fields that are refused.
    """
    if isinstance(search.space, str):
        _check_draws(base, search.space, space)
        return
    for place, changes in _probes(search, space):
        try:
            base.with_overrides(changes)
        except RecipeError as error:
            raise RecipeError(f"{place}: the base recipe refuses {_listed(changes)}: {error}") from None


def _check_draws(base: Recipe, source: str, space: Space) -> None:
    """Check draws of a function; of each refused field the first value is named, with the line that names the field."""
    refused: dict[str, str] = {}
    for changes in draw_probes(space):
        try:
            base.with_overrides(changes)
        except RecipeError as error:
            for reason in str(error).splitlines():
                about = _fields_of(reason, changes)
                line = "".join([field_line(source, field) for field in about][:1])
                refused.setdefault(
                    ", ".join(about), f"{SPACE_FIELD}: the base recipe refuses {_listed(about)}{line}: {reason}"
                )
    if refused:
        raise RecipeError("\n".join(refused.values()))


def _fields_of(reason: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes that the base recipe's message is about: it begins with a field; else all of them."""
    place = reason.partition(":")[0]
    about = {field: value for field, value in changes.items() if f"{place}.".startswith(f"{field}.")}
    about |= {field: value for field, value in changes.items() if field.startswith(f"{place}.")}
    return about or dict(changes)


def check_factors(search: SearchOptions, space: Space) -> None:
    """Check that a factor can lead from each number to every other one, if numbers change by factors.

    Raises:
        RecipeError: a dimension has 0 between its bounds.
    """
    if not search.multiplies:
        return
    for path, domain in space.domains.items():
        if isinstance(domain, Float) and domain.traps(0) and domain.low < 0 < domain.high:
            raise RecipeError(
                f"search.space.{path}: no factor leads across 0, which is {domain.summary()}; give the dimension "
                f"{WAY_OUT_OF_ZERO}"
            )


def check_guesses(search: SearchOptions, space: Space) -> None:
    """Check the hyperparameters to begin with.

    Raises:
        RecipeError: one is not searched, outside its domain, or a 0 that its explore rule cannot leave.
    """
    for number, guess in enumerate(search.first):
        for path, value in guess.items():
            field, domain = f"search.first.{number}.{path}", space.domains.get(path)
            if domain is None:
                raise RecipeError(f"{field}: not searched; {suggest(path, space.domains)}")
            if not domain.contains(value):
                raise RecipeError(f"{field}: expected {domain.summary()}; got {value!r}")
            if search.multiplies and domain.traps(value):
                raise RecipeError(f"{field}: no factor leads away from 0; give search.space.{path} {WAY_OUT_OF_ZERO}")


def check_candidates(search: SearchOptions, space: Space, seed: int) -> None:
    """Check that some candidates, and all guesses, keep to the limit of a space, and that priors can be read.

    Raises:
        RecipeError: none of 10,000 draws does, or a guess does not, or an earlier search is of no use.
    """
    space.sample(keyed_generator(seed, "limit"))
    if isinstance(search, PriorOptions):
        read_priors(search.prior, space)
    for number, guess in enumerate(search.first):
        if not space.allows(guessed(space, guess, seed, number)):
            raise RecipeError(f"search.first.{number}: over a limit of search.limits, with {_listed(guess)}")


def check_shapes(base: Recipe, search: SearchOptions, shapes: Shapes) -> None:
    """Check that weights can be inherited whatever the hyperparameters.

    Args:
        base: the recipe whose fields are searched.
        search: how.
        shapes: recipe -> the shapes of its model's parameters.

    Raises:
        RecipeError: a dimension changes the shape of a parameter, and members inherit weights.
    """
    if not search.inherits_whole_weights:
        return
    before = shapes(base)
    for place, changes in _probes(search, make_space(search.space)):
        after = shapes(base.with_overrides(changes))
        for name in [*before, *after]:
            if before.get(name) != after.get(name):
                raise RecipeError(
                    f"{place}: {_listed(changes)} changes the shape of {name} from {before.get(name)} to "
                    f"{after.get(name)}, and weights of another shape cannot be inherited; set "
                    "search.other_shapes = 'overlap', with which they are inherited in part, or search.inherit = "
                    "'hyperparameters'"
                )


def check_resume(before: SearchOptions, now: SearchOptions) -> None:
    """Check that a search can go on with changed options: bounds and lists of values may be others.

    Raises:
        RecipeError: a dimension was added, removed or changed its type, or the method is another one.
    """
    for field in ("name", "population", "interval", "synchronous", "step_matched"):
        was, wanted = getattr(before, field, None), getattr(now, field, None)
        if was != wanted:
            raise RecipeError(f"search.{field}: expected {was!r}, with which the search began; got {wanted!r}")
    if isinstance(before.space, str) or isinstance(now.space, str):
        if before.space != now.space:
            raise RecipeError("search.space: expected that of the beginning; only a table can change")
        return
    old, new = parse_dimensions(before.space), parse_dimensions(now.space)
    for name in sorted(old.keys() | new.keys()):
        if problem := _difference(old.get(name), new.get(name)):
            raise RecipeError(f"search.space.{name}: {problem}; bounds and values can change, or begin a new search")


def _difference(old: Dimension | None, new: Dimension | None) -> str:
    if old is None:
        return "added since the search began"
    if new is None:
        return "removed since the search began"
    if old.domain.type != new.domain.type:
        return f"a dimension of type {old.domain.type} when the search began, and now {new.domain.type}"
    return "" if old.when == new.when else "active under other conditions when the search began"


def _probes(search: SearchOptions, space: Space) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (field of the recipe, changes) of configurations that the base recipe has to take."""
    if isinstance(search.space, str):
        yield from ((SPACE_FIELD, changes) for changes in draw_probes(space))
        return
    active: dict[str, dict[str, Any]] = {}
    for name, dimension in parse_dimensions(search.space).items():
        active[name] = {}
        for other, values in dimension.when.items():
            active[name] |= {**active[other], other: values[0]}
        for value in dimension.domain.extremes():
            yield f"search.space.{name}", {**active[name], name: value}


def draw_probes(space: Space) -> Iterator[dict[str, Any]]:
    """Yield the changes of some draws; with them a function has told most of its domains."""
    return (dict(space.sample(keyed_generator(0, "probe", number)).changes) for number in range(CHECKED_SAMPLES))


def _listed(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{field} = {value!r}" for field, value in changes.items())
