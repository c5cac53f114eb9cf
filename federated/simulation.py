"""A channel within one process: every message is the bytes that would travel, and clients are served one by one."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from federated.channel import ClientAnswer, LateAnswer
from federated.client import LocalTrainer


class InProcessChannel:
    """Has one trainer answer for all clients.

    Args:
        make_trainer: returns a process's trainer, as at its start.
    """

    def __init__(self, make_trainer: Callable[[], LocalTrainer]) -> None:
        self._make_trainer = make_trainer
        self._trainer = make_trainer()

    def ask(self, round_number: int, payloads: Mapping[int, bytes]) -> Iterator[tuple[int, ClientAnswer]]:  # noqa: ARG002
        """Yield each client's report."""
        for client, payload in payloads.items():
            yield client, self._trainer.answer(client, payload)

    def late_answers(self) -> Sequence[LateAnswer]:
        """Return nothing: a round waits for all."""
        return ()

    def lose_process(self, client: int) -> None:  # noqa: ARG002 - there is one process
        """Begin again with a trainer that remembers nothing."""
        self._trainer = self._make_trainer()
