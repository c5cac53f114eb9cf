"""Training on this machine without Ray: processes under the agent of torch's elastic launcher.

The agent is what `torchrun` runs. It starts the workers and looks after them; when one dies it ends the others and
starts all again, up to `max_failures` times. `elastic_launch` would hide it: here a run notes why workers had to be
started again, and a second Ctrl-C ends them at once. Workers meet through a file in a private folder and exchange over
the loopback interface, so nothing can be reached from outside.
"""

import contextlib
import datetime
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo
from torch.distributed.elastic.utils.process_state import read_proc_state

from raytrain.by_value import dump_objects, load_objects
from raytrain.errors import RaytrainError
from raytrain.kinds import RunOptions
from raytrain.launch.backend import train_on
from raytrain.launch.forkserver import leave_command, without_main
from raytrain.launch.resources import NodeResources, available_cpus, cpus_per_worker, eligible_nodes
from raytrain.loggers import restored_loggers
from raytrain.run.directory import RunDirectory
from raytrain.run.result import Result
from raytrain.run.watchdog import kept_stack
from raytrain.sync.transport import LOOPBACK, GroupTransport, LocalTransport, PeerLostError, Transport
from raytrain.training.recipe import TrainRecipe
from raytrain.training.worker import run_watched_worker

AGENT_POLL_SECONDS = 0.1
GONE_SECONDS = 1.0
"""Time for the agent to notice a process that has ended."""
KILL_WAIT_SECONDS = 60.0
"""Time to wait for killed workers; one in an uninterruptible system call is left behind."""
STOPPED = "it was stopped (SIGSTOP), and was ended"
GONE = "its process ended with exit status 0 before the training did"


def run_elastic(recipe: TrainRecipe, order: RunOptions) -> Result:
    """Train on this machine, and return the result.

    Raises:
        RaytrainError: as `supervise`.
    """
    return train_on(LocalMachine(), recipe, order)


class LocalMachine:
    """The backend of this machine."""

    def check(self, recipe: TrainRecipe) -> None:
        """Check that the workers fit on this machine.

        Raises:
            RecipeError: they do not.
        """
        _cpus(recipe)

    @contextlib.contextmanager
    def session(
        self, recipe: TrainRecipe, run: RunDirectory, say: Callable[[str], None]
    ) -> Iterator[Callable[[], "LocalWorkers"]]:
        """Yield what starts the workers; there is nothing to join."""
        cpus = _cpus(recipe)
        say(f"starting {recipe.workers} worker(s) with {cpus:g} CPU each")
        with _silent_agent():
            yield partial(LocalWorkers, recipe, run, max(1, int(cpus)))


def _cpus(recipe: TrainRecipe) -> float:
    """Return the CPUs of each worker.

    Raises:
        RecipeError: the workers do not fit on this machine.
    """
    resources = recipe.resources
    gpus = {"GPU": float(torch.cuda.device_count())} if resources.gpus else {}
    here: NodeResources = ({"CPU": available_cpus(), **gpus}, {})
    nodes = eligible_nodes([here], recipe.workers, resources.extra_resources(), resources.labels, resources.placement)
    return cpus_per_worker(nodes, recipe.workers, resources.cpus)


@contextlib.contextmanager
def _silent_agent() -> Iterator[None]:
    """Show nothing of what torch logs inside the `with` block: of failures, the run's display tells in a line."""
    names = ("torch.distributed.elastic", "torch.multiprocessing.spawn")
    with restored_loggers(*names):
        for logger in map(logging.getLogger, names):
            logger.handlers = [logging.NullHandler()]
            logger.propagate = False
        yield


class LocalWorkers(threading.Thread):
    """Worker processes and their agent, in a thread, because Ctrl-C is for the main thread.

    Args:
        recipe: to train.
        run: folder of the run.
        threads: of each worker.

    Attributes:
        ended: set when they have ended; an interrupted `join` takes a thread for ended (Python 3.11).
        error: why they failed, if they did.
    """

    def __init__(self, recipe: TrainRecipe, run: RunDirectory, threads: int) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.error = ""
        self._folder = Path(tempfile.mkdtemp(prefix="raytrain-"))  # nobody else may read it
        config = {
            "recipe": recipe.to_dict(),
            "run": str(run.path),
            "threads": threads,
            "folder": str(self._folder),
            "environment": dict(os.environ),
            "objects": dump_objects(recipe),
        }
        self._agent = _Agent(recipe, run, config)
        self.start()

    def run(self) -> None:
        """Train; keep an error in `error`."""
        try:
            failed = self._agent.run().state is not WorkerState.SUCCEEDED
            if failed:
                causes = "; ".join(f"worker {rank}: {cause}" for rank, cause in sorted(self._agent.causes.items()))
                self.error = f"the workers failed more often than max_failures allows; {causes}"
        except SignalException:
            self.error = "the workers were ended"
        except Exception as error:
            self.error = f"the workers could not be started: {type(error).__name__}: {error}"
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
            self.ended.set()

    def close(self) -> None:
        """Kill the workers, if they have not ended; those that have not started end by themselves."""
        self._agent.asked_to_end.set()
        if self._agent.watching:
            self.ended.wait(KILL_WAIT_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)


class _Agent(LocalElasticAgent):
    """torch's agent, extended to log causes of failures, to detect stopped workers, and to kill workers on request.

    Attributes:
        asked_to_end: set to kill the workers.
        watching: whether there are workers.
        causes: rank -> cause of the last failure.
    """

    def __init__(self, recipe: TrainRecipe, run: RunDirectory, config: dict[str, Any]) -> None:
        spec = WorkerSpec(
            role="worker",
            local_world_size=recipe.workers,
            entrypoint=_work,
            args=(config,),
            rdzv_handler=_Alone(),
            max_restarts=recipe.max_failures,
            monitor_interval=AGENT_POLL_SECONDS,
        )
        logs = DefaultLogsSpecs(log_dir=config["folder"])  # where a worker's last error goes
        super().__init__(spec, logs, start_method="forkserver")
        self.asked_to_end = threading.Event()
        self.watching = False
        self.causes: dict[int, str] = {}
        self._silence = _Silence(recipe.sync.timeout_seconds)
        self._run_directory = run

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Start the workers, and return local rank -> pid."""
        with without_main():
            started: dict[int, Any] = super()._start_workers(worker_group)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Check the workers, as the agent does every `AGENT_POLL_SECONDS`.

        Raises:
            SignalException: they are to be killed.
        """
        self.watching = True
        if self.asked_to_end.is_set():
            raise SignalException("asked to end", signal.SIGKILL)
        self._silence.look({worker.global_rank: int(worker.id) for worker in worker_group.workers})
        result: RunResult = super()._monitor_workers(worker_group)
        causes = {rank: self._cause(rank, failure) for rank, failure in result.failures.items()}
        if result.state is WorkerState.HEALTHY:
            causes = self._silence.too_long()
        if not causes:
            return result
        self._note(self._silence.end() | causes)
        return RunResult(WorkerState.FAILED, failures=result.failures)

    def _note(self, causes: dict[int, str]) -> None:
        """Add a line to `restarts.jsonl`.

        Raises:
            SignalException: the run's folder is gone, and with it the run.
        """
        self.causes, run = causes, self._run_directory
        if not run.recipe.is_file():
            raise SignalException(f"{run.path} is gone", signal.SIGKILL)
        run.append(run.restarts, {"time": time.time(), "workers": {str(rank): why for rank, why in causes.items()}})

    def _cause(self, rank: int, failure: ProcessFailure) -> str:
        """Return a short description of a worker's failure."""
        if stack := kept_stack(self._run_directory.path, rank):
            return f"it hung, and was ended; its stack is in {stack}"
        if failure.exitcode < 0:
            return f"its process died: killed, out of memory, or crashed ({failure.signal_name()})"
        error = failure.error_file_data.get("message")
        text = error["message"] if isinstance(error, dict) else ""
        if text.startswith(PeerLostError.__name__):
            return "it lost another worker"
        return text.strip().rpartition("\n")[2] or f"its process ended with exit status {failure.exitcode}"


class _Silence:
    """Workers that make no progress although the agent takes them for healthy: stopped, or exited with status 0.

    Args:
        timeout_seconds: for a stopped worker.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._patience = {STOPPED: 0.9 * timeout_seconds, GONE: GONE_SECONDS}
        self._since: dict[tuple[int, int, str], float] = {}

    def look(self, pids: Mapping[int, int]) -> None:
        """Record which processes are silent, of rank -> pid."""
        now = time.monotonic()
        silent = {(rank, pid, what) for rank, pid in pids.items() if (what := _silent(pid))}
        self._since = {each: self._since.get(each, now) for each in silent}

    def too_long(self) -> dict[int, str]:
        """Return rank -> cause for those that have been silent for too long."""
        now = time.monotonic()
        return {rank: what for (rank, _, what), since in self._since.items() if now - since > self._patience[what]}

    def end(self) -> dict[int, str]:
        """Kill stopped workers, which ignore the agent's SIGTERM, and return rank -> cause."""
        stopped = {rank: pid for rank, pid, what in self._since if what == STOPPED}
        for pid in stopped.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return dict.fromkeys(stopped, STOPPED)


def _silent(pid: int) -> str:
    """Return why a process makes no progress, if it can be seen from outside."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):  # the second: the number is another user's by now
        return GONE
    return STOPPED if read_proc_state(pid) == "T" else ""


class _Alone(RendezvousHandler):
    """The rendezvous of a single agent, inside this process."""

    def get_backend(self) -> str:
        """Return its name."""
        return "alone"

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the store of the agent; workers have their own."""
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo("localhost", 0))

    def is_closed(self) -> bool:
        """Return that it is open."""
        return False

    def set_closed(self) -> None:
        """Do nothing."""

    def num_nodes_waiting(self) -> int:
        """Return that nobody waits to join."""
        return 0

    def get_run_id(self) -> str:
        """Return its name."""
        return "alone"

    def shutdown(self) -> bool:
        """Return that there is nothing to close."""
        return True


def _work(config: dict[str, Any]) -> None:
    """Train as one of the processes that the agent started."""
    leave_command()
    agents = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ.update({**config["environment"], **agents})  # the server has that of the first run
    logging.getLogger().setLevel(logging.WARNING)
    rank, run = int(agents["RANK"]), RunDirectory(Path(config["run"]))
    try:
        load_objects(config["objects"])
        recipe = TrainRecipe.parse(config["recipe"])
        torch.set_num_threads(config["threads"])
        transport = _meet(recipe, Path(config["folder"]), rank)
    except RaytrainError as error:
        run.record_failure(error, rank)
        return
    run_watched_worker(recipe, run, transport)
    dist.destroy_process_group()


def device_of(rank: int, gpus: float) -> torch.device:
    """Return the device of a worker, where each has `gpus` GPUs or shares of one, in rank order."""
    return torch.device("cuda", int(rank * gpus)) if gpus else torch.device("cpu")


def _meet(recipe: TrainRecipe, folder: Path, rank: int) -> Transport:
    """Form the process group of all workers, and return their transport."""
    gpus, timeout_seconds = recipe.resources.gpus, recipe.sync.timeout_seconds
    os.environ.update(GLOO_SOCKET_IFNAME=LOOPBACK, NCCL_SOCKET_IFNAME=LOOPBACK)
    device = device_of(rank, gpus)
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo",
        init_method=f"file://{folder}/store-{os.environ['TORCHELASTIC_RESTART_COUNT']}",
        rank=rank,
        world_size=recipe.workers,
        timeout=datetime.timedelta(seconds=max(1, round(timeout_seconds))),
    )
    return GroupTransport(device, timeout_seconds) if recipe.workers > 1 else LocalTransport(device)
