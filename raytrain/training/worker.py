"""A worker, from the recipe to the last checkpoint, without Ray: tests run workers as threads."""

import json
import logging
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from raytrain.errors import RecipeError
from raytrain.run.checkpoint import CheckpointStore, Manifest, checkpoint_errors, load_part
from raytrain.run.directory import RunDirectory
from raytrain.run.watchdog import Watchdog, hang_file
from raytrain.sync.averaging import Averager, ExactAverager
from raytrain.sync.transport import PeerLostError, Transport
from raytrain.training.build import build_replica, build_zero_order, load_callbacks, loop_config, resolve_recipe
from raytrain.training.callbacks import RunCallbacks, non_finite_buffers
from raytrain.training.evaluation import evaluate
from raytrain.training.loader import LoaderFactory, StepRange, local_loader
from raytrain.training.loop import LoopConfig, train
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import Replica, load_state, progress_from_dict
from raytrain.zeroth.optimizers import ZerothOrder
from raytrain.zeroth.replay import beginning
from raytrain.zeroth.trajectory import Trajectory

logger = logging.getLogger(__name__)

LOCK_WAIT_SECONDS = 120.0  # NFS keeps the locks of a machine that died for the 90 s of its lease
SHARED_WAIT_SECONDS = 10.0
FAILURE_WAIT_SECONDS = 2.0


class NotSharedError(RecipeError):
    """A worker does not see the run's folder; all workers raise this, and the first one records it."""


LastCheckpoint = tuple[Path, Mapping[str, float]] | None
"""Path and metrics of the newest checkpoint."""


def run_worker(
    recipe: TrainRecipe,
    run: RunDirectory,
    transport: Transport,
    heartbeat: Callable[[], None],
    make_loader: LoaderFactory = local_loader,
) -> LastCheckpoint:
    """Train as one of the workers, from the newest complete checkpoint of the run.

    An error that a restart would only repeat is recorded in the run's folder, where the supervisor reads it, and the
    function returns; so do the workers that lose a peer by it. A worker that cannot see the folder raises its error.

    Args:
        recipe: to train.
        run: folder of the run, which all workers see.
        transport: to the other workers.
        heartbeat: called at every sign of progress.
        make_loader: creates the batch loader.

    Returns:
        The last checkpoint, on every worker, if all of them completed.

    Raises:
        PeerLostError: another worker died or hung; a restart may help.
    """
    try:
        with run.locked("worker", LOCK_WAIT_SECONDS) if transport.rank == 0 else nullcontext():
            averager = ExactAverager(transport)
            last = _train(recipe, run, averager, heartbeat, make_loader)
            averager.all_gather_bytes(b"")  # all have completed
            return last
    except PeerLostError:
        if run.failure(FAILURE_WAIT_SECONDS) is None:
            raise
    except (Exception, SystemExit) as error:  # in the user's code or ours: a restart would repeat it
        if not run.record_failure(error, transport.rank) and not isinstance(error, NotSharedError):
            raise
    finally:
        transport.close()
    return None


def run_watched_worker(
    recipe: TrainRecipe, run: RunDirectory, transport: Transport, make_loader: LoaderFactory = local_loader
) -> LastCheckpoint:
    """Run `run_worker` under a watchdog, which ends the process if it hangs.

    Raises:
        PeerLostError: as `run_worker`.
    """
    seen = run.path if run.path.is_dir() else Path(tempfile.gettempdir())
    file = hang_file(seen, transport.rank)
    with Watchdog(file, recipe.sync.timeout_seconds, lambda: transport.is_waiting) as watchdog:
        return run_worker(recipe, run, transport, watchdog.heartbeat, make_loader)


def _train(
    recipe: TrainRecipe,
    run: RunDirectory,
    averager: Averager,
    heartbeat: Callable[[], None],
    make_loader: LoaderFactory,
) -> LastCheckpoint:
    _check_shared(run, averager)
    if averager.all_gather_bytes(b"failed" if run.failure() else b"")[0]:
        return None  # an earlier attempt did, before all of its workers knew
    recipe, task = resolve_recipe(recipe, run)
    store = CheckpointStore(run.checkpoints, recipe.checkpoint.keep, averager)
    store.clean()
    found = store.newest()
    first = found is None or recipe.zo.sparsity > 0  # whose mask is that of the first weights
    replica = build_replica(recipe, task, averager, init_head=first, heartbeat=heartbeat)
    if isinstance(replica.optimizer, ZerothOrder):
        if recipe.zo.sparsity:
            replica.sync.attach(replica.module)  # a mask goes by the weights, to the bit: those of the first worker
        replica.zero_order = build_zero_order(replica, replica.optimizer, recipe, weighted=task.weights is not None)
    if found:
        restore_replica(replica, found)
    heartbeat()  # what comes before the first step reads, imports and compiles, which can take as long as many steps
    _record_attempt(recipe, run, averager, replica.progress.step)
    config = loop_config(recipe)
    measure = partial(
        evaluate,
        task=task,
        examples=task.data("valid"),
        batch=recipe.evaluation.batch,
        averager=averager,
        autocast=config.autocast,
    )
    callbacks = RunCallbacks(
        run=run,
        averager=averager,
        store=store,
        measure=partial(measure, heartbeat=heartbeat),
        callbacks=load_callbacks(recipe),
        log_every=recipe.log.every,
        heartbeat=heartbeat,
        non_finite=non_finite_buffers(replica.module),
    )
    with (
        make_loader(task, recipe.task, _step_range(replica, config)) as loader,
        callbacks.recording(replica.progress, recipe.log.loggers),
        _tracing(recipe, run, replica),
    ):
        train(replica, task, loader, config, callbacks)
    return callbacks.last_checkpoint


@contextmanager
def _tracing(recipe: TrainRecipe, run: RunDirectory, replica: Replica) -> Iterator[None]:
    """Record the trajectory inside the `with` block, on the first worker, if it is enabled."""
    zeroth, step = replica.zero_order, replica.progress.step
    if zeroth is None or replica.rank > 0 or not recipe.zo.trajectory:
        yield
        return
    about = beginning(zeroth.probe.space, replica.module, recipe.optimizer, recipe.zo.model_dump())
    with Trajectory(run.trajectory, about, step) as zeroth.trajectory:
        yield


def _step_range(replica: Replica, config: LoopConfig) -> StepRange:
    """Return the steps that this replica will load."""
    return StepRange(
        seed=config.seed,
        rank=replica.rank,
        first_position=replica.progress.position + replica.rank * config.local_batch,
        stride=replica.world_size * config.local_batch,
        steps=max(0, config.steps - replica.progress.step),
        local_batch=config.local_batch,
        accumulate=config.accumulate,
    )


def restore_replica(replica: Replica, manifest: Manifest) -> None:
    """Load a checkpoint into a new replica.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    shared = load_part(manifest.path, 0)
    own = load_part(manifest.path, replica.rank) if manifest.world_size == replica.world_size else None
    with checkpoint_errors(manifest.path):
        load_state(replica, shared, own, manifest.path)
    replica.progress = progress_from_dict(manifest.progress, manifest.path)


def _check_shared(run: RunDirectory, averager: Averager) -> None:
    """Check that all workers see the run's folder, which on several machines needs a shared file system.

    Raises:
        NotSharedError: a worker does not see it.
    """
    rank = averager.transport.rank
    token = run.path / f".token-{uuid.uuid4().hex}"
    if rank == 0:
        token.touch()
    token = run.path / averager.all_gather_bytes(token.name.encode())[0].decode()
    give_up = time.monotonic() + SHARED_WAIT_SECONDS
    while not token.exists() and time.monotonic() < give_up:
        time.sleep(0.1)
    blind = [
        answer.decode()
        for answer in averager.all_gather_bytes(b"" if token.exists() else socket.gethostname().encode())
        if answer
    ]
    if rank == 0:
        token.unlink()
    if blind:
        raise NotSharedError(
            f"--out: {run.path} is not the same folder on {', '.join(blind)} as for worker 0; on more than one machine "
            "it must be on a file system that they share (for a job, name one with raytrain submit --storage)"
        )


def _record_attempt(recipe: TrainRecipe, run: RunDirectory, averager: Averager, step: int) -> None:
    """Record processes, first step and recipe of this attempt, now that the recipe is known to fit."""
    mine = {"pid": os.getpid(), "host": socket.gethostname()}
    workers = [json.loads(answer) for answer in averager.all_gather_bytes(json.dumps(mine).encode())]
    if averager.transport.rank == 0:
        run.record_attempt(recipe.to_toml(), step, workers)
