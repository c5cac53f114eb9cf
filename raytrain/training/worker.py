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
from raytrain.tasks.task import Task
from raytrain.tensors import autocast_type
from raytrain.training.build import build_task, load_callbacks, resolve_recipe, trainable
from raytrain.training.callbacks import RunCallbacks, non_finite_buffers
from raytrain.training.evaluation import evaluate
from raytrain.training.loader import LoaderFactory, local_loader
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import Replica, inherit, load_state, progress_from_dict
from raytrain.training.segment import segment
from raytrain.zeroth.replay import trajectory_header
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
    last: LastCheckpoint = None
    announced = False
    for stage in recipe.stages_from(found.step if found else 0):
        found = store.newest() if last else found
        task = task if stage.recipe.task == recipe.task else build_task(stage.recipe)
        replica = trainable(stage.recipe, task, averager, new=found is None, heartbeat=heartbeat)
        if found:
            begins = partial(inherit, reset_optimizer=stage.reset_optimizer)
            restore_replica(replica, found, begins if found.step == stage.begin > 0 else load_state)
        heartbeat()  # preparation reads, imports and compiles, which can take as long as many steps
        if not announced:
            _record_attempt(recipe, run, averager, replica.progress.step)
            announced = True
        watch = _watch(stage.recipe, task, replica, run, store, heartbeat)
        recording = _recording(stage.recipe, run, replica, watch)
        segment(stage.recipe, task, replica, stage.end, watch, make_loader=make_loader, recording=recording)
        last = watch.last_checkpoint
        if replica.progress.status != "done":
            break
    return last


def _watch(
    recipe: TrainRecipe,
    task: Task,
    replica: Replica,
    run: RunDirectory,
    store: CheckpointStore,
    heartbeat: Callable[[], None],
) -> RunCallbacks:
    """Return what surrounds the loop."""
    averager = store.averager
    measure = partial(
        evaluate,
        task=task,
        examples=task.data("valid"),
        batch=recipe.evaluation.batch,
        averager=averager,
        autocast=autocast_type(recipe.precision),
    )
    return RunCallbacks(
        run=run,
        averager=averager,
        store=store,
        measure=partial(measure, heartbeat=heartbeat),
        callbacks=load_callbacks(recipe),
        log_every=recipe.log.every,
        heartbeat=heartbeat,
        non_finite=non_finite_buffers(replica.module),
    )


@contextmanager
def _recording(recipe: TrainRecipe, run: RunDirectory, replica: Replica, watch: RunCallbacks) -> Iterator[None]:
    """Record a run inside the `with` block: rows, and the trajectory."""
    with watch.recording(replica.progress, recipe.log.loggers), _tracing(recipe, run, replica):
        yield


@contextmanager
def _tracing(recipe: TrainRecipe, run: RunDirectory, replica: Replica) -> Iterator[None]:
    """Record the trajectory inside the `with` block, on the first worker, if it is enabled."""
    zeroth, step = replica.zero_order, replica.progress.step
    if zeroth is None or replica.rank > 0 or not recipe.zo.trajectory:
        yield
        return
    about = trajectory_header(zeroth.model.directions, replica.module, recipe.optimizer, recipe.zo.model_dump())
    with Trajectory(run.trajectory, about, step) as zeroth.trajectory:
        yield


def restore_replica(replica: Replica, manifest: Manifest, put: Callable[..., object] = load_state) -> None:
    """Put a checkpoint into a new replica.

    Args:
        replica: newly made.
        manifest: the checkpoint.
        put: `load_state`, or `inherit` where a phase begins.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    shared = load_part(manifest.path, 0)
    own = load_part(manifest.path, replica.rank) if manifest.world_size == replica.world_size else None
    with checkpoint_errors(manifest.path):
        put(replica, shared, own, manifest.path)
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
