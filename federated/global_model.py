"""The model of a run: coefficients of directions, and the rates that they move at."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class GlobalModel:
    """The model that a round starts from.

    Attributes:
        origin: the digest of what the run starts from and goes by: w0, directions, and options.
        coefficients: of its directions, but for weight decay, shape (k,).
        version: how many rounds made it.
        digest: of all this.
    """

    origin: str
    coefficients: NDArray[np.float64]
    version: int = 0
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        """Find the digest."""
        about = f"{self.origin} {self.version} ".encode()
        object.__setattr__(self, "digest", hashlib.sha256(about + self.coefficients.tobytes()).digest())


@dataclass(frozen=True, slots=True)
class RoundRates:
    """The learning rate of each round, and what weight decay leaves.

    Attributes:
        lr: shape (rounds,), each a float32.
        shrinkage: of what round 0 added, after each number of rounds, shape (rounds + 1,).
    """

    lr: NDArray[np.float64]
    shrinkage: NDArray[np.float64]

    @classmethod
    def of(cls, rates: Sequence[float], weight_decay: float) -> "RoundRates":
        """Return the rates of a run.

        Raises:
            ValueError: a round's weight decay would leave nothing, or turn the model around.
        """
        lr = np.array(rates, np.float32).astype(np.float64)
        if not (lr * weight_decay < 1).all():
            raise ValueError(f"weight_decay: expected below 1 / lr = {1 / lr.max():g}; got {weight_decay:g}")
        return cls(lr, np.concatenate([[1.0], np.cumprod(1 - lr * weight_decay)]))
