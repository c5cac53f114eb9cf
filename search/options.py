"""What the `[search]` section of a recipe can say, for every kind of search."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from raytrain.recipe import Options


class SearchOptions(Options):
    """Options of every search.

    Attributes:
        space: a table of dimensions, or "module:function" of a chooser; see `search.space`.
        metric: what is improved, among the metrics that the task measures; "": the task's own.
        mode: whether lower ("min") or higher ("max") is better; "": as the task says for its metric.
        objectives: what counts beside the metric, name -> "min" or "max": other metrics of the task, and the model's
            parameters, flops, memory_mb and latency_ms (see `search.limits`). The metric alone is searched by; the
            Pareto front of all is in the report.
        first: hyperparameters to begin with, path -> value; those that a guess leaves out are drawn.
        timeout_seconds: how long a member may be silent before its attempt is given up.
        max_failures: how often a failed segment is handed out again.
        seconds: wall-clock time of all attempts after which the search stops; 0: any.
    """

    space: str | dict[str, Any]
    metric: str = ""
    mode: Literal["", "min", "max"] = ""
    objectives: dict[str, Literal["min", "max"]] = Field(default_factory=dict)
    first: tuple[dict[str, Any], ...] = ()
    timeout_seconds: float = Field(60.0, gt=0)
    max_failures: int = Field(3, ge=0)
    seconds: float = Field(0.0, ge=0)

    @property
    def multiplies(self) -> bool:
        """Whether numbers change by factors, which lead neither from 0 nor across it."""
        return False

    @property
    def inherits_whole_weights(self) -> bool:
        """Whether trials take the weights of trials with other hyperparameters, which must not change their shapes."""
        return False

    def check_interval(self, steps: int, field: str = "base.steps") -> None:
        """Check that the search decides between steps of a training.

        Raises:
            RecipeError: it cannot.
        """


def rename_field(raw: Any, word: str, field: str) -> Any:
    """Return raw data with a field under its own name, where another word for it is used."""
    if not isinstance(raw, Mapping) or word not in raw:
        return raw
    return {**{name: value for name, value in raw.items() if name != word}, field: raw[word]}
