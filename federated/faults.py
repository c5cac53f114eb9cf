"""Faults on purpose: clients that never answer, answer late, lose their process, or whose report is damaged.

Which fault happens to a client in a round follows from the seed, so a run with faults is repeated as one without.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from federated.sampling import Stream
from raytrain.recipe import Section
from raytrain.registry import resolve
from raytrain.seeds.prng import fold_in

FAULTS: dict[str, str] = {
    "drop": "federated.faults:drop A client never answers.",
    "slow": "federated.faults:slow A client answers late.",
    "crash": "federated.faults:crash The process that serves a client dies.",
    "garble": "federated.faults:garble A report is damaged on its way.",
}


class Faults(Section):
    """Faults of a run, and when a round goes on without those who have not answered.

    Attributes:
        drop: probability that a client never answers in a round.
        slow: probability that it answers late.
        slow_seconds: how late.
        crash: probability that its process dies.
        garble: probability that its report is damaged.
        timeout_seconds: after which a round ends; 0: it waits for all.
        quorum: clients that have to be heard, or the round moves nothing.
    """

    drop: float = Field(0.0, ge=0, le=1)
    slow: float = Field(0.0, ge=0, le=1)
    slow_seconds: float = Field(60.0, ge=0)
    crash: float = Field(0.0, ge=0, le=1)
    garble: float = Field(0.0, ge=0, le=1)
    timeout_seconds: float = Field(0.0, ge=0)
    quorum: int = Field(1, ge=1)


class ProcessLostError(Exception):
    """The process that served a client is gone, with all that it remembered."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a client answers.

    Attributes:
        data: its report.
        seconds: how late.
    """

    data: bytes
    seconds: float = 0.0


Call = Callable[[], bytes]
"""Has a client answer."""


def drop(call: Call, draw: int, faults: Faults) -> Reply | None:  # noqa: ARG001 - all faults take the same
    """Return no reply."""
    return None


def slow(call: Call, draw: int, faults: Faults) -> Reply | None:  # noqa: ARG001
    """Return the reply, late."""
    return Reply(call(), faults.slow_seconds)


def crash(call: Call, draw: int, faults: Faults) -> Reply | None:  # noqa: ARG001
    """Raise `ProcessLostError`."""
    raise ProcessLostError("the process was ended on purpose, as faults.crash asks for")


def garble(call: Call, draw: int, faults: Faults) -> Reply | None:  # noqa: ARG001
    """Return the reply with one byte changed, or cut off there."""
    data = bytearray(call())
    index = (draw >> 16) % len(data)
    if draw % 2:
        return Reply(bytes(data[:index]))
    data[index] ^= 1 + (draw >> 1) % 255
    return Reply(bytes(data))


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

    def reply(self, round_number: int, client: int, call: Call) -> Reply | None:
        """Have a client answer, with its fault if it has one.

        Raises:
            ProcessLostError: its fault is that.
        """
        name = self.fault(round_number, client)
        if not name:
            return Reply(call())
        happen: Any = resolve(FAULTS, name, "faults")
        reply: Reply | None = happen(call, self._draw(round_number, client, len(FAULTS)), self.faults)
        return reply

    def is_late(self, reply: Reply) -> bool:
        """Return whether a round has ended before a reply."""
        return 0 < self.faults.timeout_seconds < reply.seconds

    def _draw(self, round_number: int, client: int, index: int) -> int:
        return fold_in(fold_in(self.master, Stream.FAULTS), round_number, client, index)
