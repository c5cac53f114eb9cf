"""Faults on purpose: clients that never answer, answer late, lose their process, or whose report is damaged.

Which fault happens to a client in a round follows from the seed, so a run with faults is repeated as one without.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from federated.channel import Channel, ClientAnswer, LateAnswer, NoReport
from federated.options import Faults
from federated.sampling import Stream
from federated.tables import FAULTS
from raytrain.registry import resolve
from raytrain.seeds.prng import fold_in


def drop(report: bytes, draw: int, faults: Faults) -> ClientAnswer:  # noqa: ARG001 - all faults take the same
    """Return no report."""
    return NoReport("no answer")


def slow(report: bytes, draw: int, faults: Faults) -> ClientAnswer:  # noqa: ARG001
    """Return the report, unless the round has ended before it comes."""
    return (
        NoReport(f"late by {faults.slow_seconds:g} s") if 0 < faults.timeout_seconds < faults.slow_seconds else report
    )


def crash(report: bytes, draw: int, faults: Faults) -> ClientAnswer:  # noqa: ARG001
    """Return no report; the channel has lost a process before it came."""
    return NoReport("its process was lost")


def garble(report: bytes, draw: int, faults: Faults) -> ClientAnswer:  # noqa: ARG001
    """Return the report with one byte changed, or cut off there."""
    if not report:
        return report
    data = bytearray(report)
    index = (draw >> 16) % len(data)
    if draw % 2:
        return bytes(data[:index])
    data[index] ^= 1 + (draw >> 1) % 255
    return bytes(data)


@dataclass(frozen=True, slots=True)
class ClientFaultPlan:
    """Which fault happens where.

    Attributes:
        faults: their probabilities.
        master: seed of all draws.
    """

    faults: Faults
    master: int

    def fault(self, round_number: int, client: int) -> str:
        """Return the name of the fault that happens to a client in a round, the first of the table; "": none."""
        for index, name in enumerate(FAULTS):
            if self._draw(round_number, client, index) / 2.0**64 < getattr(self.faults, name):
                return name
        return ""

    def after(self, round_number: int, client: int, report: bytes) -> ClientAnswer:
        """Return what arrives of a client's report, after its fault if it has one."""
        name = self.fault(round_number, client)
        if not name:
            return report
        happen: Any = resolve(FAULTS, name, "faults")
        answer: ClientAnswer = happen(report, self._draw(round_number, client, len(FAULTS)), self.faults)
        return answer

    def _draw(self, round_number: int, client: int, index: int) -> int:
        return fold_in(fold_in(self.master, Stream.FAULTS), round_number, client, index)


class FaultyChannel:
    """A channel on which the faults of a plan happen, on the server's side of it.

    Args:
        channel: that reaches the clients.
        plan: of the faults.
    """

    def __init__(self, channel: Channel, plan: ClientFaultPlan) -> None:
        self._channel = channel
        self._plan = plan

    def ask(self, round_number: int, payloads: Mapping[int, bytes]) -> Iterator[tuple[int, ClientAnswer]]:
        """Yield what arrives of each client's answer."""
        for client in payloads:
            if self._plan.fault(round_number, client) == "crash":
                self.lose_process(client)
        for client, answer in self._channel.ask(round_number, payloads):
            yield client, answer if isinstance(answer, NoReport) else self._plan.after(round_number, client, answer)

    def late_answers(self) -> Sequence[LateAnswer]:
        """Return what came late."""
        return self._channel.late_answers()

    def lose_process(self, client: int) -> None:
        """End a process that serves clients."""
        self._channel.lose_process(client)
