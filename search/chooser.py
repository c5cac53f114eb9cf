"""Choosers: what a search space asks for its values, the policies that answer, and the genome that records it."""

import builtins
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import ValidationError

from raytrain.errors import RecipeError
from search.domains import FACTOR, Bool, Choice, Domain, Float, Int, Ordered

Policy = Callable[[str, Domain], Any]
"""(path, domain) -> value: how decisions are taken, whatever the space."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One value that a space asked for.

    Attributes:
        path: its name, unique in the genome; in a table of dimensions, the dotted field of the recipe.
        domain: what it could have been.
        value: what it is.
    """

    path: str
    domain: Domain
    value: Any


@dataclass(frozen=True, slots=True)
class Genome:
    """All decisions of one run of a search space, in order: replayed, they give the same configuration."""

    decisions: tuple[Decision, ...]

    def values(self) -> dict[str, Any]:
        """Return path -> value."""
        return {decision.path: decision.value for decision in self.decisions}

    def version(self) -> str:
        """Return a hash of the paths and domains: genomes of one version mean the same by the same values."""
        asked = [[decision.path, decision.domain.model_dump(mode="json")] for decision in self.decisions]
        return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Configuration:
    """One point of a search space.

    Attributes:
        genome: the decisions.
        changes: dotted field of the base recipe -> value.
    """

    genome: Genome
    changes: Mapping[str, Any]


class Chooser:
    """Answers a space's questions by a policy, and records the decisions.

    Args:
        policy: how decisions are taken.
        known: path -> domain, of earlier runs of the space; those of this one are added.
    """

    def __init__(self, policy: Policy, known: MutableMapping[str, Domain] | None = None) -> None:
        self._policy = policy
        self._known = {} if known is None else known
        self._decisions: dict[str, Decision] = {}
        self._prefix = ""

    @property
    def genome(self) -> Genome:
        """The decisions so far."""
        return Genome(tuple(self._decisions.values()))

    def decide(self, name: str, domain: Domain) -> Any:
        """Return a value of the domain.

        Raises:
            RecipeError: the space has asked for this path before, or in an earlier run with another domain.
        """
        path = f"{self._prefix}{name}"
        if path in self._decisions:
            raise RecipeError(f"{path}: decided twice; give each decision a name of its own, as with choose.under")
        known = self._known.setdefault(path, domain)
        if known is not domain and known != domain:
            raise RecipeError(
                f"{path}: a path has one domain; got {known.summary()}, and then {domain.summary()}; put what decides "
                "between them into the path"
            )
        value = self._policy(path, domain)
        self._decisions[path] = Decision(path, domain, value)
        return value

    def one_of(self, name: str, values: Sequence[Any]) -> Any:
        """Return one of `values`, which have no order."""
        return self._listed(name, values, Choice)

    def ordered(self, name: str, values: Sequence[Any]) -> Any:
        """Return one of `values`, which have an order."""
        return self._listed(name, values, Ordered)

    def bool(self, name: str) -> Any:
        """Return False or True."""
        return self.decide(name, Bool())

    def int(self, name: str, low: builtins.int, high: builtins.int, *, log: builtins.bool = False) -> Any:
        """Return a whole number between two bounds, both included."""
        return self._between(name, low, high, Int, scale="log" if log else "linear")

    def float(
        self,
        name: str,
        low: builtins.float,
        high: builtins.float,
        *,
        log: builtins.bool = False,
        one_minus: builtins.bool = False,
        step: builtins.float = 0.0,
    ) -> Any:
        """Return a real number between two bounds; see `domains.Float` for the scales and `step`."""
        scale = "one-minus" if one_minus else "log" if log else "linear"
        return self._between(name, low, high, Float, scale=scale, step=step)

    def some_of(self, name: str, values: Sequence[Any]) -> list[Any]:
        """Return any of `values`, in their order: none, some or all."""
        with self.under(name):
            return [value for place, value in enumerate(values) if self.bool(f"{place}")]

    @contextmanager
    def under(self, *names: str | builtins.int) -> Iterator[None]:
        """Put names before the paths of all decisions inside the `with` block, as in ``under("block", 2)``."""
        before = self._prefix
        self._prefix = "".join([before, *(f"{name}." for name in names)])
        try:
            yield
        finally:
            self._prefix = before

    def _listed(self, name: str, values: Sequence[Any], domain: type[Domain]) -> Any:
        if len(values) == 1:
            return values[0]
        return self._declared(name, domain, values=tuple(values))

    def _between(
        self, name: str, low: builtins.float, high: builtins.float, domain: type[Domain], **options: Any
    ) -> Any:
        if low == high:
            return low
        return self._declared(name, domain, low=low, high=high, **options)

    def _declared(self, name: str, domain: type[Domain], **options: Any) -> Any:
        try:
            declared = _declared(domain, options)
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise RecipeError(f"{self._prefix}{name}: {message}") from None
        return self.decide(name, declared)


def _declared(domain: type[Domain], options: Mapping[str, Any]) -> Domain:
    try:
        return _domain(domain, *_flat(options))
    except TypeError:  # a value that cannot be hashed
        return domain(**options)


def _flat(options: Mapping[str, Any]) -> Iterator[Any]:
    """Yield names and values, one by one, so that the types of listed values count too."""
    for name, value in options.items():
        yield name
        if isinstance(value, tuple):
            yield len(value)
            yield from value
        else:
            yield value


@lru_cache(maxsize=1024, typed=True)
def _domain(domain: type[Domain], *flat: Any) -> Domain:
    """Return a domain; a space declares the same ones in each of its runs, and to check them takes long."""
    options: dict[str, Any] = {}
    rest = list(flat)
    while rest:
        name = rest.pop(0)
        if name == "values":
            count = rest.pop(0)
            options[name], rest = tuple(rest[:count]), rest[count:]
        else:
            options[name] = rest.pop(0)
    return domain(**options)


def sampling(rng: np.random.Generator) -> Policy:
    """Return the policy that draws each value."""
    return lambda _, domain: domain.sample(rng)


def replaying(values: Mapping[str, Any], otherwise: Policy) -> Policy:
    """Return the policy that repeats known values as they are, and asks another one for the rest."""
    return lambda path, domain: values[path] if path in values else otherwise(path, domain)


def fitting(values: Mapping[str, Any], rng: np.random.Generator) -> Policy:
    """Return the policy that repeats the values that domains of this space contain, and draws the rest.

    Args:
        values: path -> value, of a genome of this space or of an earlier version of it.
        rng: of all draws.
    """

    def decide(path: str, domain: Domain) -> Any:
        return values[path] if path in values and domain.contains(values[path]) else domain.sample(rng)

    return decide


def perturbing(
    values: Mapping[str, Any], rng: np.random.Generator, factor: float = FACTOR, resample: float = 0.0
) -> Policy:
    """Return the policy that perturbs each known value, and draws those that have become active.

    Args:
        values: path -> value.
        rng: of all draws.
        factor: see `Domain.perturb`.
        resample: probability that a value is drawn anew instead.
    """

    def decide(path: str, domain: Domain) -> Any:
        anew = rng.random() < resample
        if anew or path not in values:
            return domain.sample(rng)
        return domain.perturb(domain.nearest(values[path]), rng, factor)  # bounds may have changed since

    return decide


def crossing(first: Mapping[str, Any], second: Mapping[str, Any], rng: np.random.Generator) -> Policy:
    """Return the policy that takes each value from one of two parents, and draws those that neither has."""

    def decide(path: str, domain: Domain) -> Any:
        parents = [parent for parent in (first, second) if path in parent]
        return domain.nearest(parents[rng.integers(len(parents))][path]) if parents else domain.sample(rng)

    return decide
