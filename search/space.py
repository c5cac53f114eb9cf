"""Search spaces: functions that ask a chooser for values and return changes of a recipe.

In a recipe a space is a table of dimensions, one for each field that is searched:

    [search.space]
    optimizer.name = {type = "choice", values = ["sgd", "adamw"]}
    optimizer.lr = {type = "float", low = 1e-4, high = 1, scale = "log"}
    optimizer.momentum = {type = "float", low = 0.5, high = 0.99, scale = "one-minus", when = {optimizer.name = "sgd"}}

Or it is a Python function, with loops and conditions of its own, as "module:space":

    def space(choose):
        widths = [choose.one_of(f"width{i}", [16, 32, 64]) for i in range(choose.int("layers", 1, 3))]
        return {"task.widths": widths, "optimizer.lr": choose.float("lr", 1e-4, 1, log=True)}

Both become a `Space`: sampling, replay, mutation and enumeration are policies of the chooser that it is run with.
"""

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

import search.chooser
from raytrain.errors import RecipeError
from raytrain.recipe import dotted_fields, explain_errors
from raytrain.registry import resolve, suggest
from search.chooser import Chooser, Configuration, Policy, replaying, sampling
from search.domains import DOMAINS, Domain
from search.limits import Limit
from search.rng import keyed_generator

SPACE_FIELD = "search.space"
ARGUMENT = "choose"
MAX_DRAWS = 10_000
"""Draws until a limit counts as one that the space cannot keep to."""

MAX_COMPLETIONS = 100
"""Draws of what a guess leaves out until a limit counts as one that the guess cannot keep to."""


SpaceFunction = Callable[[Chooser], Mapping[str, Any]]
"""(chooser) -> dotted field of the recipe -> value."""


class Space:
    """A search space.

    Args:
        program: (chooser) -> dotted field of the recipe -> value. It decides by the chooser alone.
        domains: path -> domain, as far as they are known beforehand.
        limits: what configurations have to keep to; measured in this order.

    >>> space = Space(lambda choose: {"optimizer.lr": choose.float("lr", 1e-4, 1e-1, log=True)})
    >>> space.replay({"lr": 0.01}).changes
    {'optimizer.lr': 0.01}
    """

    def __init__(
        self, program: SpaceFunction, domains: Mapping[str, Domain] | None = None, limits: Sequence[Limit] = ()
    ) -> None:
        self._program = program
        self._domains = dict(domains or {})
        self._limits = tuple(limits)

    @property
    def domains(self) -> Mapping[str, Domain]:
        """The paths that are known: of a table all, of a function those that it has asked for so far."""
        return self._domains

    def run(self, policy: Policy) -> Configuration:
        """Return the configuration that a policy decides on.

        Raises:
            RecipeError: the space decides a path twice, or gives it another domain than before.
        """
        chooser = Chooser(policy, self._domains)
        changes = dict(self._program(chooser))
        return Configuration(chooser.genome, changes)

    def limited(self, *limits: Limit) -> "Space":
        """Return the part of the space that keeps to more limits."""
        return Space(self._program, self._domains, (*self._limits, *limits))

    def allows(self, configuration: Configuration) -> bool:
        """Return whether a configuration keeps to the limits."""
        return all(limit.allows(configuration.changes) for limit in self._limits)

    def sample(self, rng: np.random.Generator) -> Configuration:
        """Draw a configuration within the limits.

        Raises:
            RecipeError: none of 10,000 draws is.
        """
        for _ in range(MAX_DRAWS):
            drawn = self.run(sampling(rng))
            if self.allows(drawn):
                return drawn
        refusing = next((limit for limit in self._limits if not limit.met), self._limits[-1])
        raise RecipeError(refusing.refusal(MAX_DRAWS))

    def is_single(self) -> bool:
        """Return whether there is nothing to decide: the space has one configuration."""
        return not self.sample(np.random.default_rng(0)).genome.decisions

    def replay(self, values: Mapping[str, Any]) -> Configuration:
        """Return the configuration of known values.

        Raises:
            RecipeError: the space decides on a path that has no value.
        """
        return self.run(replaying(values, _missing))


def guessed(space: Space, values: Mapping[str, Any], seed: int, number: int) -> Configuration:
    """Return the configuration of the user's guess: its values, and draws for what it leaves out, within the limits.

    If no draw keeps to them, one that does not is returned.

    Args:
        space: what is searched.
        values: path -> value, of some decisions.
        seed: of the search.
        number: of the guess.
    """
    policy = replaying(values, sampling(keyed_generator(seed, "first", number)))
    for _ in range(MAX_COMPLETIONS):
        configuration = space.run(policy)
        if space.allows(configuration):
            break
    return configuration


@dataclass(frozen=True, slots=True)
class Dimension:
    """One field of the recipe in a table of dimensions.

    Attributes:
        domain: its values.
        when: field of an earlier dimension -> the values under which this one is active.
    """

    domain: Domain
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def active(self, changes: Mapping[str, Any]) -> bool:
        """Return whether the dimension is active after the earlier ones."""
        return all(name in changes and changes[name] in values for name, values in self.when.items())


def make_space(source: str | Mapping[str, Any]) -> Space:
    """Return the space that a recipe names or contains.

    Args:
        source: "module:attribute" of a function of a chooser, or a table of dimensions.

    Raises:
        RecipeError: there is no such function, or the table is wrong.
    """
    if not isinstance(source, str):
        dimensions = parse_dimensions(source)
        return Space(_table_program(dimensions), {name: dimension.domain for name, dimension in dimensions.items()})
    return Space(load_space_function(source))


def parse_dimensions(table: Mapping[str, Any]) -> dict[str, Dimension]:
    """Read a table of dimensions, nested by the sections of the recipe.

    Raises:
        RecipeError: a dimension is wrong; the message names its field.
    """
    dimensions: dict[str, Dimension] = {}
    for name, raw in _flat(table):
        if name in dimensions:
            raise RecipeError(f"{SPACE_FIELD}.{name}: given twice")
        when = _conditions(name, raw.get("when", {}), dimensions)
        domain = _domain(name, {key: value for key, value in raw.items() if key != "when"})
        dimensions[name] = Dimension(domain, when)
    if not dimensions:
        raise RecipeError(f"{SPACE_FIELD}: expected at least one dimension")
    return dimensions


def _table_program(dimensions: Mapping[str, Dimension]) -> SpaceFunction:
    def program(choose: Chooser) -> Mapping[str, Any]:
        changes: dict[str, Any] = {}
        for name, dimension in dimensions.items():
            if dimension.active(changes):
                changes[name] = choose.decide(name, dimension.domain)
        return changes

    return program


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (dotted field, raw dimension); a table is a dimension if its `type` is a word."""
    for key, value in table.items():
        name = f"{prefix}{key}"
        if not isinstance(value, Mapping):
            raise RecipeError(f'{SPACE_FIELD}.{name}: expected a dimension, as {{type = "float", ...}}; got {value!r}')
        if isinstance(value.get("type"), str):
            yield name, value
        elif not all(isinstance(inner, Mapping) for inner in value.values()):  # a slip in the name of another one
            raise RecipeError(
                f'{SPACE_FIELD}.{name}: expected a dimension, as {{type = "float", ...}}; got {dict(value)!r}, '
                f"which has no type; {suggest(key, [other for other in table if other != key])}"
            )
        else:
            yield from _flat(value, f"{name}.")


def _domain(name: str, raw: Mapping[str, Any]) -> Domain:
    if raw["type"] not in DOMAINS:
        raise RecipeError(f"{SPACE_FIELD}.{name}.type: no such type {raw['type']!r}; {suggest(raw['type'], DOMAINS)}")
    try:
        return DOMAINS[raw["type"]].model_validate(raw)
    except ValidationError as error:
        raise RecipeError(explain_errors(error, f"{SPACE_FIELD}.{name}")) from None


def _conditions(name: str, raw: Any, earlier: Mapping[str, Dimension]) -> dict[str, tuple[Any, ...]]:
    if not isinstance(raw, Mapping):
        raise RecipeError(f'{SPACE_FIELD}.{name}.when: expected a table, as {{optimizer.name = "sgd"}}; got {raw!r}')
    when: dict[str, tuple[Any, ...]] = {}
    for other, wanted in dotted_fields(raw):
        if other not in earlier:
            raise RecipeError(
                f"{SPACE_FIELD}.{name}.when: expected an earlier dimension; got {other!r}; {suggest(other, earlier)}"
            )
        domain = earlier[other].domain
        when[other] = tuple(wanted) if isinstance(wanted, list) else (wanted,)
        for value in when[other]:
            if not domain.contains(value):
                raise RecipeError(f"{SPACE_FIELD}.{name}.when: {other} is never {value!r}; it is {domain.summary()}")
    return when


def _missing(path: str, _: Domain) -> Any:
    raise RecipeError(f"{path}: the genome has no value for this decision; it is of another space")


def load_space_function(source: str) -> SpaceFunction:
    """Return the function at "module:attribute", its errors as those of a recipe.

    Raises:
        RecipeError: there is no such function.
    """
    function = resolve({}, source, SPACE_FIELD) if ":" in source else None
    if not callable(function):
        raise RecipeError(f"{SPACE_FIELD}: expected a table, or a function as module:attribute; got {source!r}")

    def checked(choose: Chooser) -> Mapping[str, Any]:
        try:
            changes = function(choose)
        except RecipeError as error:
            raise RecipeError(f"{source}: {error}{_user_line(error)}") from error
        except Exception as error:
            raise RecipeError(f"{source}: {type(error).__name__}: {error}{_user_line(error)}") from error
        if not isinstance(changes, Mapping):
            raise RecipeError(f"{source}: expected a mapping of recipe fields to values; got {changes!r}")
        return changes

    return checked


def is_space_function(found: Any) -> bool:
    """Return whether an object is a function with one argument, called `choose` or annotated as a `Chooser`."""
    if not inspect.isfunction(found):
        return False
    parameters = list(inspect.signature(found).parameters.values())
    return len(parameters) == 1 and (parameters[0].name == ARGUMENT or parameters[0].annotation is Chooser)


def field_line(source: str, field: str) -> str:
    """Return the line that names a field, as " (mine.py, line 4)", or "" if the source has no such line."""
    function = inspect.unwrap(resolve({}, source, SPACE_FIELD))
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        return ""
    for number, line in enumerate(lines, first):
        if f'"{field}"' in line or f"'{field}'" in line:
            return f" ({Path(inspect.getfile(function)).name}, line {number})"
    return ""


def _user_line(error: BaseException) -> str:
    """Return where the user's code was when an error was raised, as " (mine.py, line 3)"."""
    ours = {__file__, search.chooser.__file__}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in ours]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
