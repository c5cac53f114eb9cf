"""Digit classifiers (64-32-10) trained as one stack: the members of a population, of several searches at once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from raytrain.optim import schedules
from raytrain.optim.schedules import lr_factor
from raytrain.serialization import pack, unpack
from search.rng import keyed_generator
from search.scheduling.driver import SegmentEnd
from search.scheduling.work import Failed, Work

STEPS, BATCH = 400, 16
SIZES = (64, 32, 10)
SHAPES = ((SIZES[0], SIZES[1]), (1, SIZES[1]), (SIZES[1], SIZES[2]), (1, SIZES[2]))

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Digits:
    """The splits: (inputs, labels) each."""

    train: tuple[torch.Tensor, torch.Tensor]
    valid: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]


def load(seed: int, wrong: float) -> Digits:
    """Return splits of half, a quarter and a quarter of the digits, with some wrong labels in the first."""
    digits = load_digits()
    rng = keyed_generator(seed, "split")
    order = rng.permutation(len(digits.target))
    inputs = torch.tensor(digits.data[order] / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target[order], dtype=torch.long)
    half, quarter = len(order) // 2, len(order) // 4
    noisy = labels[:half].clone()
    chosen = torch.tensor(rng.random(half) < wrong)
    noisy[chosen] = torch.tensor(rng.integers(0, 10, half), dtype=torch.long)[chosen]
    valid, test = slice(half, half + quarter), slice(half + quarter, half + 2 * quarter)
    return Digits((inputs[:half], noisy), (inputs[valid], labels[valid]), (inputs[test], labels[test]))


@dataclass(frozen=True)
class Layer:
    """A layer of a stack: the segment that one model trains.

    Attributes:
        search: which of the searches, and of the data sets.
        work: the segment.
        state: packed state to start from.
    """

    search: int
    work: Work
    state: bytes | None


class StackTrainer:
    """Trains segments of equal steps side by side; each gives what it would give alone, up to rounding.

    Args:
        digits: the data of each search.
        adam: take AdamW in place of SGD with momentum.
    """

    def __init__(self, digits: Sequence[Digits], *, adam: bool) -> None:
        self._splits = [
            (
                torch.stack([getattr(one, name)[0] for one in digits]),
                torch.stack([getattr(one, name)[1] for one in digits]),
            )
            for name in ("train", "valid", "test")
        ]
        self._adam = adam

    def train(self, segments: Sequence[Layer]) -> list[SegmentEnd | Failed]:
        """Train segments, all from one step to another one."""
        works, which = [one.work for one in segments], torch.tensor([one.search for one in segments])
        begin, end = works[0].snapshot.step, works[0].until
        weights, moments = self._start(segments)
        values = _columns(works)
        diverged = torch.zeros(len(works), dtype=torch.bool)
        inputs, labels = self._splits[0]
        for step in range(begin, end):
            taken, mask = _draw(works, step, inputs.shape[1], values["dropout"])
            losses = _losses(weights, inputs[which[:, None], taken], labels[which[:, None], taken], mask)
            diverged |= ~losses.detach().isfinite()
            self._update(weights, moments, torch.autograd.grad(losses.sum(), weights), values, step)
        with torch.no_grad():
            valid, test = (_losses(weights, split[0][which], split[1][which]).tolist() for split in self._splits[1:])
        return [
            Failed(work.attempt, "stopped", "the loss is not finite")
            if diverged[place]
            else SegmentEnd(_packed(weights, moments, place), end, {"loss": valid[place], "test": test[place]})
            for place, work in enumerate(works)
        ]

    def _start(self, segments: Sequence[Layer]) -> tuple[Tensors, Tensors]:
        count = len(SHAPES) * (3 if self._adam else 2)
        layers = [
            [unpack(one.state)[str(index)] for index in range(count)] if one.state else _initial(one.work.seed, count)
            for one in segments
        ]
        stacks = [torch.stack(column) for column in zip(*layers, strict=True)]
        weights, moments = stacks[: len(SHAPES)], stacks[len(SHAPES) :]
        return [one.requires_grad_() for one in weights], moments

    @torch.no_grad()
    def _update(self, weights: Tensors, moments: Tensors, gradients: Any, values: Mapping[str, Any], step: int) -> None:
        lr, decay = values["lr"] * _factors(values, step), values["weight_decay"]
        first, second = moments[: len(weights)], moments[len(weights) :]
        if not self._adam:
            for weight, velocity, gradient in zip(weights, first, gradients, strict=True):
                velocity.mul_(values["momentum"]).add_(gradient + decay * weight)
                weight.sub_(lr * velocity)
            return
        lr = lr * 0.1  # so that both optimizers have a range around their usual rates
        correction, root = 1 - 0.9 ** (step + 1), math.sqrt(1 - 0.999 ** (step + 1))
        for weight, mean, square, gradient in zip(weights, first, second, gradients, strict=True):
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient * gradient, 0.001)
            weight.mul_(1 - lr * decay)
            weight.sub_(lr / correction * mean / (square.sqrt() / root + 1e-8))


def _initial(seed: int, count: int) -> Tensors:
    """Return new weights, as torch.nn.Linear draws them, and moments of 0."""
    generator = torch.Generator().manual_seed(seed)
    bounds = [1 / math.sqrt(SIZES[0])] * 2 + [1 / math.sqrt(SIZES[1])] * 2
    weights = [
        torch.empty(shape).uniform_(-bound, bound, generator=generator)
        for shape, bound in zip(SHAPES, bounds, strict=True)
    ]
    return [*weights, *(torch.zeros(SHAPES[index % len(SHAPES)]) for index in range(count - len(weights)))]


def _packed(weights: Tensors, moments: Tensors, place: int) -> bytes:
    tensors = [*weights, *moments]
    return pack({str(index): one.detach()[place].clone() for index, one in enumerate(tensors)})


def _draw(works: Sequence[Work], step: int, examples: int, dropout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the batch of each layer, and which hidden units it keeps; draws have the seeds of their works."""
    taken, kept = [], []
    for work in works:
        rng = np.random.default_rng((work.seed, step))
        taken.append(rng.integers(0, examples, BATCH))
        kept.append(rng.random((BATCH, SIZES[1]), dtype=np.float32))
    share = 1 - dropout
    return torch.from_numpy(np.stack(taken)), (torch.from_numpy(np.stack(kept)) < share) / share


def _losses(
    weights: Tensors, inputs: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mean loss of each layer, shape (layers,)."""
    hidden = torch.relu(torch.baddbmm(weights[1], inputs, weights[0]))
    logits = torch.baddbmm(weights[3], hidden if mask is None else hidden * mask, weights[2])
    return cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def _columns(works: Sequence[Work]) -> dict[str, Any]:
    """Return each hyperparameter of all layers: numbers as a tensor of shape (layers, 1, 1)."""
    columns: dict[str, Any] = {name: [work.changes[name] for work in works] for name in works[0].changes}
    return {
        name: column if isinstance(column[0], str) else torch.tensor(column, dtype=torch.float32).view(-1, 1, 1)
        for name, column in columns.items()
    }


def _factors(values: Mapping[str, Any], step: int) -> torch.Tensor | float:
    """Return the factor of the learning rate of methods that search its schedule."""
    if "shape" not in values:
        return 1.0
    each = zip(values["shape"], values["warmup"].flatten().tolist(), values["floor"].flatten().tolist(), strict=True)
    factors = [
        lr_factor(getattr(schedules, shape), step, steps=STEPS, warmup=int(warmup), min_lr_ratio=floor, decay_ratio=0.2)
        for shape, warmup, floor in each
    ]
    return torch.tensor(factors, dtype=torch.float32).view(-1, 1, 1)
