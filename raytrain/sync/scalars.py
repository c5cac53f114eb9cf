"""Exchange of projected gradients in place of gradients, in four bytes each or in one.

Seeds follow from step and rank, so they are not sent, and each replica applies the updates of all (Zelikman et al.
2023, Just One Byte). Traffic does not depend on the size of the model.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raytrain.errors import TrainingError
from raytrain.sync.averaging import Averager
from raytrain.sync.buffers import state_tensors
from raytrain.sync.options import ScalarOptions
from raytrain.sync.synchroniser import StepSynchroniser, StepTotals
from raytrain.tensors import tensor_digest

STEPS_PER_OCTAVE = 6
LEVELS = 127
NOT_FINITE = -128
MIDDLE = 64
"""Level of the reference magnitude: a byte holds 2^-10.5 to 2^10.5 times it, to 6 %."""
LEVEL_SIZES = (2.0 ** ((np.arange(LEVELS + 1) - MIDDLE) / STEPS_PER_OCTAVE)).astype(np.float32)
"""Magnitude of each level over the reference."""
SATURATION_WINDOW = 64
"""Projected gradients between checks of how many are saturated."""

Float32Array = NDArray[np.float32]
ExponentArray = NDArray[np.int32]
ByteArray = NDArray[np.uint8]

logger = logging.getLogger(__name__)


def scalars(averager: Averager, options: ScalarOptions) -> "ScalarExchange":
    """Return the synchroniser that all-gathers projected gradients as float32."""
    return ScalarExchange(averager, options, one_byte=False)


def one_byte(averager: Averager, options: ScalarOptions) -> "ScalarExchange":
    """Return the synchroniser that all-gathers projected gradients as one byte each, a sign and a logarithm."""
    return ScalarExchange(averager, options, one_byte=True)


def encode_one_byte(values: Float32Array, exponents: ExponentArray) -> ByteArray:
    """Return a byte for each scalar: 0 for 0, else its sign and the nearest of 127 levels, six to an octave.

    Level 64 is 2^exponent. Scalars beyond the levels saturate; one byte value is for those that are not finite.
    """
    finite = np.isfinite(values)
    level = np.clip(_levels(values, exponents), 1, LEVELS)
    signed = np.where(finite, np.sign(np.where(finite, values, 0)) * level, NOT_FINITE)
    sent: ByteArray = signed.astype(np.int8).view(np.uint8)
    return sent


def decode_one_byte(sent: ByteArray, exponents: ExponentArray) -> Float32Array:
    """Return the scalars of bytes."""
    signed = sent.view(np.int8).astype(np.int64)
    with np.errstate(over="ignore"):
        size = np.ldexp(LEVEL_SIZES[np.minimum(np.abs(signed), LEVELS)], exponents)
    return np.where(signed == NOT_FINITE, np.nan, np.sign(signed) * size).astype(np.float32)


class SaturationCounter:
    """Counts scalars that a byte does not hold, and warns once if most are such.

    Attributes:
        zeros: zeros in the last message.
        saturated: scalars beyond the levels in the last message.
    """

    def __init__(self) -> None:
        self.zeros = 0
        self.saturated = 0
        self._counted = np.zeros(3, np.int64)  # zeros, saturated and all, in this window
        self._told = False

    def count(self, values: Float32Array, exponents: ExponentArray | None) -> None:
        """Count the scalars of a message; without exponents none is saturated."""
        level = np.full(len(values), MIDDLE) if exponents is None else _levels(values, exponents)
        self.zeros = int((values == 0).sum())
        self.saturated = int(((level < 1) | (level > LEVELS)).sum())
        self._counted += (self.zeros, self.saturated, len(values))
        zeros, beyond, seen = self._counted.tolist()
        if seen < SATURATION_WINDOW:
            return
        self._counted[:] = 0
        if 2 * (zeros + beyond) > seen and not self._told:
            self._told = True
            logger.warning(
                "sync.name = one-byte: of the last %d projected gradients of a worker %d were 0, for which a larger "
                "zo.eps may help, and %d saturated beyond what a byte holds, 2^-10.5 to 2^10.5 of the recent median; "
                "sync.name = scalars sends them as float32",
                seen,
                zeros,
                beyond,
            )


def _levels(values: Float32Array, exponents: ExponentArray) -> NDArray[np.float64]:
    """Return the unclipped level of each scalar; the middle one for 0 and what is not finite."""
    known = np.isfinite(values) & (values != 0)
    size = np.abs(np.where(known, values, 1)).astype(np.float64)
    level: NDArray[np.float64] = np.where(known, np.log2(size) - exponents, 0) * STEPS_PER_OCTAVE
    return np.rint(level) + MIDDLE


class ScalarExchange(StepSynchroniser):
    """All-gathers the scalars of all replicas.

    In one byte, a scalar is a level relative to the recent magnitude of scalars like it. All replicas know this
    magnitude from earlier messages, so it is not sent. While some magnitudes are unknown, as in the first step, all
    scalars are sent in four bytes.

    Args:
        averager: over the replicas.
        options: intervals of the checks.
        one_byte: whether a scalar takes one byte, or four.
    """

    def __init__(self, averager: Averager, options: ScalarOptions, *, one_byte: bool) -> None:
        super().__init__()
        self._averager = averager
        self._options = options
        self._one_byte = one_byte
        self._weight = 0.0
        self._steps = 0
        self._stop_requested = False
        self._saturation = SaturationCounter()

    @property
    def members(self) -> int:
        """The number of replicas."""
        return len(self._averager.transport.members)

    @property
    def rank(self) -> int:
        """This replica's rank."""
        return self._averager.transport.rank

    @property
    def _alone(self) -> bool:
        return self.members == 1

    def attach(self, module: nn.Module) -> None:
        """Broadcast the first replica's parameters and buffers."""
        self._module = module
        if not self._alone:
            for tensor in state_tensors(module):
                self._await(self._averager.transport.broadcast(tensor.data))

    def set_weight(self, weight: float) -> float:
        """Return the weight: a replica's projected gradients are of its own mean loss."""
        self._weight = weight
        return weight

    def before_backward(self) -> None:
        """Do nothing: there are no gradients to send."""

    def all_gather(
        self, values: Sequence[float], sizes: Sequence[Sequence[float]], *, weighted: bool
    ) -> tuple[list[list[float]], list[float]]:
        """All-gather scalars.

        A replica decodes its own scalars too, so all use the same values.

        Args:
            values: of this replica.
            sizes: recent magnitude for each scalar of each replica, equal on all replicas; 0: unknown.
            weighted: whether the weights of the replicas' losses differ; these are then sent too, in four bytes.

        Returns:
            The decoded scalars of every replica, nan or infinite for those that were; and the relative weight of each
            replica, 1 on average.
        """
        with np.errstate(over="ignore"):  # beyond float32 it is infinite, which is not used
            own = np.array(values).astype(np.float32)
        known = np.array(sizes, np.float64)
        exponents = list(np.frexp(known)[1] - 1) if self._one_byte and known.all() else None
        weight = np.array([self._weight] if weighted else [], np.float32).view(np.uint8)
        sent = np.concatenate([weight, self._written(own, exponents)])
        rows = [sent] if self._alone else self._gather(sent)
        heard = [self._read(row[len(weight) :].copy(), member, exponents) for member, row in enumerate(rows)]
        weights = [float(row[:4].copy().view(np.float32)[0]) if weighted else 1.0 for row in rows]
        mean = sum(weights) / len(weights) or 1.0
        return heard, [one / mean for one in weights]

    def metrics(self) -> dict[str, float]:
        """Return how many of this replica's scalars were 0 and saturated in this step, if they take one byte."""
        return {"zeros": self._saturation.zeros, "saturated": self._saturation.saturated} if self._one_byte else {}

    def before_step(self, loss: float, stop: bool) -> StepTotals:
        """Agree on whether to stop, every `stop_every` steps; the loss is this replica's own."""
        self._steps += 1
        self._stop_requested = self._stop_requested or stop
        if self._alone:
            return StepTotals(self._weight, loss, self._stop_requested)
        due = self._steps % self._options.stop_every == 0
        stops = due and any(row[0] for row in self._gather(np.array([self._stop_requested], np.uint8)))
        return StepTotals(self._weight, loss, stops)

    def after_step(self, lr: float) -> None:  # noqa: ARG002 - it does not count here
        """Compare parameter hashes, every `check_every` steps.

        Raises:
            TrainingError: replicas have diverged.
        """
        every = self._options.check_every
        if self._alone or not every or self._steps % every:
            return
        mine = tensor_digest(self._module.named_parameters())
        answers = self._gather(np.frombuffer(bytes.fromhex(mine)[:8], np.uint8))
        odd = [rank for rank, answer in enumerate(answers) if (answer != answers[0]).any()]
        if odd:
            raise TrainingError(
                f"the parameters of worker {', '.join(map(str, odd))} differ from those of worker 0 after the same "
                "updates: their machines do not compute alike; all need the same versions of raytrain and torch"
            )

    def _written(self, own: Float32Array, exponents: Sequence[ExponentArray] | None) -> ByteArray:
        """Return this replica's scalars as bytes."""
        mine = exponents[self._averager.transport.rank] if exponents else None
        if self._one_byte:
            self._saturation.count(own, mine)
        return own.view(np.uint8) if mine is None else encode_one_byte(own, mine)

    @staticmethod
    def _read(body: ByteArray, member: int, exponents: Sequence[ExponentArray] | None) -> list[float]:
        """Return the scalars of a replica."""
        numbers: list[float] = (
            body.view(np.float32) if exponents is None else decode_one_byte(body, exponents[member])
        ).tolist()
        return numbers

    def _gather(self, sent: ByteArray) -> list[ByteArray]:
        pending = self._averager.transport.all_gather(torch.from_numpy(sent.copy()).to(self._averager.transport.device))
        self._await(pending)
        return [row.cpu().numpy() for row in pending.wait()]
