"""What carries payloads to clients and reports back: the interface of all channels."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class NoReport:
    """What a channel yields of a client without a report.

    Attributes:
        reason: in a few words.
    """

    reason: str


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

    def lose_process(self, client: int) -> None:
        """End a process that serves clients, on purpose; another one takes its place.

        Args:
            client: one of those that it may serve.
        """
        ...
