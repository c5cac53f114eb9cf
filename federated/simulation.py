"""A run in one process: every message is the bytes that would travel, and every client is served in turn."""

from collections.abc import Callable

from federated.server import CommunicationRound, Server


def play_round(server: Server, answer: Callable[[int, bytes], bytes]) -> CommunicationRound:
    """Play one round.

    Args:
        server: between rounds.
        answer: (client, payload) -> its report.
    """
    for client in server.sample().clients:
        if server.hear(client, answer(client, server.ask(client))) == "lost":
            server.hear(client, answer(client, server.ask(client)))
    return server.aggregate()
