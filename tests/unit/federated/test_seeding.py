"""Global random streams that are seeded for a while, and for a client's call."""

import random

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict

from federated.flower.envelope import stamp
from federated.flower.identity import assume_identity
from federated.flower.seeding import SeededClient, global_seed


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002


def test_global_streams_repeat_and_are_left_as_they_were() -> None:
    before = draw, random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    with global_seed(2**63 + 5):
        first = draw()
    with global_seed(2**63 + 5):
        assert draw() == first
    with global_seed(6):
        assert all(one != other for one, other in zip(draw(), first, strict=True))
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def test_a_client_draws_the_same_for_a_message_whatever_came_before() -> None:
    drawn = []

    def client(message: Message, context: Context) -> Message:
        drawn.append(draw())
        return Message(RecordDict(), reply_to=message)

    assume_identity(run_id=1)
    seeded = SeededClient(client, seed=3)
    for number in ("1", "2", "1"):
        message = Message(RecordDict(), dst_node_id=2, message_type="train")
        stamp(message, number)
        draw()
        seeded(message, Context(1, 2, {}, RecordDict(), {}))
    assert drawn[0] == drawn[2]
    assert len({drawn[0], drawn[1]}) == 2
