"""What clients do in a round: they make the round's model, take local steps on their own examples, and report."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from federated.broadcast import receive
from federated.encodings import Floats, PayloadError
from federated.global_model import GlobalModel
from federated.options import ProbeOptions
from federated.protocols.protocol import Protocol
from federated.sampling import Indices, batches
from federated.wire import ReportHeader, read_model, write_lost, write_report
from federated.working_model import WorkingModel
from raytrain.errors import RecipeError
from raytrain.seeds.prng import fold_in
from raytrain.tasks.losses import loss_weights
from raytrain.tasks.task import Examples, Task
from raytrain.tensors import to_device
from raytrain.zeroth.estimators import projected_gradient, reject_outliers
from raytrain.zeroth.objective import make_closure
from raytrain.zeroth.perturbed import Closure

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClientData:
    """What clients learn from.

    Attributes:
        task: what is learned.
        examples: the training split.
        indices: client -> which of the examples are its own.
    """

    task: Task
    examples: Examples
    indices: Callable[[int], Indices]


class LocalTrainer:
    """Answers for any number of clients, one after the other.

    A client leaves nothing behind: it begins with a copy of the round's model, and what it draws depends on the round
    and its number alone.

    Args:
        model: with w0.
        protocol: the run's.
        data: of the clients.
        probing: how to probe.

    Attributes:
        newest: the last model that was received, from which a payload may make the next.
    """

    def __init__(self, model: WorkingModel, protocol: Protocol, data: ClientData, probing: ProbeOptions) -> None:
        self._model, self._protocol, self._data, self._probing = model, protocol, data, probing
        self.newest = self._initial = protocol.initial(model.base)
        model.module.train(probing.train_mode)

    def start_from(self, model: GlobalModel) -> None:
        """Have the newest model of a run that goes on.

        Raises:
            RecipeError: it begins with other weights, directions or options than this process has.
        """
        if model.origin != self._initial.origin:
            raise RecipeError(
                f"expected first weights, directions and options with digest {self._initial.origin[:12]}; got "
                f"{model.origin[:12]!r}: this process has other files of the model, or draws other first weights"
            )
        self.newest = model

    def answer(self, client: int, payload: bytes) -> bytes:
        """Return a client's report on a round, whose number is the version of the model that it is sent.

        A client that cannot make the model of the payload reports that it is lost, and is sent all of it.

        Raises:
            PayloadError: the payload is too short for a header.
        """
        try:
            model, sent = receive(payload, self._protocol, self.newest, self._initial)
        except PayloadError as error:
            logger.warning("client %d: %s; it asks for the whole model", client, error)
            version = read_model(payload)[0].version
            return write_lost(version, version, client)
        self.newest = model
        self._model.set_to(model, self._protocol)
        directions = self._protocol.directions(model.version, client) if sent is None else sent
        own = self._data.indices(client)
        scalars = self._local_steps(client, model.version, directions, own)
        header = ReportHeader(model.version, model.version, len(scalars), len(own))
        return write_report(header, self._protocol.encoding.write(scalars), client, model.digest)

    @torch.no_grad()
    def _local_steps(self, client: int, round_number: int, directions: Indices, own: Indices) -> Floats:
        """Return the projected gradient that is reported of each direction; a local step moves by what arrives."""
        protocol, space = self._protocol, self._model.directions
        steps, rate = len(directions), protocol.rate(round_number)
        drawn = own[batches(protocol.master, round_number, client, len(own), steps, protocol.options.batch)]
        examples = {index: self._data.examples[index] for index in np.unique(drawn).tolist()}
        scalars = np.empty(steps, np.float32)
        recent: list[list[float]] = [[] for _ in range(space.block_count)]
        for step, seed in enumerate(protocol.table.seeds(directions).tolist()):
            batch = [examples[index] for index in drawn[step].tolist()]
            loss = self._loss(batch, (round_number, client, step))
            found = projected_gradient(loss, self._model.perturbed, seed, self._probing.eps).value
            used, recent = reject_outliers([(seed, found)], recent, self._probing.outlier_threshold)
            usable = protocol.encoding.can_write(used.get(seed, np.nan))
            scalar = protocol.encoding.rounded(used[seed]) if usable else protocol.unusable(seed, client)
            scalars[step] = scalar
            if protocol.local and not np.isnan(scalar):
                space.add_direction(seed, -rate * scalar)
        return scalars

    def _loss(self, examples: Sequence[Any], at: tuple[int, int, int]) -> Closure:
        """Return the mean loss over some examples; in training mode all calls draw the same dropout."""
        parameter = self._model.directions.slices[0].tensor
        batch = to_device(self._data.task.collate(examples), parameter.device, parameter.dtype)
        weights = loss_weights(self._data.task, batch, len(examples), parameter.device)
        round_number, client, step = at
        drawn = (fold_in(self._protocol.master, round_number), client, step) if self._probing.train_mode else ()
        return make_closure(
            self._data.task, self._model.module, [(batch, weights)], drawn, None, self._probing.objective
        )
