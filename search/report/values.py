"""Values as the report shows them."""

from collections.abc import Mapping, Sequence
from typing import Any

WIDE = 20.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""


def is_wide(values: Sequence[float]) -> bool:
    """Return whether values are positive and far apart."""
    return min(values) > 0 and max(values) / min(values) >= WIDE


def wide_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    """Return an axis, logarithmic where values are positive and far apart."""
    return {"title": {"text": title}, "type": "log" if is_wide(values) else "linear"}


def listed(values: Mapping[str, Any]) -> str:
    """Return hyperparameters in words."""
    return ", ".join(f"{name} = {in_words(value)}" for name, value in values.items())


def in_words(value: Any) -> str:
    """Return a value in words, numbers to four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
