"""How a run ended, as `result.json` holds it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended, which is what `result.json` holds.

    Attributes:
        status: "done", "stopped early", "interrupted" or "failed".
        metrics: of the last evaluation.
        best: {"step", "value", "metric"} of the best evaluation.
        references: figures to compare the metrics with.
        steps: optimizer steps done.
        samples: examples drawn.
        seconds: time spent training, over all attempts.
        stalled_seconds: how much of it the first worker waited for data.
        bytes_sent: by the first worker.
        exchange_seconds: how long its exchanges were under way, one after the other.
        hidden_share: how much of that it did not stand still for.
        restarts: how often workers had to be started again.
        checkpoint: the last one, if there is one.
        figures: what else the kind of run counts, by name.
        error: why it failed.
    """

    status: Literal["done", "stopped early", "interrupted", "failed"]
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: Mapping[str, Any] = field(default_factory=dict)
    references: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    stalled_seconds: float = 0.0
    bytes_sent: int = 0
    exchange_seconds: float = 0.0
    hidden_share: float = 0.0
    restarts: int = 0
    checkpoint: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
