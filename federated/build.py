"""The parts of a federated run, from its recipe: what a driver, an actor and a deployed client each put together."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from federated.channel import Channel
from federated.client import ClientData, LocalTrainer
from federated.evaluation import KeepScores, OwnExamples, evaluate_on, forget, over_clients, score_of
from federated.faults import ClientFaultPlan, FaultyChannel
from federated.global_model import RoundRates
from federated.gradients import GradientTrainer, arrays_of, running_statistics
from federated.partition import Partition
from federated.protocols.options import GradientOptions, ProtocolOptions
from federated.protocols.protocol import Protocol
from federated.recipe import FederateRecipe
from federated.rounds import Rounds
from federated.sampling import Stream, participants
from federated.server import Participation, Server
from federated.simulation import InProcessChannel
from federated.tables import PARTITIONS, PROTOCOLS
from federated.working_model import WorkingModel
from raytrain.errors import RecipeError
from raytrain.kinds import load_kind
from raytrain.models.adapters import inject_adapter, merge_adapter
from raytrain.models.freezing import freeze
from raytrain.optim.optimizers import make_optimizer
from raytrain.optim.options import OPTIMIZERS
from raytrain.provenance import check_trusted
from raytrain.recipe import read_toml
from raytrain.registry import resolve
from raytrain.seeds.prng import fold_in
from raytrain.seeds.seed_model import SeedModel
from raytrain.tasks.task import TASKS, Task, make_task
from raytrain.tensors import tensor_digest
from raytrain.training.trained_model import TrainedModel
from raytrain.zeroth.optimizers import ZOSGD, ZerothOrderOptimizer, directions_of

SIZES_SHOWN = 10_000
"""Clients whose examples are counted before a run begins."""


def task_of(recipe: FederateRecipe) -> Task:
    """Return the recipe's task."""
    return make_task(resolve(TASKS, recipe.task.name, "task.name"), recipe.task)


def partition_of(recipe: FederateRecipe, task: Task) -> Partition:
    """Return which of the task's training examples each client has.

    Raises:
        RecipeError: the examples cannot be divided so, or there are fewer clients than take part in a round.
    """
    make = resolve(PARTITIONS, recipe.partition.name, "partition.name")
    seed = fold_in(recipe.seed, Stream.PARTITION)
    partition: Partition = make(recipe.partition, task.data("train"), recipe.clients.count, seed)
    if recipe.clients.per_round > partition.clients:
        raise RecipeError(
            f"clients.per_round: expected at most {partition.clients}, as many as there are clients; "
            f"got {recipe.clients.per_round}"
        )
    largest = max(partition.size(client) for client in range(min(partition.clients, SIZES_SHOWN)))
    if largest > recipe.limits.examples:
        raise RecipeError(
            f"limits.examples: expected at least {largest}, the examples of the largest client, or its reports would "
            f"be refused; got {recipe.limits.examples}"
        )
    return partition


def protocol_of(recipe: FederateRecipe) -> Protocol:
    """Return the recipe's zeroth-order protocol, as it begins."""
    if not isinstance(recipe.protocol, ProtocolOptions):
        raise TypeError(f"protocol.name: {recipe.protocol.name} sends parameters")
    rates = RoundRates.of(recipe.learning_rates(), recipe.protocol.weight_decay)
    make = resolve(PROTOCOLS, recipe.protocol.name, "protocol.name")
    protocol: Protocol = make(recipe.protocol, rates, recipe.seed)
    return protocol


def working_model_of(
    recipe: FederateRecipe,
    task: Task,
    initial: Mapping[str, Tensor] | None = None,
    *,
    keep_round: bool = True,
    device: str = "cpu",
) -> WorkingModel:
    """Return the recipe's model with w0, which follows from the seed; see `WorkingModel`.

    Raises:
        RecipeError: the recipe does not fit the model.
    """
    module = initial_module(recipe, task).to(device)
    if recipe.zo.train_mode and (statistics := running_statistics(module)):
        raise RecipeError(
            f"zo.train_mode: expected false with {next(iter(statistics))}, which clients neither keep nor send; in "
            "evaluation mode they probe the model that is evaluated"
        )
    optimizer = make_optimizer(ZOSGD, recipe.optimizer, module)
    if not isinstance(optimizer, ZerothOrderOptimizer):  # the recipe sees to that
        raise TypeError(type(optimizer))
    space = directions_of(
        module, optimizer, distribution=recipe.zo.distribution, sparsity=recipe.zo.sparsity, blockwise=False
    )
    return WorkingModel(module, space, initial, keep_round=keep_round, options=recipe.zo.model_dump_json())


def initial_module(recipe: FederateRecipe, task: Task) -> nn.Module:
    """Return the model with its first weights, its adapter and what is frozen.

    Raises:
        RecipeError: the run that it starts from has another model, or none.
    """
    module = task.model(recipe.seed)
    if recipe.start:
        load_start(module, recipe.start)
    elif task.init_head:
        task.init_head(module, recipe.seed)
    freeze(module, recipe.freeze.match)
    inject_adapter(module, recipe.adapter, recipe.seed)
    return module


def gradient_trainer_of(recipe: FederateRecipe) -> GradientTrainer:
    """Return what answers for the clients of a run whose messages are parameters.

    Raises:
        RecipeError: the recipe does not fit the data or the model.
    """
    if not isinstance(recipe.protocol, GradientOptions):
        raise TypeError(f"protocol.name: {recipe.protocol.name} sends numbers along seeds")
    task = task_of(recipe)
    module = initial_module(recipe, task).to(recipe.device())
    data = ClientData(task, task.data("train"), partition_of(recipe, task).indices)
    constructor = resolve(OPTIMIZERS, recipe.optimizer.name, "optimizer.name")
    new_optimizer = partial(make_optimizer, constructor, recipe.optimizer, module)
    origin = gradient_origin(recipe, module)
    return GradientTrainer(recipe.protocol, module, data, new_optimizer, recipe.seed, origin)


def gradient_origin(recipe: FederateRecipe, module: nn.Module) -> str:
    """Return the digest of what clients of a run with gradients begin with: what they are not sent, and options.

    Args:
        recipe: of the client, or of the server.
        module: with its first weights.
    """
    plain, sent = recipe.to_dict(), arrays_of(module)
    options = json.dumps([plain.get(name) for name in ("seed", "rounds", "protocol", "optimizer", "schedule")])
    kept = tensor_digest((name, value) for name, value in module.state_dict().items() if name not in sent)
    return hashlib.sha256(f"{options} {kept}".encode()).hexdigest()


def load_start(module: nn.Module, folder: Path) -> None:
    """Set a module to the best model of a run of any kind, adapters merged.

    Raises:
        RecipeError: the run has another model, or none, or was fetched and names code.
        CheckpointError: its checkpoint is damaged, or not there yet.
    """
    raw, file = read_toml(str(folder), [])
    check_trusted(raw, file)
    load = load_kind(raw.get("kind", "train")).load
    if not load:
        raise RecipeError(f"start: {folder} is a run of the kind {raw['kind']}, which leaves no model")
    trained: TrainedModel = resolve({}, load, "kind")(folder, {})
    threads = torch.get_num_threads()
    found = trained.module()  # on as many threads as its run
    torch.set_num_threads(threads)
    if trained.adapted:
        merge_adapter(found)
    try:
        module.load_state_dict(found.state_dict())
    except RuntimeError as error:
        raise RecipeError(f"start: expected a run with the model of this task; {folder} has another: {error}") from None


def evaluate_module(
    recipe: FederateRecipe,
    task: Task,
    partition: Partition,
    module: nn.Module,
    version: int,
    keep: KeepScores = forget,
) -> dict[str, float]:
    """Return what a task measures of a model: on held-out examples, and on some clients' own.

    Args:
        recipe: says on how many clients' examples.
        task: of the recipe.
        partition: of its training examples.
        module: the model.
        version: rounds that made it, from which the clients follow.
        keep: called with the clients' scores, if there are any.
    """
    batch, held_out = recipe.evaluation.batch, task.data("valid")
    metrics = evaluate_on(task, module, held_out, batch)
    share = recipe.evaluation.clients
    if count := share and max(1, round(share * partition.clients)):
        some = participants(fold_in(recipe.seed, Stream.EVALUATION), version, partition.clients, count).tolist()
        own = {client: OwnExamples(task.data("train"), partition.indices(client)) for client in some}
        scores = [score_of(task, module, client, examples, batch) for client, examples in own.items()]
        keep(scores)
        metrics |= over_clients(scores, task)
    return metrics


@dataclass(frozen=True, slots=True)
class Federation:
    """What the parts of a run share, in one process.

    >>> federation = Federation.of(FederateRecipe.parse({"kind": "federate", "task": "digits", "rounds": 1}))
    >>> federation.partition.clients, federation.server().model.version
    (100, 0)

    Attributes:
        recipe: of the run.
        task: of the recipe.
        partition: of the task's examples.
        model: with w0.
    """

    recipe: FederateRecipe
    task: Task
    partition: Partition
    model: WorkingModel

    @classmethod
    def of(cls, recipe: FederateRecipe, device: str = "cpu") -> "Federation":
        """Return them, with the model on a device.

        Raises:
            RecipeError: the recipe does not fit the data or the model.
        """
        task = task_of(recipe)
        return cls(recipe, task, partition_of(recipe, task), working_model_of(recipe, task, device=device))

    def evaluate(self, server: Server, keep: KeepScores = forget) -> dict[str, float]:
        """Return what the task measures of the server's model: on held-out examples, and on some clients' own."""
        self.model.set_to(server.model, protocol_of(self.recipe))
        module, version = self.model.module, server.model.version
        return evaluate_module(self.recipe, self.task, self.partition, module, version, keep)

    def parameter_bytes(self) -> int:
        """Return the size of the parameters that the run moves, which a gradient method would send."""
        return sum(part.tensor.nbytes for part in self.model.directions.slices)

    def seed_model(self, server: Server) -> SeedModel:
        """Return the server's model for others to read."""
        return self.model.seed_model(server.model, server.protocol)

    def server(self) -> Server:
        """Return a server between rounds, as the run begins."""
        clients, faults = self.recipe.clients, self.recipe.faults
        partition = self.recipe.partition.model_dump_json()
        participation = Participation(self.partition.clients, clients.per_round, faults.quorum, partition)
        return Server(protocol_of(self.recipe), self.model.base, participation, self.recipe.limits)

    def trainer(self) -> LocalTrainer:
        """Return what answers for the clients."""
        data = ClientData(self.task, self.task.data("train"), self.partition.indices)
        return LocalTrainer(self.model, protocol_of(self.recipe), data, self.recipe.zo)

    def simulation(self, server: Server) -> Rounds:
        """Return the server's rounds, all in this process."""
        return self.rounds(server, InProcessChannel(self.trainer))

    def rounds(self, server: Server, channel: Channel) -> Rounds:
        """Return the server's rounds over a channel, with the recipe's faults."""
        return Rounds(server, FaultyChannel(channel, ClientFaultPlan(self.recipe.faults, self.recipe.seed)))
