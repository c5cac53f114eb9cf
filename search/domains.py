"""Domains: the values that one hyperparameter can have, and how they are sampled and perturbed.

All methods keep values inside the domain. A perturbation goes up as often as down; at a bound it is reflected.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from raytrain.recipe import Section

FACTOR = 1.2
"""Jaderberg et al. 2017 multiply by 1.2 or 0.8."""


class Domain(Section, ABC):
    """The values that one hyperparameter can have."""

    type: str

    @property
    @abstractmethod
    def count(self) -> float:
        """Number of values; infinite for real numbers."""

    @property
    def is_listed(self) -> bool:
        """Whether its values are listed one by one."""
        return False

    @abstractmethod
    def contains(self, value: Any) -> bool:
        """Return whether `value` is one of them."""

    @abstractmethod
    def nearest(self, value: Any) -> Any:
        """Return the value of the domain that is nearest to `value`; without an order, `value` itself or the first."""

    @abstractmethod
    def sample(self, rng: np.random.Generator) -> Any:
        """Draw a value, uniform on the domain's scale."""

    @abstractmethod
    def at(self, fraction: float) -> Any:
        """Return the value below which a share `fraction` of the domain lies, from 0 up to 1; listed ones in order."""

    @abstractmethod
    def perturb(self, value: Any, rng: np.random.Generator, factor: float) -> Any:
        """Draw a value near `value`.

        Args:
            value: inside the domain.
            rng: of this draw.
            factor: what a number is multiplied or divided by, above 1.
        """

    @abstractmethod
    def grid(self, points: int) -> list[Any]:
        """Return at most `points` numbers, equally spaced on the scale, bounds included; or all listed values."""

    @abstractmethod
    def extremes(self) -> tuple[Any, ...]:
        """Return the values that a recipe has to accept: both bounds, or all listed values."""

    @abstractmethod
    def summary(self) -> str:
        """Return the values in words, for a message."""

    def unit(self, value: Any) -> float | None:  # noqa: ARG002 - for domains with an order
        """Return the position of `value` on the scale, from 0 to 1; None without an order."""
        return None

    def index(self, value: Any) -> int:  # noqa: ARG002 - for listed values
        """Return where `value` is in the list; 0 for numbers."""
        return 0

    def traps(self, value: Any) -> bool:  # noqa: ARG002 - for numbers
        """Return whether no perturbation leads away from `value`."""
        return False


class _Numeric(Domain):
    """Numbers between two bounds, on an axis: x, ln x or -ln(1 - x)."""

    low: float
    high: float
    scale: Literal["linear", "log", "one-minus"] = "linear"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"expected low < high; got low = {self.low:g} and high = {self.high:g}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"expected low > 0 with scale = 'log'; got low = {self.low:g}; use scale = 'linear'")
        if self.scale == "one-minus" and self.high >= 1:
            raise ValueError(f"expected high < 1 with scale = 'one-minus'; got high = {self.high:g}")
        return self

    def sample(self, rng: np.random.Generator) -> Any:
        return self.at(rng.random())

    def at(self, fraction: float) -> Any:
        low, high = self._span()
        return self.nearest(self._value(low + (high - low) * fraction))

    def unit(self, value: Any) -> float:
        low, high = self._axis(self.low), self._axis(self.high)
        return (self._axis(self.nearest(value)) - low) / (high - low)

    def extremes(self) -> tuple[Any, ...]:
        return (self.low, self.high)

    def summary(self) -> str:
        scale = "" if self.scale == "linear" else f" ({self.scale})"
        return f"between {self.low:g} and {self.high:g}{scale}"

    def _span(self) -> tuple[float, float]:
        """Return the ends of the axis that samples are drawn from."""
        return self._axis(self.low), self._axis(self.high)

    def _spaced(self, points: int) -> list[Any]:
        axis = np.linspace(self._axis(self.low), self._axis(self.high), points)
        return [self.nearest(self._value(place)) for place in axis.tolist()]

    def _axis(self, value: float) -> float:
        if self.scale == "log":
            return math.log(value)
        return -math.log1p(-value) if self.scale == "one-minus" else value

    def _value(self, axis: float) -> float:
        if self.scale == "log":
            return math.exp(axis)
        return -math.expm1(-axis) if self.scale == "one-minus" else axis


class Float(_Numeric):
    """Real numbers between two bounds.

    Attributes:
        low, high: the bounds, both included.
        scale: the axis on which samples are uniform and factors are steps. "linear": x; "log": ln x, for learning
            rates and weight decay; "one-minus": -ln(1 - x), for averaging coefficients such as Adam's betas.
        step: standard deviation of a perturbation, which is then additive; 0: a perturbation multiplies.
    """

    type: Literal["float"] = "float"
    step: float = Field(0.0, ge=0)

    @property
    def count(self) -> float:
        """Infinity."""
        return math.inf

    def contains(self, value: Any) -> bool:
        """Return whether `value` is a number between the bounds."""
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high

    def nearest(self, value: Any) -> float:
        """Return `value`, or the bound that it is beyond."""
        return min(max(float(value), self.low), self.high)

    def perturb(self, value: Any, rng: np.random.Generator, factor: float = FACTOR) -> float:
        """Move `value` up or down, with equal probability.

        With x = `value`, f = `factor`: on a linear scale x' = f x or (2 - f) x, on a logarithmic one f x or x / f, on
        one-minus 1 - (1 - x) / f or 1 - (1 - x) f; with a `step`, x' = x + step N(0, 1). Then x' is reflected at the
        bounds, on the scale.

        Source: Jaderberg et al. 2017, section 4.1 (perturb); the toy problem of its Figure 2 adds noise.
        """
        if self.step:
            return self.nearest(_reflect(value + self.step * rng.standard_normal(), self.low, self.high))
        sign = _sign(rng)
        if self.scale == "linear":
            return self.nearest(_reflect(value * (1 + sign * (factor - 1)), self.low, self.high))
        axis = self._axis(value) + sign * math.log(factor)
        return self.nearest(self._value(_reflect(axis, *self._span())))

    def grid(self, points: int) -> list[float]:
        """Return `points` numbers, equally spaced on the scale, bounds included."""
        return self._spaced(points)

    def traps(self, value: Any) -> bool:
        """Return whether `value` is 0 and perturbations multiply."""
        return bool(value == 0) and self.scale == "linear" and not self.step


class Int(_Numeric):
    """Whole numbers between two bounds.

    Attributes:
        low, high: the bounds, both included.
        scale: "linear": samples are uniform; "log": they are uniform in ln x.
    """

    type: Literal["int"] = "int"
    low: int
    high: int
    scale: Literal["linear", "log"] = "linear"

    @property
    def count(self) -> float:
        """Number of whole numbers."""
        return self.high - self.low + 1

    def contains(self, value: Any) -> bool:
        """Return whether `value` is a whole number between the bounds."""
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

    def nearest(self, value: Any) -> int:
        """Return `value`, rounded and halves away from zero, or the bound that it is beyond."""
        return min(max(_round(value), self.low), self.high)

    def perturb(self, value: Any, rng: np.random.Generator, factor: float = FACTOR) -> int:
        """Move `value` up or down, with equal probability, by max(1, round(|value| (factor - 1))).

        Both steps are equally long, so small numbers do not drift to zero, and the value always changes.
        """
        step = max(1, _round(abs(value) * (factor - 1)))
        reflected = self.nearest(_reflect(value + _sign(rng) * step, self.low, self.high))
        if reflected != value:
            return reflected
        return int(value) + (1 if value < self.high else -1)

    def grid(self, points: int) -> list[int]:
        """Return at most `points` different numbers, equally spaced on the scale, bounds included."""
        if points > self.high - self.low:
            return list(range(self.low, self.high + 1))
        return sorted(set(self._spaced(points)))

    def _span(self) -> tuple[float, float]:
        return self._axis(self.low - 0.5), self._axis(self.high + 0.5)  # rounding gives each number an equal part


class _Listed(Domain):
    """Values that are listed one by one."""

    values: tuple[Any, ...]

    @field_validator("values", mode="before")
    @classmethod
    def _as_data(cls, values: Any) -> Any:
        """Return the values as they are read back from a file, where a tuple is a list."""
        try:
            return json.loads(json.dumps(values, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected numbers, text, lists and tables: {error}") from None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for index, value in enumerate(self.values):
            if _index(self.values[:index], value) is not None:
                raise ValueError(f"expected different values; got {value!r} twice")
        if len(self.values) < 2:
            raise ValueError(f"expected at least 2 values; got {list(self.values)!r}")
        return self

    @property
    def count(self) -> float:
        return len(self.values)

    @property
    def is_listed(self) -> bool:
        return True

    def contains(self, value: Any) -> bool:
        return _index(self.values, value) is not None

    def nearest(self, value: Any) -> Any:
        return self.values[_index(self.values, value) or 0]

    def sample(self, rng: np.random.Generator) -> Any:
        return self.values[rng.integers(len(self.values))]

    def at(self, fraction: float) -> Any:
        return self.values[int(fraction * len(self.values))]

    def index(self, value: Any) -> int:
        return _index(self.values, value) or 0

    def grid(self, points: int) -> list[Any]:  # noqa: ARG002 - takes the place of that of numbers
        return list(self.values)

    def extremes(self) -> tuple[Any, ...]:
        return self.values

    def summary(self) -> str:
        return f"one of {', '.join(map(repr, self.values))}"


class Ordered(_Listed):
    """Listed values with an order, as the sizes of a model.

    Attributes:
        values: at least two, all different.
    """

    type: Literal["ordered"] = "ordered"

    def perturb(self, value: Any, rng: np.random.Generator, factor: float = FACTOR) -> Any:  # noqa: ARG002
        """Move to one of the two neighbours, with equal probability; from an end, to its one neighbour."""
        index = _index(self.values, value) or 0
        return self.values[round(_reflect(index + _sign(rng), 0, len(self.values) - 1))]

    def unit(self, value: Any) -> float:
        """Return the position of `value` in the order, from 0 to 1."""
        return (_index(self.values, value) or 0) / (len(self.values) - 1)


class Choice(_Listed):
    """Listed values without an order, as the names of optimizers.

    Attributes:
        values: at least two, all different.
    """

    type: Literal["choice"] = "choice"

    def perturb(self, value: Any, rng: np.random.Generator, factor: float = FACTOR) -> Any:  # noqa: ARG002
        """Draw anew: values without an order have no neighbours."""
        return self.sample(rng)


class Bool(_Listed):
    """False or true."""

    type: Literal["bool"] = "bool"
    values: tuple[Literal[False], Literal[True]] = Field((False, True), exclude=True)

    def perturb(self, value: Any, rng: np.random.Generator, factor: float = FACTOR) -> Any:  # noqa: ARG002
        """Draw anew."""
        return self.sample(rng)


DOMAINS: dict[str, type[Domain]] = {"float": Float, "int": Int, "ordered": Ordered, "choice": Choice, "bool": Bool}


def _index(values: Sequence[Any], wanted: Any) -> int | None:
    """Return where `wanted` is among `values`; True is not 1, and 1 is not 1.0."""
    for index, value in enumerate(values):
        if type(value) is type(wanted) and value == wanted:
            return index
    return None


def _reflect(value: float, low: float, high: float) -> float:
    """Return `value` reflected at the bounds until it is between them."""
    if low <= value <= high:
        return value
    distance = (value - low) % (2 * (high - low))
    return low + min(distance, 2 * (high - low) - distance)


def _round(value: float) -> int:
    """Round to the nearest whole number, halves away from zero."""
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def _sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1
