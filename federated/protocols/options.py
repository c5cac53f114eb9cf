"""Options of protocols, and limits that they check. They load without torch and NumPy: a recipe is read by them."""

from typing import Literal

from pydantic import Field, field_validator

from raytrain.recipe import Options

MOST_CLIENTS = 2**16 - 1
"""Of a round: two bytes say how many were heard."""
MOST_SEEDS = 2**16
"""In a pool: two bytes say which one."""
MOST_ROUNDS = 2**16 - 1
"""Of a run: two bytes say which one."""


class LocalOptions(Options):
    """Options of whatever clients do.

    Attributes:
        local_steps: of a client in a round (tau): the directions that it probes, or its steps with gradients.
        batch: examples of a client in each step; one that has fewer takes them again.
    """

    local_steps: int = Field(200, ge=1, le=2**16 - 1)
    batch: int = Field(8, ge=1)


class GradientOptions(LocalOptions):
    """Options of `flower`: what is sent and averaged are the trainable parameters, as `freeze` and `adapter` say."""


class ProtocolOptions(LocalOptions):
    """Options of every zeroth-order protocol.

    Attributes:
        weighting: what a client's report counts: the number of its "examples", or "equal".
        weight_decay: towards w0, as a share of the learning rate.
        form: in which clients are sent the model: "whole", "changed" or "summaries", where it can be so, or "smallest".
    """

    weighting: Literal["examples", "equal"] = "examples"
    weight_decay: float = Field(0.0, ge=0)
    form: Literal["smallest", "whole", "changed", "summaries"] = "smallest"


class PoolOptions(ProtocolOptions):
    """Options of protocols that draw from a pool.

    Attributes:
        pool: seeds of the pool (K).
        up: how a client's numbers are written.
        down: how the model's coefficients are written: they are this exact, for the server too.
    """

    pool: int = Field(4096, ge=1)
    up: Literal["float32", "float16", "one-byte"] = "one-byte"
    down: Literal["float32", "float16"] = "float16"

    @field_validator("pool")
    @classmethod
    def _two_bytes(cls, pool: int) -> int:
        return check_pool(pool)


class CommonOptions(ProtocolOptions):
    """Options of protocols with common seeds.

    Attributes:
        pool: seeds that all rounds draw from; 0: each round has new ones, and the model keeps them all.
        local: whether a client moves along each direction before it probes the next; else it probes all of them where
            the round starts, and the model moves by their mean.
    """

    pool: int = Field(0, ge=0)
    local: bool = False

    @field_validator("pool")
    @classmethod
    def _two_bytes(cls, pool: int) -> int:
        return check_pool(pool)


class CommonSeedsOptions(CommonOptions):
    """Options of `common-seeds`.

    Attributes:
        up: how a client's numbers are written.
        down: how the mean of a round is written: it is this exact, for the server too. A pool's coefficients are then
            "float16" unless this is "float32".
    """

    up: Literal["float32", "float16", "one-byte"] = "one-byte"
    down: Literal["float32", "float16", "one-byte"] = "one-byte"


class SignOptions(CommonOptions):
    """Options of `sign`; every client has one vote, whatever `weighting` says."""


PROTOCOL_OPTIONS: dict[str, type[LocalOptions]] = {
    "fedkseed": PoolOptions,
    "fedkseed-pro": PoolOptions,
    "common-seeds": CommonSeedsOptions,
    "sign": SignOptions,
    "flower": GradientOptions,
}
"""Protocol -> its options."""


def check_pool(pool: int) -> int:
    """Return the size of a pool.

    Raises:
        ValueError: it has more seeds than two bytes can tell apart.
    """
    if pool > MOST_SEEDS:
        raise ValueError(f"expected at most {MOST_SEEDS} seeds, which two bytes tell apart; got {pool}")
    return pool
