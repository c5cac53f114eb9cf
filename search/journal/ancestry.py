"""What a lineage says of one model: its ancestors, and the schedule of hyperparameters that it was trained with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a training with the same hyperparameters.

    Attributes:
        from_step: optimizer steps done before it.
        changes: dotted field of the base recipe -> value.
        seed: of the recipe.
        reset_optimizer: whether the optimizer's state starts new here.
    """

    from_step: int
    changes: Mapping[str, Any]
    seed: int
    reset_optimizer: bool = False


def ancestors(rows: Sequence[Mapping[str, Any]], row: int) -> list[Mapping[str, Any]]:
    """Return the rows that began the segments of one model, the oldest first.

    Args:
        rows: the lineage.
        row: of the model's last segment.
    """
    path: list[Mapping[str, Any]] = []
    parent: int | None = row
    while parent is not None:
        path.append(rows[parent])
        parent = rows[parent]["parent_row"]
    return path[::-1]


def schedule(rows: Sequence[Mapping[str, Any]], row: int) -> list[Phase]:
    """Return the phases of one model's training, oldest first; trained one after the other, they give the same model.

    Args:
        rows: the lineage.
        row: of the model's last segment.
    """
    phases: list[Phase] = []
    for segment in ancestors(rows, row):
        reset = segment.get("reset_optimizer", False)
        phase = Phase(segment["step"], segment["new"], segment["seed"], reset)
        if reset or not phases or (phases[-1].changes, phases[-1].seed) != (phase.changes, phase.seed):
            phases.append(phase)
    return phases
