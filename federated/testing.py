"""What tests import: protocols with few seeds and steps, and rounds whose reports are drawn instead of trained."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from federated.broadcast import receive
from federated.encodings import Floats
from federated.global_model import GlobalModel, RoundRates
from federated.options import ReportLimits
from federated.protocols.options import ProtocolOptions
from federated.protocols.protocol import Protocol
from federated.server import CommunicationRound, Participation, Server
from federated.tables import PROTOCOLS
from federated.wire import ReportHeader, write_report
from raytrain.recipe import options_parameter
from raytrain.registry import resolve

BASE = "digest of w0"
STEPS = 10
ROUNDS = 12
Variant = tuple[str, dict[str, Any]]
VARIANTS: list[Variant] = [
    ("fedkseed", {"pool": 40, "up": "float32", "down": "float32"}),
    ("fedkseed", {"pool": 40, "up": "one-byte", "down": "float16", "weight_decay": 0.5}),
    ("fedkseed-pro", {"pool": 40, "up": "float16", "down": "float16"}),
    ("common-seeds", {"pool": 0, "up": "one-byte", "down": "one-byte", "weight_decay": 0.5}),
    ("common-seeds", {"pool": 40, "up": "float32", "down": "float32", "local": True}),
    ("common-seeds", {"pool": 40, "weighting": "equal"}),
    ("sign", {"pool": 0}),
    ("sign", {"pool": 40, "local": True}),
]
"""Names of protocols, and options that are awkward."""


def make_protocol(variant: Variant, rounds: int = ROUNDS, **more: Any) -> Protocol:
    """Return a protocol with few steps, whose learning rate falls."""
    name, options = variant
    factory = resolve(PROTOCOLS, name, "protocol.name")
    kind = options_parameter(factory.__init__, ProtocolOptions)
    made = kind(name=name, **{"local_steps": STEPS, **options, **more})
    rates = RoundRates.of([0.01 / (1 + number) for number in range(rounds)], getattr(made, "weight_decay", 0.0))
    protocol: Protocol = factory(made, rates, 11)
    return protocol


def server_of(
    variant: Variant, clients: int = 9, per_round: int = 4, limits: ReportLimits | None = None, **more: Any
) -> Server:
    """Return a server of few clients, as a run begins."""
    participation = Participation(clients, per_round, more.pop("quorum", 1))
    return Server(make_protocol(variant, **more), BASE, participation, limits)


def random_scalars(seed: int, count: int = STEPS) -> Floats:
    """Return some projected gradients, of which a few are not used."""
    generator = np.random.default_rng(seed)
    scalars = generator.normal(size=count).astype(np.float32) * 5
    return np.where(generator.random(count) < 0.1, np.float32("nan"), scalars)


def examples_of(client: int) -> int:
    """Return how many examples a client says that it has."""
    return 1 + client % 40


def report_of(server: Server, client: int, scalars: Floats | None = None, examples: int | None = None) -> bytes:
    """Return the report of a client of the round, with its own scalars unless these are given."""
    protocol, version = server.protocol, server.model.version
    if scalars is None:
        scalars = random_scalars(1000 * version + client, protocol.options.local_steps)
    header = ReportHeader(version, version, len(scalars), examples_of(client) if examples is None else examples)
    return write_report(header, protocol.encoding.write(scalars), client, server.model.digest)


def play(server: Server, order: Iterable[int] = (), without: Iterable[int] = ()) -> CommunicationRound:
    """Play a round of drawn reports.

    Args:
        server: between rounds.
        order: the turn of each client, by its index in the round; default: as they were asked.
        without: clients that do not answer.
    """
    clients = [client for client in server.sample().clients if client not in set(without)]
    for client in clients:
        server.ask(client)
    turns = [*order] or [*range(len(clients))]
    for _, client in sorted(zip(turns, clients, strict=False)):
        server.hear(client, report_of(server, client))
    return server.aggregate()


def equal(one: GlobalModel, other: GlobalModel) -> bool:
    """Return whether two models have the same origin, version and coefficients, to the bit."""
    return one.digest == other.digest and one.coefficients.tobytes() == other.coefficients.tobytes()


class Receiver:
    """The part of a client that makes models of payloads, and keeps the last one.

    Args:
        protocol: the run's.
    """

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol
        self.model = self.initial = protocol.initial(BASE)

    def receive(self, payload: bytes) -> None:
        """Make the model of a payload."""
        self.model, _ = receive(payload, self._protocol, self.model, self.initial)
