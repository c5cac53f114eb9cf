"""How a run ended, as `result.json` holds it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from raytrain.json_files import is_number


def _named(best: Mapping[str, Any]) -> Mapping[str, Any]:
    """Check what the best evaluation says of itself, if there was one."""
    value = best.get("value")
    if best and not (isinstance(best.get("metric"), str) and is_number(value) and "step" in best):
        raise ValueError(f"expected metric, value and step; got {', '.join(sorted(best))}")
    return best


@dataclass(frozen=True, slots=True)
class Result:
    """How a run of any kind ended, which is what `result.json` holds.

    Attributes:
        status: "done", "stopped early", "interrupted" or "failed".
        metrics: of the last evaluation.
        best: {"step", "value", "metric"} of the best evaluation.
        references: figures to compare the metrics with.
        figures: what the kind of run counts, by name, such as steps and bytes; units are part of the names.
        seconds: time spent computing, over all attempts.
        restarts: how often workers had to be started again.
        checkpoint: the last one, if there is one.
        folder: of the run.
        error: why it failed.
    """

    status: Literal["done", "stopped early", "interrupted", "failed"]
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: Annotated[Mapping[str, Any], AfterValidator(_named)] = field(default_factory=dict)
    references: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    restarts: int = 0
    checkpoint: str = ""
    folder: str = ""
    error: str = ""
