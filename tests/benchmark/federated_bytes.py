"""What a message of a federated run and its answer weigh: counted on Flower's messages, beside what `check` computes.

    python tests/benchmark/federated_bytes.py     # half a minute

200 steps, a pool of 4,096 seeds, 10 clients heard in each round; the network on digits of `digits-fedkseed`, and one of
twice its size. A row's first ten rounds have drawn reports. In the next one a client of the run answers with its own
local steps, over a grid that counts what a deployment ships: all objects of a message, with ids of 64 bits.

A client took part in the round before this one, or ten rounds ago. A reply names the message that it answers by 64
characters: `reply_reference` is what these weigh, which no payload can be without.
"""

from collections.abc import Iterable
from typing import Any

from bench import ROOT, arguments, finish
from flwr.app import Context, Message, RecordDict
from flwr.common.constant import PARTITION_ID_KEY

from federated.broadcast import payload_bytes
from federated.build import Federation
from federated.flower.channel import GridChannel, GridMessenger
from federated.flower.client import TrainingClient
from federated.flower.envelope import stamp
from federated.flower.identity import assume_identity
from federated.flower.messages import content_of, shipped_bytes
from federated.preview import ENVELOPE_DOWN_BYTES, ENVELOPE_UP_BYTES
from federated.recipe import FederateRecipe
from federated.testing import play
from raytrain.recipe import read_toml

CLIENT = 0
ROUNDS = 10
LARGE_ID = 2**63
"""Deployments draw ids of 64 bits, whose length counts."""
TOLERANCE_BYTES = 16
LAST, TENTH = "in the last round", "ten rounds ago"
SEEDS = {"protocol.pool": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "fedkseed, float32": {"protocol.up": "float32", "protocol.down": "float32"},
    "fedkseed": {},
    "fedkseed, twice the model": {"task.widths": [64]},
    "common-seeds, float16 down": {"protocol": {"name": "common-seeds"}, "protocol.down": "float16", **SEEDS},
    "common-seeds": {"protocol": {"name": "common-seeds"}, **SEEDS},
    "sign": {"protocol": {"name": "sign"}, **SEEDS},
    "sign, 9 clients": {"protocol": {"name": "sign"}, **SEEDS, "clients.count": 9, "clients.per_round": 9},
}


class CountingGrid:
    """Has a client answer in this process, and counts what a deployment ships.

    Args:
        client: the app of all clients; client i is node i + LARGE_ID.

    Attributes:
        down: bytes of all messages.
        up: bytes of all replies.
    """

    def __init__(self, client: TrainingClient) -> None:
        self._client = client
        self.down = self.up = 0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Return the replies to messages."""
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        stamp(message, message.object_id)  # as a SuperLink does
        reply = self._client(message, Context(1, node, {PARTITION_ID_KEY: node - LARGE_ID}, RecordDict(), {}))
        self.down += shipped_bytes(message)
        self.up += shipped_bytes(reply)
        return reply


def recipe_of(variant: str) -> FederateRecipe:
    """Return the recipe of a row."""
    raw, _ = read_toml(str(ROOT / "federated" / "recipes" / "digits-fedkseed.toml"), [])
    changes = {"clients.count": 10, "clients.per_round": 10, "partition": {"name": "iid"}, **VARIANTS[variant]}
    return FederateRecipe.parse_with(raw, changes)


def row_of(variant: str, when: str) -> dict[str, Any]:
    """Count a message and its answer."""
    recipe = recipe_of(variant)
    federation = Federation.of(recipe)
    server, trainer = federation.server(), federation.trainer()
    for _ in range(ROUNDS):
        play(server)
    if when == TENTH:
        server.versions[CLIENT] = 0
    trainer.start_from(server.model)
    going, grid = server.sample(), CountingGrid(TrainingClient(trainer))
    nodes = range(LARGE_ID, LARGE_ID + recipe.clients.count)
    channel = GridChannel(GridMessenger(grid, nodes))  # type: ignore[arg-type] - it has what a messenger asks for
    payload = server.ask(CLIENT)
    for client, report in channel.ask(going.number, {CLIENT: payload}):
        if not isinstance(report, bytes) or server.hear(client, report) != "heard":
            raise RuntimeError(f"{variant}: {report!r}, {going.refusals}")
    down, up = payload_bytes(server.protocol, recipe.clients.per_round, ROUNDS if when == TENTH else 1)
    computed = down + ENVELOPE_DOWN_BYTES + up + ENVELOPE_UP_BYTES
    if abs(grid.down + grid.up - computed) > TOLERANCE_BYTES:
        raise RuntimeError(f"{variant}, {when}: computed {computed} bytes; counted {grid.down} + {grid.up}")
    return {
        "protocol": variant,
        "took_part": when,
        "payload": len(payload),
        "report": len(report),
        "shipped_down": grid.down,
        "shipped_up": grid.up,
        "shipped": grid.down + grid.up,
        "computed": computed,
        "reply_reference": reply_reference_bytes(),
    }


def reply_reference_bytes() -> int:
    """Return what the name of the message that it answers adds to a reply."""
    message = Message(content_of(b""), dst_node_id=LARGE_ID, message_type="train")
    without = shipped_bytes(Message(content_of(b""), reply_to=message))
    stamp(message, message.object_id)
    return shipped_bytes(Message(content_of(b""), reply_to=message)) - without


def main() -> None:
    """Count and report."""
    options = arguments(__doc__ or "")
    assume_identity(run_id=LARGE_ID, task_id=LARGE_ID)
    rows = [row_of(variant, when) for variant in VARIANTS for when in (LAST, TENTH)]
    found = {(row["protocol"], row["took_part"]): row["shipped"] for row in rows}
    headline = {
        "bytes_kseed_whole": found["fedkseed", TENTH],
        "bytes_kseed_last_round": found["fedkseed", LAST],
        "bytes_common_last_round": found["common-seeds", LAST],
        "bytes_common_tenth_round": found["common-seeds", TENTH],
        "bytes_sign_last_round": found["sign, 9 clients", LAST],
        "bytes_model_twice_the_size": found["fedkseed, twice the model", TENTH],
        "reply_reference_bytes": rows[0]["reply_reference"],
    }
    finish("federated_bytes", rows, headline, options)


if __name__ == "__main__":
    main()
