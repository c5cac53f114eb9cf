"""The model of a run: coefficients of directions, the seeds that these stand for, and the rates they move at."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from federated.encodings import Coefficients
from federated.sampling import Indices, Seeds, common_seeds, pool_seeds


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
    coefficients: Coefficients
    version: int = 0
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        """Find the digest."""
        about = f"{self.origin} {self.version} ".encode()
        object.__setattr__(self, "digest", hashlib.sha256(about + self.coefficients.tobytes()).digest())


class SeedPool:
    """A fixed number of seeds, which every round draws from.

    Args:
        master: that they follow from.
        size: how many.
    """

    grows = False

    def __init__(self, master: int, size: int) -> None:
        self._seeds = pool_seeds(master, size)

    def size(self, version: int) -> int:  # noqa: ARG002 - it is the same for all
        """Return the number of directions of a model."""
        return len(self._seeds)

    def seeds(self, indices: Indices) -> Seeds:
        """Return the seeds of some directions."""
        return self._seeds[indices]


class NewSeeds:
    """New seeds in each round, which the model keeps.

    Args:
        master: that they follow from.
        steps: how many a round adds.
    """

    grows = True

    def __init__(self, master: int, steps: int) -> None:
        self._master = master
        self._steps = steps

    def size(self, version: int) -> int:
        """Return the number of directions of a model."""
        return version * self._steps

    def seeds(self, indices: Indices) -> Seeds:
        """Return the seeds of some directions."""
        return common_seeds(self._master, indices // self._steps, indices % self._steps)


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
