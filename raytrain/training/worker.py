"""What one worker does, from the recipe to the last checkpoint. It knows no Ray: threads in a test do the same."""

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
from raytrain.run.checkpoint import CheckpointStore, Manifest, load, reading
from raytrain.run.directory import RunDirectory
from raytrain.run.watchdog import Watchdog, hang_file
from raytrain.sync.averaging import ExactExchange, Exchange
from raytrain.sync.transport import PeerLostError, Transport
from raytrain.training.build import build, callbacks_of, plan_of, settled, zeroth_of
from raytrain.training.callbacks import RunWatch, constants_of
from raytrain.training.evaluation import evaluate
from raytrain.training.loader import Feeds, Walk, local_feed
from raytrain.training.loop import Plan, train
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import Replica, load_state, progress_from
from raytrain.zeroth.optimizers import ZerothOrderOptimizer
from raytrain.zeroth.replay import trajectory_header
from raytrain.zeroth.trajectory import Trajectory

logger = logging.getLogger(__name__)

LOCK_WAIT_SECONDS = 120.0  # NFS keeps the locks of a machine that died for the 90 s of its lease
SHARED_WAIT_SECONDS = 10.0
FAILURE_WAIT_SECONDS = 2.0


class NotSharedError(RecipeError):
    """A worker does not see the run's folder: all workers know, and the first one leaves word of it."""


Last = tuple[Path, Mapping[str, float]] | None
"""The newest checkpoint that was written, and its metrics."""


def work(
    recipe: TrainRecipe,
    run: RunDirectory,
    transport: Transport,
    beat: Callable[[], None],
    feeds: Feeds = local_feed,
) -> Last:
    """Train as one of the workers, from the newest complete checkpoint of the run if there is one.

    An error that starting again would only repeat is left in the run's folder, and the function returns: whoever
    started the workers looks there. So do workers that lost a peer, who would otherwise wait for it. A worker that
    cannot see the folder raises its error.

    Args:
        recipe: what to train.
        run: where; all workers see this folder.
        transport: the other workers.
        beat: called at every sign of progress.
        feeds: where the examples come from.

    Returns:
        The last checkpoint, on every worker, if all of them came to the end.

    Raises:
        PeerLostError: another worker died or hung; starting the workers again may help.
    """
    try:
        with run.locked("worker", LOCK_WAIT_SECONDS) if transport.rank == 0 else nullcontext():
            exchange = ExactExchange(transport)
            last = _train(recipe, run, exchange, beat, feeds)
            exchange.gather(b"")  # all came to the end
            return last
    except PeerLostError:
        if run.failure(FAILURE_WAIT_SECONDS) is None:
            raise
    except (Exception, SystemExit) as error:  # the user's code or ours: it would happen again
        if not run.record_failure(error, transport.rank) and not isinstance(error, NotSharedError):
            raise
    finally:
        transport.close()
    return None


def work_watched(recipe: TrainRecipe, run: RunDirectory, transport: Transport, feeds: Feeds = local_feed) -> Last:
    """Train as `work` does, in a process of its own that ends if it hangs.

    Raises:
        PeerLostError: as `work`.
    """
    seen = run.path if run.path.is_dir() else Path(tempfile.gettempdir())
    file = hang_file(seen, transport.rank)
    with Watchdog(file, recipe.sync.timeout_seconds, lambda: transport.waiting) as watchdog:
        return work(recipe, run, transport, watchdog.beat, feeds)


def _train(recipe: TrainRecipe, run: RunDirectory, exchange: Exchange, beat: Callable[[], None], feeds: Feeds) -> Last:
    _check_shared(run, exchange)
    if exchange.gather(b"failed" if run.failure() else b"")[0]:
        return None  # an earlier attempt did, before all of its workers knew
    recipe, task = settled(recipe, run)
    store = CheckpointStore(run.checkpoints, recipe.checkpoint.keep, exchange)
    store.clean()
    found = store.newest()
    first = found is None or recipe.directions.sparsity > 0  # whose mask is that of the first weights
    replica = build(recipe, task, exchange, start=first, beat=beat)
    if isinstance(replica.optimizer, ZerothOrderOptimizer):
        if recipe.directions.sparsity:
            replica.sync.start(replica.module)  # a mask goes by the weights, to the bit: those of the first worker
        replica.zeroth = zeroth_of(replica, replica.optimizer, recipe, weighted=task.weights is not None)
    if found:
        restore(replica, found)
    beat()  # what comes before the first step reads, imports and compiles, which can take as long as many steps
    _announce(recipe, run, exchange, replica.progress.step)
    plan = plan_of(recipe)
    measure = partial(
        evaluate,
        task=task,
        examples=task.data("valid"),
        batch=recipe.evaluation.batch,
        exchange=exchange,
        autocast=plan.autocast,
    )
    watch = RunWatch(
        run=run,
        exchange=exchange,
        store=store,
        measure=partial(measure, beat=beat),
        callbacks=callbacks_of(recipe),
        log_every=recipe.log.every,
        beat=beat,
        constants=constants_of(replica.module),
    )
    with (
        feeds(task, recipe.task, _walk(replica, plan)) as feed,
        watch.recording(replica.progress, recipe.log.to),
        _tracing(recipe, run, replica),
    ):
        train(replica, task, feed, plan, watch)
    return watch.last


@contextmanager
def _tracing(recipe: TrainRecipe, run: RunDirectory, replica: Replica) -> Iterator[None]:
    """Keep the run's trajectory inside the `with` block, on the first worker, if there is to be one."""
    zeroth, step = replica.zeroth, replica.progress.step
    if zeroth is None or replica.rank > 0 or not recipe.directions.trajectory:
        yield
        return
    about = trajectory_header(zeroth.model.directions, replica.module, recipe.optimizer, recipe.directions.model_dump())
    with Trajectory(run.trajectory, about, step) as zeroth.trajectory:
        yield


def _walk(replica: Replica, plan: Plan) -> Walk:
    """Return the positions that the loop will take examples from."""
    return Walk(
        seed=plan.seed,
        rank=replica.rank,
        first=replica.progress.position + replica.rank * plan.batch,
        stride=replica.members * plan.batch,
        steps=max(0, plan.steps - replica.progress.step),
        count=plan.batch,
        parts=plan.accumulate,
    )


def restore(replica: Replica, found: Manifest) -> None:
    """Put a checkpoint into a new replica.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    shared = load(found.path, 0)
    own = load(found.path, replica.rank) if found.members == replica.members else None
    with reading(found.path):
        load_state(replica, shared, own, found.path)
    replica.progress = progress_from(found.progress, found.path)


def _check_shared(run: RunDirectory, exchange: Exchange) -> None:
    """Check that all workers see the run's folder, which on several machines takes a shared file system.

    Raises:
        NotSharedError: one of them does not.
    """
    rank = exchange.transport.rank
    token = run.path / f".token-{uuid.uuid4().hex}"
    if rank == 0:
        token.touch()
    token = run.path / exchange.gather(token.name.encode())[0].decode()
    give_up = time.monotonic() + SHARED_WAIT_SECONDS
    while not token.exists() and time.monotonic() < give_up:
        time.sleep(0.1)
    blind = [
        answer.decode()
        for answer in exchange.gather(b"" if token.exists() else socket.gethostname().encode())
        if answer
    ]
    if rank == 0:
        token.unlink()
    if blind:
        raise NotSharedError(
            f"--out: {run.path} is not the same folder on {', '.join(blind)} as for worker 0; on more than one machine "
            "it must be on a file system that they share (for a job, name one with raytrain submit --storage)"
        )


def _announce(recipe: TrainRecipe, run: RunDirectory, exchange: Exchange, step: int) -> None:
    """Note which processes train, from which step, and by which recipe: it fits the checkpoint, so the old can go."""
    mine = {"pid": os.getpid(), "host": socket.gethostname()}
    workers = [json.loads(answer) for answer in exchange.gather(json.dumps(mine).encode())]
    if exchange.transport.rank == 0:
        run.announce(recipe.to_toml(), step, workers)
