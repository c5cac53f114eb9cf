"""Training on Ray Train."""

import contextlib
import logging
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

import raytrain
from raytrain.by_value import dump_objects, load_objects
from raytrain.data.source import ActorSource
from raytrain.environment import environment
from raytrain.errors import RaytrainError, RecipeError
from raytrain.kinds import RunOptions
from raytrain.launch.backend import train_on
from raytrain.launch.forkserver import WORKER_ENVIRONMENT
from raytrain.launch.process_group import GroupConfig
from raytrain.launch.resources import (
    CpuShare,
    Node,
    allocate_cpus,
    check_reachable,
    cpus_per_worker,
    nodes_here,
)
from raytrain.launch.session import OWN_CLUSTER, cluster_nodes, ray_session
from raytrain.launch.version import fingerprint
from raytrain.run.directory import RunDirectory, host_suffix
from raytrain.run.result import Result
from raytrain.run.watchdog import kept_stack
from raytrain.sync.transport import GroupTransport, LocalTransport
from raytrain.training.build import build_task, check_examples
from raytrain.training.loader import LoaderFactory, local_loader
from raytrain.training.recipe import TrainRecipe
from raytrain.training.worker import run_watched_worker


def run_on_ray(recipe: TrainRecipe, order: RunOptions) -> Result:
    """Train on the Ray cluster at `order.address`, or on a private one, and return the result.

    Raises:
        RaytrainError: as `supervise`.
    """
    return train_on(RayCluster(order.address or OWN_CLUSTER), recipe, order)


class RayCluster:
    """The backend of a Ray cluster.

    Args:
        address: "auto", "HOST:PORT", or "local" for one that starts and ends with this process.
    """

    def __init__(self, address: str) -> None:
        self._address = None if address == OWN_CLUSTER else address

    def check(self, recipe: TrainRecipe) -> None:
        """Check that the cluster answers, or that the workers fit on this machine and their examples can be read.

        Raises:
            RecipeError: it does not, they do not, or the examples cannot.
        """
        if self._address is not None:
            check_reachable(self._address)
            return
        if not ray.is_initialized():
            _allocate(nodes_here(recipe.workers, recipe.resources), recipe)
        check_examples(recipe, build_task(recipe))

    @contextlib.contextmanager
    def session(
        self, recipe: TrainRecipe, run: RunDirectory, say: Callable[[str], None]
    ) -> Iterator[Callable[[], "RayWorkers"]]:
        """Be in the cluster inside the `with` block, and yield what starts the workers.

        Raises:
            RecipeError: there is no such cluster, or the workers do not fit.
        """
        say("starting Ray" if self._address is None else f"connecting to Ray at {self._address}")
        timeout = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(recipe.sync.timeout_seconds)}
        with ray_session(self._address), environment(timeout):
            if self._address == "auto":
                say(f"joined the Ray cluster at {ray.get_runtime_context().gcs_address}")
            share = _allocate(cluster_nodes(recipe.workers, recipe.resources), recipe)
            _report_allocation(recipe, share, say)
            kind = TorchTrainer if self._address else _OwnClusterTrainer
            yield lambda: RayWorkers(_trainer(recipe, run, share, kind))


def _summary(error: Exception) -> str:
    """Return the error of Ray Train without its stack traces."""
    if isinstance(error, ray.train.WorkerGroupError):
        causes = "; ".join(
            f"worker {rank}: {describe_failure(each)}" for rank, each in sorted(error.worker_failures.items())
        )
        return f"the workers failed more often than max_failures allows; {causes}"
    return f"Ray Train stopped: {error}"


class RayWorkers(threading.Thread):
    """Workers of Ray Train, supervised in a thread, because Ctrl-C is for the main thread.

    Attributes:
        ended: set when they have ended; an interrupted `join` takes a thread for ended (Python 3.11).
        error: why they failed, if they did.
    """

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(daemon=True)
        self.error = ""
        self.ended = threading.Event()
        self._trainer = trainer
        self.start()

    def run(self) -> None:
        """Train; keep an error in `error`."""
        try:
            self._trainer.fit()
        except Exception as error:
            self.error = _summary(error)
        finally:
            self.ended.set()

    def close(self) -> None:
        """Do nothing: they end with the session."""


def _allocate(there: list[Node], recipe: TrainRecipe) -> CpuShare:
    """Return the CPU share of each worker.

    Raises:
        RecipeError: the workers do not fit.
    """
    cpus, source = recipe.resources.cpus, recipe.task.source
    if isinstance(source, ActorSource):
        return allocate_cpus(there, recipe.workers, cpus, source.actors, source.cpus)
    return CpuShare(cpus_per_worker(there, recipe.workers, cpus))


def _report_allocation(recipe: TrainRecipe, share: CpuShare, say: Callable[[str], None]) -> None:
    """Print the allocation of the workers, and whether they have to wait for it."""
    say(f"starting {recipe.workers} worker(s) with {share.cpus:g} CPU each{_actors(recipe.workers, share)}")
    there = ray.available_resources()
    for name, amount in {"CPU": share.total, **recipe.resources.extra_resources()}.items():
        free, wanted = there.get(name, 0.0), recipe.workers * amount
        if wanted > free:
            say(f"the cluster is busy: waiting for {wanted:g} {name}, of which {free:g} is free")


def _actors(workers: int, share: CpuShare) -> str:
    """Return the allocation of data actors, for a message."""
    if not share.actors:
        return ""
    theirs = f" with {share.actor_cpus:g} CPU each" if share.actor_cpus else ", which share them"
    return f", and {workers * share.actors} actor(s) that prepare data{theirs}"


class _OwnClusterTrainer(TorchTrainer):
    """A trainer without Ray's placement-group cleaner, for a cluster that ends with this process.

    The cleaner would ask the dashboard, which does not run, and prints a stack trace at the end of a short run.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


def _trainer(
    recipe: TrainRecipe, run_directory: RunDirectory, share: CpuShare, kind: type[TorchTrainer]
) -> TorchTrainer:
    resources, timeout_seconds = recipe.resources, recipe.sync.timeout_seconds
    # What an earlier command left would make Ray believe in checkpoints that are gone; ours are found on the disk.
    (run_directory.checkpoints / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    return kind(
        _worker,
        train_loop_config={
            "recipe": recipe.to_dict(),
            "run": str(run_directory.path),
            "threads": max(1, int(share.cpus)),
            "actors": share.actors,
            "actor_cpus": share.actor_cpus,
            "import_from": os.getcwd(),
            "objects": dump_objects(recipe),
            "code": fingerprint(),
        },
        torch_config=GroupConfig(
            backend="cpu:gloo,cuda:nccl" if resources.gpus else "gloo",
            timeout_s=max(1, round(timeout_seconds)),
            secret=secrets.token_hex(16),
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=recipe.workers,
            use_gpu=bool(resources.gpus),
            resources_per_worker={"CPU": share.cpus, **recipe.resources.extra_resources()},
            label_selector=resources.labels or None,
            placement_strategy=resources.placement,
        ),
        run_config=ray.train.RunConfig(
            name=run_directory.checkpoints.name,
            storage_path=str(run_directory.path),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
            failure_config=ray.train.FailureConfig(max_failures=recipe.max_failures),
            callbacks=[RestartLog(str(run_directory.path))],
        ),
    )


def _worker(config: dict[str, Any]) -> None:
    """Train as one of Ray Train's workers."""
    rank, members = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    run_directory = RunDirectory(Path(config["run"]))
    logging.getLogger().setLevel(logging.WARNING)
    try:
        if config["code"] != fingerprint():
            raise RecipeError(
                f"raytrain at {Path(raytrain.__file__).parent} on worker {rank} is not the raytrain of the command; "
                "install the same version on every machine"
            )
        sys.path.append(config["import_from"])
        load_objects(config["objects"])
        recipe = TrainRecipe.parse(config["recipe"])
        torch.set_num_threads(config["threads"])
        device = get_device() if recipe.resources.gpus else torch.device("cpu")
        timeout_seconds = recipe.sync.timeout_seconds
        transport = GroupTransport(device, timeout_seconds) if members > 1 else LocalTransport(device)
    except RaytrainError as error:
        if not run_directory.record_failure(error, rank):
            raise
        return
    make_loader = _loader_factory(config["actors"], config["actor_cpus"], recipe.max_failures)
    last = run_watched_worker(recipe, run_directory, transport, make_loader)
    if last:  # only the last one: Ray takes one report in each poll, which is slower than checkpoints are written
        path, metrics = last
        ray.train.report(
            dict(metrics),
            checkpoint=ray.train.Checkpoint(str(path)) if rank == 0 else None,
            checkpoint_dir_name=path.name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )


def _loader_factory(actors: int, cpus: float, restarts: int) -> LoaderFactory:
    if not actors:
        return local_loader
    from raytrain.launch.ingest import ray_loader  # noqa: PLC0415 - slow to import

    return partial(ray_loader, actors=actors, cpus=cpus, restarts=restarts)


class RestartLog(ray.train.UserCallback):
    """Logs the causes of restarts, in the supervising process."""

    def __init__(self, path: str) -> None:
        self._run = RunDirectory(Path(path))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Add a line to `restarts.jsonl`."""
        causes = {}
        for rank, error in worker_exceptions.items():
            if stack := kept_stack(self._run.path, rank):
                causes[str(rank)] = f"it hung, and was ended{host_suffix(_host(error))}; its stack is in {stack}"
            else:
                causes[str(rank)] = describe_failure(error)
        self._run.append(self._run.restarts, {"time": time.time(), "workers": causes})


def describe_failure(error: Exception) -> str:
    """Return a short description of a worker's failure, with its host unless it is this machine."""
    text = str(error).strip()
    what = text.splitlines()[-1] if text else type(error).__name__
    if "PeerLostError" in text:
        what = "it lost another worker"
    elif silent := re.search(r"health check has been hanging for (\d+)", text):
        what = f"it did not answer for {silent[1]} s: stopped (SIGSTOP) or swapped out, or its machine is too busy"
    elif "has died" in text or "died unexpectedly" in text:
        what = "its process died: killed, out of memory, or crashed"
    return what + host_suffix(_host(error))


def _host(error: Exception) -> str:
    """Return the host of a failed worker, which only the text of Ray Train's error tells."""
    found = re.search(r"hostname='([^']+)'", str(error))
    return found[1] if found else ""
