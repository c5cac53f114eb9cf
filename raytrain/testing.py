"""Test support: replicas as threads or processes, fault injection, and a tiny task."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytrain.run.directory import RunDirectory
from raytrain.run.rows import read_jsonl
from raytrain.run.watchdog import Watchdog
from raytrain.sync.transport import GroupTransport, LocalTransport, PeerLostError, PendingWork
from raytrain.tasks.task import Task, TaskOptions
from raytrain.training.loader import LoaderFactory, local_loader
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import Progress, Replica
from raytrain.training.worker import run_worker

AnswerT = TypeVar("AnswerT")
PEER_WAIT_SECONDS = 60.0
ONE_AT_A_TIME = threading.Lock()
"""Held by a thread that draws from the generator that all threads share."""
PEER_LOST_STATUS = 3
"""The exit status of a worker of `train_with_gloo` that lost another one."""


class ThreadGroup:
    """Replicas that are threads of this process.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.given: dict[tuple[int, ...], dict[int, Tensor]] = {}
        self.left: set[int] = set()

    def run(self, function: Callable[["ThreadTransport"], AnswerT]) -> list[AnswerT]:
        """Call `function` with the transport of each replica, at once, and return the answers in order.

        Raises:
            Exception: whatever one of them raised first.
        """
        answers: dict[int, AnswerT] = {}
        errors: list[BaseException] = []

        def call(rank: int) -> None:
            transport = ThreadTransport(self, rank)
            try:
                answers[rank] = function(transport)
            except BaseException as error:
                errors.append(error)
            finally:
                transport.close()

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [answers[rank] for rank in range(self.size)]


class ThreadTransport:
    """One replica's end of a `ThreadGroup`; sums are taken in the order of the replicas."""

    def __init__(self, group: ThreadGroup, rank: int, name: tuple[int, ...] = ()) -> None:
        self.rank = rank
        self.members = tuple(range(group.size))
        self.device = torch.device("cpu")
        self.is_waiting = False
        self._group = group
        self._name = name
        self._channels = 0
        self._operations = 0

    def new_channel(self) -> "ThreadTransport":
        """Return the same replicas, with operations of their own."""
        self._channels += 1
        return ThreadTransport(self._group, self.rank, (*self._name, self._channels))

    def all_reduce(self, flat: Tensor) -> PendingWork:
        """Sum in place."""
        return self._start(flat, lambda parts: flat.copy_(sum(parts[1:], start=parts[0])))

    def all_gather(self, flat: Tensor) -> PendingWork:
        """Return all, stacked."""
        return self._start(flat, torch.stack)

    def all_to_all(self, rows: Tensor) -> PendingWork:
        """Take the rows that are for this replica."""
        return self._start(rows, lambda parts: torch.stack([part[self.rank] for part in parts]))

    def broadcast(self, flat: Tensor) -> PendingWork:
        """Overwrite with the first replica's."""
        return self._start(flat, lambda parts: flat.copy_(parts[0]))

    def close(self) -> None:
        """Leave: who waits for this replica learns that it is lost."""
        with self._group.changed:
            self._group.left.add(self.rank)
            self._group.changed.notify_all()

    def _start(self, flat: Tensor, combine: Callable[[list[Tensor]], Tensor]) -> PendingWork:
        self._operations += 1
        with self._group.changed:
            given = self._group.given.setdefault((*self._name, -self._operations), {})
            given[self.rank] = flat.clone()
            self._group.changed.notify_all()
        return _Gathered(self._group, given, combine, flat)


class _Gathered:
    def __init__(
        self, group: ThreadGroup, given: dict[int, Tensor], combine: Callable[[list[Tensor]], Tensor], flat: Tensor
    ) -> None:
        self.bytes_sent = flat.numel() * flat.element_size()
        self.seconds = 0.0
        self._started = time.monotonic()
        self._group = group
        self._given = given
        self._combine = combine

    def poll(self) -> bool:
        return len(self._given) == self._group.size

    def wait(self) -> Tensor:
        everyone = set(range(self._group.size))
        with self._group.changed:
            arrived = self._group.changed.wait_for(
                lambda: self._given.keys() == everyone or self._group.left - self._given.keys(), PEER_WAIT_SECONDS
            )
        if not arrived or self._given.keys() != everyone:
            raise PeerLostError(f"replicas {sorted(everyone - self._given.keys())} are lost")
        self.seconds = time.monotonic() - self._started
        return self._combine([self._given[rank] for rank in sorted(everyone)])


Fault = Literal["kill", "hang", "fail", "stop", "leave"]


class FaultPlan:
    """Faults at a replica's step, each happening once; use an instance as a recipe's callback.

    A fault leaves a file before it happens, so that it is counted although it ends the process, and so that the run
    that resumes does not meet it again.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._faults: dict[tuple[int, int], Fault] = {}

    def at(self, rank: int, step: int, fault: Fault) -> "FaultPlan":
        """Let `fault` happen to replica `rank` after step `step`.

        Args:
            rank: the replica's.
            step: counted from 1.
            fault: "kill" (SIGKILL), "hang", "fail" (an exception), "stop" (SIGSTOP) or "leave" (exit status 0).
        """
        self._faults[rank, step] = fault
        return self

    def happened(self) -> list[str]:
        """Return the faults that happened, as "kill at rank 1, step 12"."""
        return sorted(file.read_text() for file in self._folder.glob("fault-*"))

    def __call__(self, replica: Replica) -> None:
        """Let the fault of this replica and step happen, if there is one that has not yet."""
        place = (replica.rank, replica.progress.step)
        fault = self._faults.get(place)
        mark = self._folder / f"fault-{place[0]}-{place[1]}"
        if fault is None or mark.exists():
            return
        mark.write_text(f"{fault} at rank {place[0]}, step {place[1]}")
        if fault in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        elif fault == "leave":
            os._exit(0)
        elif fault == "hang":
            time.sleep(3600)
        else:
            raise RuntimeError(f"a fault on purpose at rank {place[0]}, step {place[1]}")


class TinyOptions(TaskOptions):
    """Options of the tiny task.

    Attributes:
        examples: how many to learn from.
        norm: whether the model has a BatchNorm, whose buffers move.
        dropout: probability of dropping a hidden unit.
    """

    examples: int = 50
    norm: bool = False
    dropout: float = 0.0


class TinyModel(nn.Module):
    """A regression model with an unused layer, a frozen one, and a buffer that gloo cannot send.

    Args:
        options: the task's.
    """

    def __init__(self, options: TinyOptions) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8) if options.norm else nn.Identity()
        self.dropout = nn.Dropout(options.dropout)
        self.out = nn.Linear(8, 1)
        self.unused = nn.Linear(3, 3)
        self.register_buffer("version", torch.tensor([1, 2], dtype=torch.int16))

    def forward(self, x: Tensor) -> Tensor:
        """Return the prediction, shape (n,), of x, shape (n, 4)."""
        hidden: Tensor = self.out(torch.tanh(self.dropout(self.norm(self.frozen(x)))))
        return hidden[:, 0]


def tiny(options: TinyOptions) -> Task:
    """Return the task of fitting a random function, with examples that count differently."""

    def model(seed: int) -> nn.Module:
        with ONE_AT_A_TIME:
            torch.manual_seed(seed)
            return TinyModel(options)

    def data(split: str) -> list[dict[str, Tensor]]:
        count = options.examples if split == "train" else 13
        x = torch.randn(count, 4, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
        return [{"x": row, "y": row.sin().sum(), "weight": row[0].abs() + (row[1] > 0)} for row in x]

    def losses(module: nn.Module, batch: Any) -> Tensor:
        errors: Tensor = module(batch["x"]) - batch["y"]
        return errors.square()

    return Task(model=model, data=data, losses=losses, weights=lambda batch: batch["weight"])


def train_here(
    recipe: TrainRecipe, folder: Path, make_loader: LoaderFactory = local_loader, device: str = "cpu"
) -> RunDirectory:
    """Train in this process, as the only worker."""
    run = _begun(recipe, folder)
    run_worker(recipe, run, LocalTransport(torch.device(device)), heartbeat=_nothing, make_loader=make_loader)
    return run


def train_with_threads(recipe: TrainRecipe, folder: Path) -> RunDirectory:
    """Train with workers that are threads of this process."""
    run = _begun(recipe, folder)
    ThreadGroup(recipe.workers).run(lambda transport: run_worker(recipe, run, transport, heartbeat=_nothing))
    return run


def train_with_gloo(recipe: TrainRecipe, folder: Path) -> list[int]:
    """Train with workers as local processes; return their exit statuses, -9 for a killed one."""
    return train_each_with_gloo([(recipe, folder)])


def train_each_with_gloo(runs: Sequence[tuple[TrainRecipe, Path]]) -> list[int]:
    """Train one after the other, with the same processes: to start one takes longer than a tiny run."""
    size, folder = runs[0][0].workers, runs[0][1]
    for run in runs:
        _begun(*run)
    store = folder / f".store-{time.time_ns()}"
    arguments = (size, [(recipe.to_dict(), str(folder)) for recipe, folder in runs], str(store), dict(os.environ))
    workers = [fork_server().Process(target=_gloo_worker, args=(rank, *arguments)) for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [worker.exitcode or 0 for worker in workers]


def fork_server() -> ForkServerContext:
    """Return what starts processes, forked from one that has imported all that they need and done nothing.

    To import it takes longer than a tiny run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo", "raytrain.cli.main", "raytrain.launch.train"])
    return context


def _begun(recipe: TrainRecipe, folder: Path) -> RunDirectory:
    run = RunDirectory(folder)
    with run.session(resume=run.recipe.is_file()):
        run.prepare(recipe.to_toml())
    return run


def _gloo_worker(
    rank: int, size: int, runs: list[tuple[dict[str, Any], str]], store: str, environment: dict[str, str]
) -> None:
    os.environ.clear()  # it is that of the first call
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        for plain, folder in runs:
            _gloo_run(rank, TrainRecipe.parse(plain), RunDirectory(Path(folder)))
    except PeerLostError:
        sys.exit(PEER_LOST_STATUS)


def _gloo_run(rank: int, recipe: TrainRecipe, run: RunDirectory) -> None:
    seconds = recipe.sync.timeout_seconds
    transport = GroupTransport(torch.device("cpu"), seconds)
    with Watchdog(run.path / f"hang-{rank}.txt", seconds, lambda: transport.is_waiting) as watchdog:
        run_worker(recipe, run, transport, watchdog.heartbeat)


def repeatable_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl` without the times and the costs, in which equal runs differ."""
    costs = {"seconds", *Progress().costs()}
    return [{name: value for name, value in row.items() if name not in costs} for row in read_jsonl(file)]


def _nothing(*_: object) -> None:
    """Take what a test does not look at."""
