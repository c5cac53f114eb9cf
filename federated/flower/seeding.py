"""Seeds for the global random streams, from which Flower's strategies and most users' apps draw."""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Context, Message

from raytrain.seeds.prng import fold_in


def seed_globals(seed: int) -> None:
    """Seed the global streams of Python, NumPy and PyTorch.

    Args:
        seed: 64 bits.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the stream of Flower's differential privacy
    torch.manual_seed(seed)


@contextlib.contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed the global streams, and leave them afterwards as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seed_globals(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


@dataclass(frozen=True, slots=True)
class SeededClient:
    """A client that draws the same numbers for a message, whichever process it runs in and whatever ran there before.

    Attributes:
        client: a `ClientApp`, or a function with its signature.
        seed: of the run.
    """

    client: Callable[[Message, Context], Message]
    seed: int

    def __call__(self, message: Message, context: Context) -> Message:
        """Seed the global streams by the number of the message in the run, and call the client."""
        seed_globals(fold_in(self.seed, int(message.metadata.message_id)))
        return self.client(message, context)
