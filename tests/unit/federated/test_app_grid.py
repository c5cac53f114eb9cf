"""The grid of a user's Flower app: faults happen to the clients that the plan names, and all others are heard."""

import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from federated.faults import ClientFaultPlan
from federated.flower.identity import FIRST_NODE, assume_identity
from federated.launch.app_grid import AppGrid
from federated.launch.ray_grid import RayGrid
from federated.options import Faults

CLIENTS = 8
REASONS = {"drop": "no answer", "slow": "late by 60 s", "crash": "its process was lost"}


@pytest.fixture
def grid_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[AppGrid, list[str], list[int]]]]:
    """Return grids without Ray, what they say, and the clients whose process they ended."""
    ended: list[int] = []
    draws = random.Random(0)

    def answer(self: RayGrid, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Return replies; the process of an actor that was ended may have taken others with it."""
        sent = list(messages)
        lost = bool(ended) and len(sent) == CLIENTS  # and not when they are asked again
        crashed = Error(ErrorCode.CLIENT_APP_CRASHED, "its actor died")
        contents = [crashed if lost and draws.random() < 0.3 else RecordDict() for _ in sent]
        return [Message(content, reply_to=message) for content, message in zip(contents, sent, strict=True)]

    monkeypatch.setattr(RayGrid, "__init__", lambda *arguments, **more: None)  # noqa: ARG005
    monkeypatch.setattr(RayGrid, "send_and_receive", answer)
    monkeypatch.setattr(RayGrid, "end_actor", lambda grid, client: ended.append(client))  # noqa: ARG005

    def make(**faults: float) -> tuple[AppGrid, list[str], list[int]]:
        lines: list[str] = []
        ended.clear()
        plan = ClientFaultPlan(Faults(**faults), 3)
        return AppGrid("", CLIENTS, None, {}, plan=plan, stopped=lambda: False, say=lines.append), lines, ended

    assume_identity(run_id=1)
    return make


def send(grid: AppGrid, timeout: float | None = None) -> list[Message]:
    nodes = range(FIRST_NODE, FIRST_NODE + CLIENTS)
    sent = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in nodes]
    for message in sent:
        message.metadata.__dict__["_message_id"] = str(message.metadata.dst_node_id)
    return grid.send_and_receive(sent, timeout=timeout)


def test_faults_happen_to_whom_the_plan_names_and_nobody_else(
    grid_of: Callable[..., tuple[AppGrid, list[str], list[int]]],
) -> None:
    faults = {"drop": 0.2, "slow": 0.2, "crash": 0.1, "timeout_seconds": 30.0}
    grid, lines, ended = grid_of(**faults)
    fault = ClientFaultPlan(Faults(**faults), 3).fault
    crashed = []
    for exchange in range(12):
        names = list(map(partial(fault, exchange), range(CLIENTS)))
        wanted = [f"client {client}: {REASONS[name]}" if name else "" for client, name in enumerate(names)]
        found = [reply.error.reason if reply.has_error() else "" for reply in send(grid)]
        assert found == wanted, "who was lost with the process of another one was asked again"
        crashed += [client for client, name in enumerate(names) if name == "crash"]
        assert lines[-1].startswith(f"exchange {exchange + 1}: train  heard {wanted.count('')} of {CLIENTS}  0.0 s")
        assert all(reason in lines[-1] for reason in [reason for reason in wanted if reason][:3])
    assert ended == crashed
    assert crashed


def test_who_is_late_is_heard_if_there_is_time(
    grid_of: Callable[..., tuple[AppGrid, list[str], list[int]]],
) -> None:
    grid, _, _ = grid_of(slow=1.0)
    assert [reply.has_error() for reply in send(grid)] == [False] * CLIENTS
    assert [reply.has_error() for reply in send(grid, timeout=90)] == [False] * CLIENTS
    assert [reply.error.reason for reply in send(grid, timeout=9)] == [f"client {i}: late by 60 s" for i in range(8)]


def test_a_round_that_is_sent_message_by_message_is_one_exchange(
    grid_of: Callable[..., tuple[AppGrid, list[str], list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As apps in Flower's older form send it: from threads, in any order."""
    monkeypatch.setattr(RayGrid, "close", lambda grid: None)  # noqa: ARG005
    grid, lines, _ = grid_of(drop=0.3)
    fault = ClientFaultPlan(Faults(drop=0.3), 3).fault
    heard = []
    for number in range(4):
        clients = random.Random(number).sample(range(CLIENTS), CLIENTS)
        for client in clients:
            sent = Message(RecordDict(), FIRST_NODE + client, "train", group_id=str(number + 1))
            sent.metadata.__dict__["_message_id"] = str(client)
            [reply] = grid.send_and_receive([sent])
            assert reply.has_error() == bool(fault(number, client))
        heard.append(sum(not fault(number, client) for client in clients))
    grid.close()
    assert [line.rpartition("  heard ")[0] for line in lines] == [f"exchange {number}: train" for number in range(1, 5)]
    assert [line.split("  ")[1] for line in lines] == [f"heard {count} of {CLIENTS}" for count in heard]
