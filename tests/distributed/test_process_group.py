"""How processes find each other: by a store on one address, whose keys begin with a secret."""

import datetime
import multiprocessing
import socket
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from raytrain.sync.transport import join_group

HOST, SECONDS = "127.0.0.1", 20.0


def member(answer: Connection, rank: int, port: int, secret: str, seconds: float) -> None:
    """Join, add up what the members have, and answer the sum, or the error."""
    torch.set_num_threads(1)
    try:
        join_group("gloo", rank, 2, (HOST, port), seconds, secret)
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total)
    except dist.DistError as error:
        answer.send(type(error).__name__)
    else:
        answer.send(
            (
                total.item(),
                [
                    each.laddr.ip
                    for each in psutil.Process().net_connections("tcp")
                    if each.status == psutil.CONN_LISTEN and each.laddr.port == port
                ],
            )
        )


class Started:
    """A process that joins."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["raytrain.testing", "torch._dynamo"])
        self._answer, theirs = context.Pipe()
        self._process = context.Process(target=member, args=(theirs, *arguments))
        self._process.start()

    def ended(self) -> Any:
        answer = self._answer.recv()
        self._process.join()
        return answer


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


def test_members_find_each_other_and_a_stranger_does_not_come_between(port: int) -> None:
    """It takes the place of rank 1, before the true one asks for it, and is not heard."""
    first = Started(0, port, "secret", SECONDS)
    stranger = Started(1, port, "guess", 3.0)
    assert stranger.ended() == "DistStoreError"
    second = Started(1, port, "secret", SECONDS)
    assert [first.ended(), second.ended()] == [(3.0, [HOST]), (3.0, [])]


def test_keys_are_not_found_without_the_secret(port: int) -> None:
    first = Started(0, port, "secret", SECONDS)
    store = dist.TCPStore(HOST, port, timeout=datetime.timedelta(seconds=SECONDS), wait_for_workers=False)
    while not (keys := [key for key in store.list_keys() if "rank_0" in key or "0//" in key]):
        pass
    assert all(key.startswith("secret/") for key in keys)
    Started(1, port, "secret", SECONDS).ended()
    assert first.ended()[0] == 3.0
