"""NARS's predictor: an architecture encoder that is pre-trained on statistics which cost no training.

An encoder maps an architecture to an embedding; a head maps the embedding, with the recipe beside it, to the score.
First the encoder learns to predict the statistics of sampled architectures. Then the head is trained with the encoder
frozen, and both together at a quarter of the rate, with the Huber loss. An ensemble of networks gives the spread.

Source: Dai et al. 2021, FBNetV3: Joint Architecture-Recipe Search, section 3.
"""

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import huber_loss, mse_loss, relu

from search.chooser import Configuration, Genome
from search.predictor.features import Features
from search.surrogate.encoding import FloatArray

MEMBERS, HIDDEN, EMBEDDING = 5, 64, 24
RATE, BATCH = 1e-3, 32
PRETRAINING_STEPS, FROZEN_STEPS, JOINT_STEPS = 600, 300, 300

Statistics = Callable[[Sequence[Configuration]], FloatArray]
"""Architectures -> their statistics, shape (n, s)."""


class EnsembleLinear(nn.Module):
    """A linear layer of each member of an ensemble: (members, n, inputs) -> (members, n, outputs)."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        weight = torch.rand(MEMBERS, inputs, outputs, generator=generator)
        self.weight = nn.Parameter((2 * weight - 1) * bound)
        self.bias = nn.Parameter(torch.zeros(MEMBERS, 1, outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply each member's layer to its inputs."""
        return torch.baddbmm(self.bias, inputs, self.weight)


class EncoderPredictor:
    """Predicts scores from an embedding of the architecture and the recipe beside it.

    Not a `Predictor`: leaving each configuration out would take as many trainings.

    Args:
        architectures: configurations whose statistics the encoder is pre-trained on; none: it is not pre-trained.
        statistics: of an architecture.
        paths: the decisions that make the architecture; all others are the recipe.
    """

    def __init__(self, architectures: Sequence[Configuration], statistics: Statistics, paths: Collection[str]) -> None:
        self._architectures, self._statistics, self._paths = architectures, statistics, paths

    def fit(self, configurations: Sequence[Configuration], targets: FloatArray, rng: np.random.Generator) -> None:
        """Pre-train the encoder, then train the head, then both."""
        known = [*configurations, *self._architectures]
        self._columns = [Features([_part(each, self._paths, inside) for each in known]) for inside in (True, False)]
        self._generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        (architecture, recipe), generator = self._inputs(configurations), self._generator
        self._encoder = nn.ModuleList(
            [EnsembleLinear(architecture.shape[1], HIDDEN, generator), EnsembleLinear(HIDDEN, EMBEDDING, generator)]
        )
        self._head = nn.ModuleList(
            [EnsembleLinear(EMBEDDING + recipe.shape[1], HIDDEN, generator), EnsembleLinear(HIDDEN, 1, generator)]
        )
        if self._architectures:
            self._pretrain()
        expected = torch.tensor(targets, dtype=torch.float32)
        head, both = [*self._head.parameters()], [*self._encoder.parameters(), *self._head.parameters()]

        def loss(chosen: Tensor) -> Tensor:
            predicted = self._forward(architecture[chosen], recipe[chosen])
            return MEMBERS * huber_loss(predicted, expected[chosen])

        self._train(head, RATE, FROZEN_STEPS, len(targets), loss)
        self._train(both, RATE / 4, JOINT_STEPS, len(targets), loss)

    def predict(self, configurations: Sequence[Configuration]) -> tuple[FloatArray, FloatArray]:
        """Return mean and standard deviation over the members."""
        with torch.no_grad():
            each = self._forward(*self._inputs(configurations)[:2], whole=True).numpy().astype(float)
        return each.mean(axis=0), each.std(axis=0) + 1e-9

    def _pretrain(self) -> None:
        architecture, _ = self._inputs(self._architectures)
        raw = self._statistics(self._architectures)
        scaled = torch.tensor((raw - raw.mean(axis=0)) / raw.std(axis=0), dtype=torch.float32)
        proxy = EnsembleLinear(EMBEDDING, scaled.shape[1], self._generator)

        def loss(chosen: Tensor) -> Tensor:
            return MEMBERS * mse_loss(proxy(self._embedded(architecture[chosen])), scaled[chosen])

        self._train([*self._encoder.parameters(), *proxy.parameters()], RATE, PRETRAINING_STEPS, len(scaled), loss)

    def _train(
        self, parameters: list[Tensor], rate: float, steps: int, count: int, loss: Callable[[Tensor], Tensor]
    ) -> None:
        """Take Adam steps; each member draws its own batches."""
        optimizer = torch.optim.Adam(parameters, rate)
        for _ in range(steps):
            chosen = torch.randint(count, (MEMBERS, min(BATCH, count)), generator=self._generator)
            gradients = torch.autograd.grad(loss(chosen), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()

    def _inputs(self, configurations: Sequence[Configuration]) -> tuple[Tensor, Tensor]:
        """Return (architectures, recipes) as rows."""
        rows = [
            columns.rows([_part(each, self._paths, inside) for each in configurations])
            for columns, inside in zip(self._columns, (True, False), strict=True)
        ]
        return torch.tensor(rows[0], dtype=torch.float32), torch.tensor(rows[1], dtype=torch.float32)

    def _embedded(self, architecture: Tensor) -> Tensor:
        first, second = self._encoder
        return relu(second(relu(first(architecture))))

    def _forward(self, architecture: Tensor, recipe: Tensor, *, whole: bool = False) -> Tensor:
        """Return the predictions of each member; whole: all of them for the same rows."""
        if whole:
            architecture, recipe = (rows.expand(MEMBERS, *rows.shape) for rows in (architecture, recipe))
        first, second = self._head
        hidden = relu(first(torch.cat([self._embedded(architecture), recipe], dim=-1)))
        predicted: Tensor = second(hidden).squeeze(-1)
        return predicted


def _part(configuration: Configuration, paths: Collection[str], inside: bool) -> Configuration:
    """Return the decisions on some paths, or all others."""
    decisions = configuration.genome.decisions
    return Configuration(Genome(tuple(each for each in decisions if (each.path in paths) is inside)), {})
