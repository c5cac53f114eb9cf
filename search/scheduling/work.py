"""Work: what a scheduler hands out, what comes back, and the queue between the two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

Cause = Literal["dead", "slow", "error", "stopped", "diverged", "unreadable"]
"""Of a failure."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state in the store.

    Attributes:
        digest: its name in the store; "": no state, training starts anew.
        step: optimizer steps done.
    """

    digest: str = ""
    step: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """A segment of training to be done.

    Attributes:
        attempt: names this attempt; its outcome has to repeat it.
        row: of the lineage that decided on the segment.
        member: of the population, or trial of a sweep.
        snapshot: the state to start from.
        until: step to train to.
        changes: dotted field of the base recipe -> value.
        seed: of the recipe, unless the changes have one: data order, dropout, and without a state the weights.
        reset_optimizer: whether the optimizer's state starts new, whatever that of the snapshot is.
    """

    attempt: str
    row: int
    member: int
    snapshot: Snapshot
    until: int
    changes: Mapping[str, Any]
    seed: int
    reset_optimizer: bool = False


@dataclass(frozen=True, slots=True)
class Done:
    """A segment was trained to its end.

    Attributes:
        attempt: of the work.
        snapshot: the state at the end.
        metrics: name -> value, as measured there; checked by the scheduler.
    """

    attempt: str
    snapshot: Snapshot
    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Paused:
    """An attempt stopped early because it was asked to; the rest of its segment is still to be done.

    Attributes:
        attempt: of the work.
        snapshot: the state where it stopped.
    """

    attempt: str
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt ended without a result.

    Attributes:
        attempt: of the work.
        cause: "dead": its process or machine is gone; "slow": it was not heard of in time; "error": an error that may
            not come again; "stopped": one that would, as a loss that is not finite; "diverged": the metric is not
            finite; "unreadable": the state to start from is not what was stored.
        message: for the log.
    """

    attempt: str
    cause: Cause
    message: str


WorkOutcome = Done | Paused | Failed

NOT_REPEATED = ("stopped", "diverged", "unreadable")
"""Causes that would come again with the same state and the same seed."""


@dataclass(slots=True)
class WorkQueue:
    """Work that waits, and attempts that are under way.

    An attempt belongs to one incarnation of the queue: after a restart, all that was under way is handed out again
    under new names, so what an attempt of before reports is refused.

    Attributes:
        max_failures: how often a segment is handed out again after a failure.
        waiting: in the order in which it will be handed out.
        under_way: attempt -> work.
        failures: row -> failed attempts of this segment.
        incarnation: counts restarts.
        handed_out: counts attempts of this incarnation.
    """

    max_failures: int
    waiting: list[Work] = field(default_factory=list)
    under_way: dict[str, Work] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)
    incarnation: int = 0
    handed_out: int = 0

    def add(self, work: Work) -> None:
        """Queue a segment; its attempt is named when it is handed out."""
        self.waiting.append(work)

    def hand_out(self, limit: int) -> list[Work]:
        """Return at most `limit` attempts, which are then under way."""
        ready, self.waiting = self.waiting[:limit], self.waiting[limit:]
        first = self.handed_out
        attempts = [
            replace(work, attempt=f"{work.row}.{self.incarnation}.{number}") for number, work in enumerate(ready, first)
        ]
        self.handed_out += len(attempts)
        self.under_way |= {work.attempt: work for work in attempts}
        return attempts

    def close(self, attempt: str) -> Work:
        """Return the work of an attempt, which is then no longer under way."""
        return self.under_way.pop(attempt)

    def repeat(self, work: Work, cause: str) -> bool:
        """Queue a failed segment again, unless that is hopeless or was done often enough; return whether it was."""
        self.failures[work.row] = self.failures.get(work.row, 0) + 1
        again = cause not in NOT_REPEATED and self.failures[work.row] <= self.max_failures
        if again:
            self.waiting.insert(0, work)
        return again

    def withdraw(self, rows: Sequence[int]) -> None:
        """Forget segments: what their attempts report will be refused."""
        self.waiting = [work for work in self.waiting if work.row not in rows]
        self.under_way = {attempt: work for attempt, work in self.under_way.items() if work.row not in rows}

    def forget_failures(self, row: int) -> None:
        """Drop the count of failures of a segment that has ended."""
        self.failures.pop(row, None)

    def digests(self) -> set[str]:
        """Return the states that queued work starts from."""
        return {work.snapshot.digest for work in [*self.waiting, *self.under_way.values()]}

    def state_dict(self) -> dict[str, Any]:
        """Return the queue as plain data; what is under way counts as waiting."""
        works = sorted([*self.under_way.values(), *self.waiting], key=lambda work: work.row)
        return {
            "works": [_plain_fields(work) | {"snapshot": _plain_fields(work.snapshot)} for work in works],
            "failures": [[row, count] for row, count in sorted(self.failures.items())],
            "incarnation": self.incarnation,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the work of an earlier queue, as its next incarnation."""
        self.waiting = [Work(**{**work, "snapshot": Snapshot(**work["snapshot"])}) for work in state["works"]]
        self.under_way = {}
        self.failures = dict(state["failures"])
        self.incarnation = state["incarnation"] + 1


def _plain_fields(record: Work | Snapshot) -> dict[str, Any]:
    """Return the fields of a record; unlike `asdict`, which takes longer than the rest of a commit, without copies."""
    return {entry.name: getattr(record, entry.name) for entry in fields(record)}
