"""What carries payloads to clients and reports back: the interface of all channels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class NoReport:
    """What a channel yields of a client without a report.

    Attributes:
        reason: in a few words.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class LateAnswer:
    """What came of a client after the end of its round, and is not used.

    Attributes:
        client: its number.
        round_number: of the round that it was asked in, counted from 0.
    """

    client: int
    round_number: int

    def __str__(self) -> str:
        """Return this in words."""
        return f"client {self.client}, round {self.round_number}: it answered after the end of the round"


ClientAnswer = bytes | NoReport
"""A client's report, still to be checked, or the reason why there is none."""


class Channel(Protocol):
    """Reaches the clients of a run."""

    def ask(self, round_number: int, payloads: Mapping[int, bytes]) -> Iterable[tuple[int, ClientAnswer]]:
        """Send clients their payloads, and yield (client, answer) once for each of them, in any order.

        Args:
            round_number: counted from 0.
            payloads: client -> what it is sent.
        """
        ...

    def late_answers(self) -> Sequence[LateAnswer]:
        """Return what came late since the last call."""
        ...

    def lose_process(self, client: int) -> None:
        """End a process that serves clients, on purpose; another one takes its place.

        Args:
            client: one of those that it may serve.
        """
        ...
