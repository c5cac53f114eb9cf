"""Replicas that exchange numbers in place of gradients: each probe's slope, in four bytes or in one.

The seeds follow from the step and the replica, so nobody sends them, and each replica makes everybody's moves (Zelikman
et al. 2023, Just One Byte). What is sent does not depend on the size of the model.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from raytrain.bits import digest_of
from raytrain.errors import TrainingError
from raytrain.sync.buffers import persistent
from raytrain.sync.exchange import Exchange
from raytrain.sync.synchroniser import EveryStep, SyncOptions, Totals

STEPS_PER_OCTAVE = 6
LEVELS = 127
NOT_FINITE = -128
MIDDLE = 64
"""The level that stands for 1: one byte holds 2^-10.5 to 2^10.5, each to 6 %."""

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class NumberOptions(SyncOptions):
    """Options of exchanging numbers.

    Attributes:
        check_every: steps after which workers compare a hash of their parameters, of 8 bytes; 0: never.
        stop_every: steps after which they agree on whether to stop, with one byte each. Nothing else is sent.
    """

    check_every: int = Field(100, ge=0)
    stop_every: int = Field(8, ge=1)


def numbers(exchange: Exchange, options: NumberOptions) -> "Numbers":
    """Exchange each probe's slope as a float32, for zeroth-order optimizers."""
    return Numbers(exchange, options, lambda values: values.view(np.uint8), lambda sent: sent.view(np.float32))


def one_byte(exchange: Exchange, options: NumberOptions) -> "Numbers":
    """Exchange each probe's slope as one byte, a sign and a logarithm, for zeroth-order optimizers."""
    return Numbers(exchange, options, encode, decode)


def encode(values: Floats) -> Bytes:
    """Return a byte for each number: 0 for 0, else its sign and the nearest of 127 levels, six to an octave.

    Numbers beyond the levels become the first or the last, and those more than an octave below the first become 0; one
    byte is left for those that are not finite.
    """
    size = np.abs(np.where(np.isfinite(values), values, 0)).astype(np.float64)
    level = np.rint(np.log2(np.maximum(size, 1e-300)) * STEPS_PER_OCTAVE).astype(np.int64) + MIDDLE
    kept = level > -STEPS_PER_OCTAVE
    signed = np.where(values < 0, -1, 1) * np.clip(level, 1, LEVELS) * kept
    signed = np.where(np.isfinite(values), signed, NOT_FINITE)
    sent: Bytes = signed.astype(np.int8).view(np.uint8)
    return sent


def decode(sent: Bytes) -> Floats:
    """Return the numbers that bytes stand for."""
    signed = sent.view(np.int8).astype(np.int64)
    size = 2.0 ** ((np.abs(signed) - MIDDLE) / STEPS_PER_OCTAVE)
    numbers = np.where(signed == 0, 0.0, np.sign(signed) * size)
    return np.where(signed == NOT_FINITE, np.nan, numbers).astype(np.float32)


class Numbers(EveryStep):
    """Has every replica know the numbers of all.

    Args:
        exchange: the replicas.
        options: what is checked, and when.
        write: numbers -> what is sent, as many bytes for each.
        read: what is sent -> numbers. A replica reads its own too, so all take the same.
    """

    def __init__(
        self,
        exchange: Exchange,
        options: NumberOptions,
        write: Callable[[Floats], Bytes],
        read: Callable[[Bytes], Floats],
    ) -> None:
        super().__init__()
        self._exchange = exchange
        self._alone = len(exchange.transport.members) == 1
        self._options = options
        self._write, self._read = write, read
        self._weight = 0.0
        self._steps = 0

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

    def share(self, values: Sequence[float]) -> list[list[float]]:
        """Return the numbers of every replica, as all of them read them; nan or infinite for those that were."""
        with np.errstate(over="ignore"):  # beyond float32 it is infinite, which is not used
            sent = self._write(np.array(values).astype(np.float32))
        if self._alone:
            return [self._read(sent).tolist()]
        return [self._read(row).tolist() for row in self._gather(sent)]

    def before_step(self, loss: float, stop: bool) -> Totals:
        """Agree on whether to stop, every so many steps; the loss is this replica's own."""
        self._steps += 1
        if self._alone:
            return Totals(self._weight, loss, stop)
        due = self._steps % self._options.stop_every == 0
        return Totals(self._weight, loss, due and any(row[0] for row in self._gather(np.array([stop], np.uint8))))

    def after_step(self, lr: float) -> None:  # noqa: ARG002 - it does not count here
        """Compare what replicas hold, every so many steps.

        Raises:
            TrainingError: it is not the same.
        """
        every = self._options.check_every
        if self._alone or not every or self._steps % every:
            return
        mine = digest_of(self._module.named_parameters())
        answers = self._gather(np.frombuffer(bytes.fromhex(mine)[:8], np.uint8))
        odd = [rank for rank, answer in enumerate(answers) if (answer != answers[0]).any()]
        if odd:
            raise TrainingError(
                f"the parameters of worker {', '.join(map(str, odd))} differ from those of worker 0 after the same "
                "moves: their machines do not compute alike; all need the same versions of raytrain and torch"
            )

    def _gather(self, sent: Bytes) -> list[Bytes]:
        pending = self._exchange.transport.all_gather(torch.from_numpy(sent.copy()).to(self._exchange.transport.device))
        self._await(pending)
        return [row.cpu().numpy() for row in pending.wait()]
