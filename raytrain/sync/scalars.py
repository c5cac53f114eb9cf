"""Replicas that exchange numbers in place of gradients: each probe's slope, in four bytes or in one.

The seeds follow from the step and the replica, so nobody sends them, and each replica makes everybody's moves (Zelikman
et al. 2023, Just One Byte). What is sent does not depend on the size of the model.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raytrain.errors import TrainingError
from raytrain.sync.averaging import Exchange
from raytrain.sync.buffers import persistent
from raytrain.sync.options import NumberOptions
from raytrain.sync.synchroniser import EveryStep, Totals
from raytrain.tensors import tensor_digest

STEPS_PER_OCTAVE = 6
LEVELS = 127
NOT_FINITE = -128
MIDDLE = 64
"""The level that stands for a power of two: one byte holds 2^-10.5 to 2^10.5 of it, each to 6 %."""
SIZES = (2.0 ** ((np.arange(LEVELS + 1) - MIDDLE) / STEPS_PER_OCTAVE)).astype(np.float32)
"""What each level stands for, over that power of two."""
WINDOW = 64
"""Slopes over which it is looked whether a byte holds most of them."""

Floats = NDArray[np.float32]
Exponents = NDArray[np.int32]
Bytes = NDArray[np.uint8]

logger = logging.getLogger(__name__)


def numbers(exchange: Exchange, options: NumberOptions) -> "Numbers":
    """Exchange each probe's slope as a float32, for zeroth-order optimizers."""
    return Numbers(exchange, options, short=False)


def one_byte(exchange: Exchange, options: NumberOptions) -> "Numbers":
    """Exchange each probe's slope as one byte, a sign and a logarithm, for zeroth-order optimizers."""
    return Numbers(exchange, options, short=True)


def encode(values: Floats, exponents: Exponents) -> Bytes:
    """Return a byte for each number: 0 for 0, else its sign and the nearest of 127 levels, six to an octave.

    Level 64 is 2^exponent. Numbers beyond the levels become the first or the last; one byte is left for those that are
    not finite.
    """
    finite = np.isfinite(values)
    level = np.clip(_levels(values, exponents), 1, LEVELS)
    signed = np.where(finite, np.sign(np.where(finite, values, 0)) * level, NOT_FINITE)
    sent: Bytes = signed.astype(np.int8).view(np.uint8)
    return sent


def decode(sent: Bytes, exponents: Exponents) -> Floats:
    """Return the numbers that bytes stand for."""
    signed = sent.view(np.int8).astype(np.int64)
    with np.errstate(over="ignore"):
        size = np.ldexp(SIZES[np.minimum(np.abs(signed), LEVELS)], exponents)
    return np.where(signed == NOT_FINITE, np.nan, np.sign(signed) * size).astype(np.float32)


class Saturation:
    """Counts the numbers that a byte does not hold, and says it once if most are so.

    Attributes:
        zeros: of the last message, numbers that are 0.
        saturated: of the last message, numbers beyond the levels.
    """

    def __init__(self) -> None:
        self.zeros = 0
        self.saturated = 0
        self._counted = np.zeros(3, np.int64)  # zeros, saturated and all, in this window
        self._told = False

    def count(self, values: Floats, exponents: Exponents | None) -> None:
        """Count those of a message, which holds all of them without exponents."""
        level = np.full(len(values), MIDDLE) if exponents is None else _levels(values, exponents)
        self.zeros = int((values == 0).sum())
        self.saturated = int(((level < 1) | (level > LEVELS)).sum())
        self._counted += (self.zeros, self.saturated, len(values))
        zeros, beyond, seen = self._counted.tolist()
        if seen < WINDOW:
            return
        self._counted[:] = 0
        if 2 * (zeros + beyond) > seen and not self._told:
            self._told = True
            logger.warning(
                "sync.name = one-byte: of the last %d slopes of a worker %d were 0, for which a larger directions.eps "
                "may help, and %d beyond what a byte holds, 2^-10.5 to 2^10.5 of the median of recent ones, and became "
                "the least or the most of that; sync.name = numbers sends them as they are",
                seen,
                zeros,
                beyond,
            )


def _levels(values: Floats, exponents: Exponents) -> NDArray[np.float64]:
    """Return the level of each number, if there were levels enough; the middle one for 0 and what is not finite."""
    known = np.isfinite(values) & (values != 0)
    size = np.abs(np.where(known, values, 1)).astype(np.float64)
    level: NDArray[np.float64] = np.where(known, np.log2(size) - exponents, 0) * STEPS_PER_OCTAVE
    return np.rint(level) + MIDDLE


class Numbers(EveryStep):
    """Has every replica know the numbers of all.

    In one byte a number is a level relative to what numbers like it were of late, which all replicas know alike from
    what all of them sent, so it is never sent by itself. Where some are not known yet, as in the first step, all are
    sent in four bytes.

    Args:
        exchange: the replicas.
        options: what is checked, and when.
        short: whether numbers are sent in one byte, or in four.
    """

    def __init__(self, exchange: Exchange, options: NumberOptions, *, short: bool) -> None:
        super().__init__()
        self._exchange = exchange
        self._options = options
        self._short = short
        self._weight = 0.0
        self._steps = 0
        self._asked = False
        self._saturation = Saturation()

    @property
    def members(self) -> int:
        """How many replicas there are."""
        return len(self._exchange.transport.members)

    @property
    def _alone(self) -> bool:
        return self.members == 1

    def start(self, module: nn.Module) -> None:
        """Copy the first replica's parameters and buffers."""
        self._module = module
        if not self._alone:
            for tensor in persistent(module):
                self._await(self._exchange.transport.broadcast(tensor.data))

    def begin(self, weight: float) -> float:
        """Return the weight: a replica's slope is that of its own mean loss."""
        self._weight = weight
        return weight

    def before_backward(self) -> None:
        """Do nothing: there are no gradients to send."""

    def share(
        self, values: Sequence[float], sizes: Sequence[Sequence[float]], *, weighted: bool
    ) -> tuple[list[list[float]], list[float]]:
        """Exchange numbers.

        A replica reads its own numbers too, so all take the same.

        Args:
            values: this replica's.
            sizes: of each number of each replica, how large those like it were, equal on all replicas; 0: not known.
            weighted: whether the weights of the replicas' losses differ; if so, these travel too, in four bytes.

        Returns:
            The numbers of every replica, as all of them read them, nan or infinite for those that were; and how much
            those of each replica count, by its weight, 1 on average.
        """
        with np.errstate(over="ignore"):  # beyond float32 it is infinite, which is not used
            own = np.array(values).astype(np.float32)
        known = np.array(sizes, np.float64)
        exponents = list(np.frexp(known)[1] - 1) if self._short and known.all() else None
        weight = np.array([self._weight] if weighted else [], np.float32).view(np.uint8)
        sent = np.concatenate([weight, self._written(own, exponents)])
        rows = [sent] if self._alone else self._gather(sent)
        heard = [self._read(row[len(weight) :].copy(), member, exponents) for member, row in enumerate(rows)]
        weights = [float(row[:4].copy().view(np.float32)[0]) if weighted else 1.0 for row in rows]
        mean = sum(weights) / len(weights) or 1.0
        return heard, [one / mean for one in weights]

    def figures(self) -> dict[str, float]:
        """Return how many of this replica's numbers were 0 and saturated in this step, if a byte is to hold them."""
        return {"zeros": self._saturation.zeros, "saturated": self._saturation.saturated} if self._short else {}

    def before_step(self, loss: float, stop: bool) -> Totals:
        """Agree on whether to stop, every so many steps; the loss is this replica's own."""
        self._steps += 1
        self._asked = self._asked or stop
        if self._alone:
            return Totals(self._weight, loss, self._asked)
        due = self._steps % self._options.stop_every == 0
        stops = due and any(row[0] for row in self._gather(np.array([self._asked], np.uint8)))
        return Totals(self._weight, loss, stops)

    def after_step(self, lr: float) -> None:  # noqa: ARG002 - it does not count here
        """Compare what replicas hold, every so many steps.

        Raises:
            TrainingError: it is not the same.
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
                "moves: their machines do not compute alike; all need the same versions of raytrain and torch"
            )

    def _written(self, own: Floats, exponents: Sequence[Exponents] | None) -> Bytes:
        """Return this replica's numbers as bytes."""
        mine = exponents[self._exchange.transport.rank] if exponents else None
        if self._short:
            self._saturation.count(own, mine)
        return own.view(np.uint8) if mine is None else encode(own, mine)

    @staticmethod
    def _read(body: Bytes, member: int, exponents: Sequence[Exponents] | None) -> list[float]:
        """Return the numbers of a replica."""
        numbers: list[float] = (
            body.view(np.float32) if exponents is None else decode(body, exponents[member])
        ).tolist()
        return numbers

    def _gather(self, sent: Bytes) -> list[Bytes]:
        pending = self._exchange.transport.all_gather(torch.from_numpy(sent.copy()).to(self._exchange.transport.device))
        self._await(pending)
        return [row.cpu().numpy() for row in pending.wait()]
