"""How good the global model is: on the task's held-out examples, and on each client's own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from federated.sampling import Indices
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.tasks.task import Examples, Task
from raytrain.training.evaluation import evaluate

WORST = 0.1
"""Share of the clients whose mean is shown beside that of all."""


@dataclass(frozen=True, slots=True)
class OwnExamples:
    """A client's examples.

    Attributes:
        examples: of all clients.
        indices: of this one's.
    """

    examples: Examples
    indices: Indices

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.indices)

    def __getitem__(self, index: int) -> object:
        """Return one."""
        return self.examples[int(self.indices[index])]


@dataclass(frozen=True, slots=True)
class ClientScore:
    """What a model is worth to a client.

    Attributes:
        client: its number.
        examples: that it has.
        metrics: of the model, on these; one is left out that has no meaning on them, as F1 without a positive.
    """

    client: int
    examples: int
    metrics: Mapping[str, float]


KeepScores = Callable[[Sequence[ClientScore]], None]


def forget(scores: Sequence[ClientScore]) -> None:
    """Keep no scores of clients."""


def evaluate_on(task: Task, module: nn.Module, examples: Examples, batch: int) -> dict[str, float]:
    """Return what the task measures of a module, over some examples.

    Raises:
        TrainingError: the task's metric was not measured.
    """
    return evaluate(task, module, examples, batch, ExactAverager(LocalTransport()))


def score_of(task: Task, module: nn.Module, client: int, own: OwnExamples, batch: int) -> ClientScore:
    """Return what a module is worth to a client."""
    measured = evaluate(task, module, own, batch, ExactAverager(LocalTransport()), required=False)
    return ClientScore(client, len(own), measured)


def over_clients(scores: Sequence[ClientScore], task: Task) -> dict[str, float]:
    """Return the mean of the metric over clients, that of the worst tenth of them, and its standard deviation.

    Clients on whose examples the metric has no meaning do not count; if that is all of them, there is nothing.
    """
    values = np.sort(np.array([score.metrics[task.metric] for score in scores if task.metric in score.metrics]))
    if not len(values):
        return {}
    worst = values if task.better == "higher" else values[::-1]
    few = max(1, round(WORST * len(values)))
    return {"clients": float(values.mean()), "worst_tenth": float(worst[:few].mean()), "spread": float(values.std())}
