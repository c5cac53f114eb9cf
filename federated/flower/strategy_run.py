"""A run whose clients send parameters, which a strategy of Flower's averages."""

import ast
import io
import json
import logging
import math
import struct
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray
from safetensors.numpy import save

from federated.build import evaluate_module, gradient_origin, gradient_trainer_of, initial_module, partition_of, task_of
from federated.channel import LateAnswer, NoReport
from federated.checkpoint import check_same_run, read_newest, write_checkpoint
from federated.encodings import PayloadError
from federated.evaluation import KeepScores, forget
from federated.faults import ClientFaultPlan
from federated.flower.channel import GridMessenger, nobody, nothing_late
from federated.flower.gradient_client import ARRAYS, METRICS, GradientClient
from federated.flower.seeding import global_seed
from federated.gradients import Arrays, arrays_of, load_arrays, running_statistics
from federated.options import ReportLimits
from federated.protocols.protocol import ClientReport
from federated.recipe import FederateRecipe
from federated.records import PARAMETERS
from federated.rounds import STATES
from federated.sampling import participants
from federated.server import CommunicationRound, check_same_origin
from federated.tables import STRATEGIES
from raytrain.errors import RecipeError
from raytrain.files import write_atomic
from raytrain.registry import resolve
from raytrain.seeds.prng import fold_in

logger = logging.getLogger(__name__)

MOMENTS = ("m_t", "v_t", "momentum_vector")
"""Attributes in which Flower's strategies keep what they learn from round to round."""
SERVER_OPTIMIZERS = ("FedAdam", "FedYogi", "FedAdagrad", "FedAvgM", "QFedAvg")
"""Strategies that step by what clients moved; that may carry a running variance below 0, so statistics are averaged."""
HEAD_BYTES = 4096
"""Of an array in a message, beside its numbers."""
NOTHING = np.zeros(0, np.float32)


class StrategyRun:
    """A run of a strategy of Flower's.

    Args:
        recipe: of the run.

    Attributes:
        task: of the recipe.
        partition: of the task's examples.
        arrays: the newest trainable parameters.
        version: how many rounds made them.
        origin: the digest of what the run starts from and goes by, which a client has to share.

    Raises:
        RecipeError: it does not fit the data, the model or the strategy.
    """

    def __init__(self, recipe: FederateRecipe) -> None:
        self._recipe = recipe
        self.task = task_of(recipe)
        self.partition = partition_of(recipe, self.task)
        self._module = initial_module(recipe, self.task)
        self.arrays = arrays_of(self._module)
        self._statistics = running_statistics(self._module).keys()
        self.origin = gradient_origin(recipe, self._module)
        self._strategy = strategy_of(recipe)
        self._rates = recipe.learning_rates()
        self._faults = ClientFaultPlan(recipe.faults, recipe.seed)
        self.version = 0

    def is_done(self) -> bool:
        """Return whether all rounds are done."""
        return self.version == self._recipe.rounds

    def resume(self, folder: Path) -> None:
        """Take back the newest state in a run's folder, if there is one.

        Raises:
            RecipeError: it is of another run.
        """
        found = read_newest(folder / STATES)
        if found is None:
            return
        about, state = found
        check_same_run(folder, self._about(), about)
        self._check_model(folder, state)
        self.version = int(state.pop("version")[0])
        for name in MOMENTS:
            kept = {key.removeprefix(f"{name}."): state.pop(key) for key in list(state) if key.startswith(f"{name}.")}
            if kept:
                as_list = name == "momentum_vector"
                setattr(self._strategy, name, [kept[str(i)] for i in range(len(kept))] if as_list else kept)
        self.arrays = {name: state[f"array.{name}"] for name in self.arrays}  # some strategies go by their order

    def _check_model(self, folder: Path, state: Mapping[str, NDArray[Any]]) -> None:
        """Refuse the state of a run with another model."""
        for name, value in self.arrays.items():
            found = state.get(f"array.{name}", NOTHING)
            if (found.shape, found.dtype) != (value.shape, value.dtype):
                raise RecipeError(
                    f"{folder}: expected a run whose {name} has shape {value.shape}, {value.dtype}; "
                    f"got {found.shape}, {found.dtype}: the recipe has another model now"
                )

    def check_origin(self, client: int, origin: str) -> None:
        """Refuse a client that begins with something else; see `check_same_origin`."""
        check_same_origin(client, origin, self.origin)

    def evaluate(self, keep: KeepScores = forget) -> dict[str, float]:
        """Return what the task measures of the newest model."""
        load_arrays(self._module, self.arrays)
        return evaluate_module(self._recipe, self.task, self.partition, self._module, self.version, keep)

    def save_model(self, folder: Path) -> None:
        """Write the newest trainable parameters."""
        write_atomic(folder / PARAMETERS, save(self.arrays, {"version": str(self.version)}))

    def parameter_bytes(self) -> int:
        """Return the size of the parameters that the run moves."""
        return sum(value.nbytes for value in self.arrays.values())

    def client_factory(self) -> Callable[[], Callable[[Message, Context], Message]]:
        """Return what makes the clients, in a process that serves any number of them."""
        return partial(load_gradient_clients, self._recipe.to_dict())

    def play(
        self,
        grid: Grid,
        nodes: Sequence[int],
        folder: Path,
        record: Callable[[CommunicationRound], None],
        end_process: Callable[[int], None] = nobody,
        late_answers: Callable[[], Sequence[LateAnswer]] = nothing_late,
    ) -> Generator[CommunicationRound]:
        """Play rounds to the end, and yield each when it is saved; see `GridMessenger`."""
        messenger = GridMessenger(grid, nodes, self._recipe.faults.timeout_seconds, end_process, late_answers)
        while not self.is_done():
            done = self.play_round(messenger)
            record(done)
            self._save(folder / STATES)
            yield done

    def play_round(self, messenger: GridMessenger) -> CommunicationRound:
        """Sample clients, send them the parameters, and have the strategy average theirs."""
        recipe, number = self._recipe, self.version
        clients = participants(recipe.seed, number, self.partition.clients, recipe.clients.per_round).tolist()
        going = CommunicationRound(number, tuple(clients), asked=set(clients))
        contents = self._contents(messenger, clients)
        replies: dict[int, RecordDict] = {}
        for client in clients:
            if self._faults.fault(number, client) == "crash":
                messenger.end_process(client)
        for client, content in messenger.ask(number, contents):
            answer = content if isinstance(content, NoReport) else self._after_fault(number, client, content)
            if isinstance(answer, NoReport):
                going.miss(client, answer.reason)
            else:
                self._hear(going, client, answer, replies)
        going.late = list(messenger.late_answers())
        going.payloads, going.bytes_down = len(contents), sum(map(size_of, contents.values()))
        self._aggregate(going, replies)
        return going

    def _contents(self, messenger: GridMessenger, clients: Sequence[int]) -> dict[int, RecordDict]:
        """Return what the strategy sends each client."""
        nodes = {messenger.nodes[client]: client for client in clients}
        lr = self._recipe.optimizer.arguments()["lr"]
        config = ConfigRecord({"lr-ratio": self._rates[self.version] / lr if lr else 1.0})
        record = ArrayRecord({name: Array(value) for name, value in self.arrays.items()})
        with global_seed(fold_in(self._recipe.seed, self.version)):
            messages = self._strategy.configure_train(self.version + 1, record, config, _Sampled(list(nodes)))  # type: ignore[arg-type]
        return {nodes[message.metadata.dst_node_id]: message.content for message in messages}

    def _after_fault(self, number: int, client: int, content: RecordDict) -> RecordDict | NoReport:
        """Return a client's reply, unless a fault happens to it."""
        answer = self._faults.after(number, client, b"")
        return answer if isinstance(answer, NoReport) else content

    def _hear(
        self, going: CommunicationRound, client: int, content: RecordDict, replies: dict[int, RecordDict]
    ) -> None:
        """Take a client's reply, or refuse it and say why."""
        going.reports += 1
        going.bytes_up += size_of(content)
        try:
            examples, replies[client] = checked_reply(content, self.arrays, self._recipe.limits)
        except PayloadError as error:
            going.refuse(client, str(error))
            return
        going.heard[client] = ClientReport(client, examples, NOTHING, NOTHING.astype(np.int64))

    def _aggregate(self, going: CommunicationRound, replies: Mapping[int, RecordDict]) -> None:
        """Average what was heard, in the order of clients; without a quorum the parameters stay as they are."""
        self.version += 1
        if len(replies) < self._recipe.faults.quorum:
            return
        going.used = [going.heard[client] for client in sorted(replies)]
        answers = [_reply(replies[client]) for client in sorted(replies)]
        averaged_apart = self._statistics if self._recipe.strategy.name in SERVER_OPTIMIZERS else ()
        statistics = {name: self._mean(name, replies, going.used) for name in averaged_apart}
        averaged, _ = self._strategy.aggregate_train(self.version, answers)
        if averaged is None:
            return
        arrays = {name: averaged[name].numpy().astype(old.dtype) for name, old in self.arrays.items()}
        arrays |= statistics
        if not all(np.isfinite(value).all() for value in arrays.values()):
            logger.warning("round %d: its average is not finite; the model stays as it is", going.number)
            return
        self.arrays = arrays

    def _mean(self, name: str, replies: Mapping[int, RecordDict], used: Sequence[ClientReport]) -> NDArray[Any]:
        """Return the mean of an array over clients, by their examples."""
        total = sum(report.examples for report in used)
        mean = sum(
            replies[report.client].array_records[ARRAYS][name].numpy() * (report.examples / total) for report in used
        )
        return np.asarray(mean, self.arrays[name].dtype)

    def _save(self, folder: Path) -> None:
        state: dict[str, NDArray[Any]] = {f"array.{name}": value for name, value in self.arrays.items()}
        for name in MOMENTS:
            moments = getattr(self._strategy, name, None) or {}
            named = moments.items() if isinstance(moments, Mapping) else enumerate(moments)
            state |= {f"{name}.{key}": np.asarray(value) for key, value in named}
        write_checkpoint(folder, self.version, self._about(), {**state, "version": np.array([self.version])})

    def _about(self) -> dict[str, str]:
        """Return what a run is known by."""
        recipe, plain = self._recipe, self._recipe.to_dict()
        fields = ("seed", "rounds", "protocol", "strategy", "optimizer", "schedule", "freeze", "adapter", "partition")
        clients = f"{self.partition.clients}, {recipe.clients.per_round} a round"
        return {"clients": clients, **{name: json.dumps(plain.get(name), sort_keys=True) for name in fields}}


def load_gradient_clients(recipe: Mapping[str, Any]) -> GradientClient:
    """Return the clients of a run, in a process that serves any number of them.

    Args:
        recipe: as `Recipe.to_dict` returns it.

    Raises:
        RecipeError: the recipe does not fit the data or the model.
    """
    parsed = FederateRecipe.parse(recipe)
    torch.set_num_threads(parsed.threads())
    return GradientClient(gradient_trainer_of(parsed))


@dataclass(frozen=True, slots=True)
class _Sampled:
    """The clients of a round, as the whole of a grid to a strategy that samples all of it."""

    nodes: list[int]

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes."""
        return self.nodes


def strategy_of(recipe: FederateRecipe) -> FedAvg:
    """Return the strategy of a recipe, which trains with all clients that it is shown and evaluates none.

    Raises:
        RecipeError: it does not take the arguments.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)  # strategies write lines for each round
    make, count = resolve(STRATEGIES, recipe.strategy.name, "strategy.name"), recipe.clients.per_round
    sampling = {"fraction_train": 1.0, "fraction_evaluate": 0.0, "min_train_nodes": 1, "min_available_nodes": count}
    try:
        strategy: FedAvg = make(**sampling, **recipe.strategy.arguments)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"strategy.arguments: {recipe.strategy.name}: {error}") from error
    return strategy


def checked_reply(content: RecordDict, sent: Arrays, limits: ReportLimits) -> tuple[int, RecordDict]:
    """Return the number of examples of a reply, and what a strategy may see of it.

    Raises:
        PayloadError: it has other arrays, one has a number that is not finite or too large, or it says too many
            examples.
    """
    arrays, metrics = content.get(ARRAYS), content.get(METRICS)
    if not isinstance(arrays, ArrayRecord) or not isinstance(metrics, MetricRecord) or list(arrays) != list(sent):
        raise PayloadError(f"expected arrays {', '.join(sent)} and metrics; got {sorted(content)}"[:300])
    examples, loss = metrics.get("num-examples"), metrics.get("train_loss")
    if not isinstance(examples, int) or not 1 <= examples <= limits.examples:
        raise PayloadError(f"expected 1 to {limits.examples} examples; got {examples}"[:300])
    if not isinstance(loss, float) or not math.isfinite(loss):
        raise PayloadError(f"expected a finite loss; got {loss}"[:300])
    checked = ArrayRecord(
        {name: Array(_checked_array(name, arrays[name], value, limits)) for name, value in sent.items()}
    )
    return examples, RecordDict(
        {ARRAYS: checked, METRICS: MetricRecord({"num-examples": examples, "train_loss": loss})}
    )


def _checked_array(name: str, array: Array, sent: NDArray[Any], limits: ReportLimits) -> NDArray[Any]:
    """Return an array that is like the one that was sent, before anything large is made of another."""
    most = sent.nbytes + HEAD_BYTES
    if len(array.data) > most:
        raise PayloadError(f"{name}: expected at most {most} bytes; got {len(array.data)}")
    expected, got = f"{sent.dtype} of shape {sent.shape}", _declared(name, array.data)
    if got != expected:
        raise PayloadError(f"{name}: expected {expected}; got {got}"[:300])
    try:
        value: NDArray[Any] = array.numpy()
    except (ValueError, EOFError, OSError) as error:
        raise PayloadError(f"{name}: expected an array; got {type(error).__name__}") from error
    if not np.isfinite(value).all():
        raise PayloadError(f"{name}: expected finite numbers; got some that are not")
    if value.size and np.abs(value).max() > limits.largest:
        raise PayloadError(f"{name}: expected numbers up to {limits.largest:g}; got {np.abs(value).max():g}")
    return value


def _declared(name: str, data: bytes) -> str:
    """Return what the head of an array in NumPy's format says of it.

    Raises:
        PayloadError: it is in another format, or cut short.
    """
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError
        (length,) = struct.unpack("<H", file.read(2))
        head = ast.literal_eval(file.read(length).decode("latin1"))  # NumPy's own reader lets errors of a tokenizer out
        return f"{np.lib.format.descr_to_dtype(head['descr'])} of shape {head['shape']}"
    except (ValueError, SyntaxError, TypeError, LookupError, struct.error, RecursionError, MemoryError) as error:
        raise PayloadError(f"{name}: expected an array in NumPy's format; got something else") from error


def size_of(content: RecordDict) -> int:
    """Return the bytes of the arrays in a message."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def _reply(content: RecordDict) -> Message:
    """Return a client's reply as a strategy reads it."""
    return Message(content, dst_node_id=1, message_type="train")
