"""How good the global model is: on the task's held-out examples, and on each client's own."""

from collections.abc import Iterable, Mapping
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


def evaluate_on(task: Task, module: nn.Module, examples: Examples, batch: int) -> dict[str, float]:
    """Return what the task measures of a module, over some examples.

    Raises:
        TrainingError: the task's metric was not measured.
    """
    return evaluate(task, module, examples, batch, ExactAverager(LocalTransport()))


def over_clients(rows: Iterable[Mapping[str, float]], task: Task) -> dict[str, float]:
    """Return the mean of the metric over clients, that of the worst tenth of them, and its standard deviation."""
    values = np.sort(np.array([row[task.metric] for row in rows]))
    worst = values if task.better == "higher" else values[::-1]
    few = max(1, round(WORST * len(values)))
    return {"clients": float(values.mean()), "worst_tenth": float(worst[:few].mean()), "spread": float(values.std())}
