"""What one worker does, from the recipe to the last checkpoint. It knows no Ray: threads in a test do the same."""

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from raytrain.checkpoint import CheckpointStore, Manifest, load
from raytrain.ema import Ema
from raytrain.errors import RecipeError
from raytrain.evaluation import evaluate
from raytrain.loop import train
from raytrain.names import resolve
from raytrain.optimizers import OPTIMIZERS, make_optimizer
from raytrain.replica import Progress, Replica, load_state
from raytrain.rundir import RunDirectory
from raytrain.sync.exchange import ExactExchange, Exchange
from raytrain.sync.synchroniser import SYNCHRONISERS
from raytrain.sync.transport import PeerLostError, Transport
from raytrain.task import TASKS, Task, make_task
from raytrain.train_recipe import LOGGERS, TrainRecipe
from raytrain.watch import RunWatch

LOCK_WAIT_SECONDS = 30.0
SHARED_WAIT_SECONDS = 10.0
FAILURE_WAIT_SECONDS = 2.0

Last = tuple[Path, Mapping[str, float]] | None
"""The newest checkpoint that was written, and its metrics."""


def work(recipe: TrainRecipe, run: RunDirectory, transport: Transport, beat: Callable[[], None]) -> Last:
    """Train as one of the workers, from the newest complete checkpoint of the run if there is one.

    An error that starting again would only repeat is left in the run's folder, and the function returns: whoever
    started the workers looks there. So do workers that lost a peer, who would otherwise wait for it.

    Args:
        recipe: what to train.
        run: where; all workers see this folder.
        transport: the other workers.
        beat: called at every sign of progress.

    Returns:
        The last checkpoint, on every worker, if all of them came to the end.

    Raises:
        PeerLostError: another worker died or hung; starting the workers again may help.
    """
    try:
        with run.locked("worker", LOCK_WAIT_SECONDS) if transport.rank == 0 else nullcontext():
            exchange = ExactExchange(transport)
            last = _train(recipe, run, exchange, beat)
            exchange.gather(b"")  # all came to the end
            return last
    except PeerLostError:
        if run.failure(FAILURE_WAIT_SECONDS) is None:
            raise
    except (Exception, SystemExit) as error:  # the user's code or ours: it would happen again
        run.record_failure(error, transport.rank)
    finally:
        transport.close()
    return None


def _train(recipe: TrainRecipe, run: RunDirectory, exchange: Exchange, beat: Callable[[], None]) -> Last:
    _check_shared(run, exchange)
    if exchange.gather(b"failed" if run.failure() else b"")[0]:
        return None  # an earlier attempt did, before all of its workers knew
    task = task_of(recipe)
    replica = build(recipe, task, exchange)
    store = CheckpointStore(run.checkpoints, recipe.checkpoint.keep, exchange)
    store.clean()
    if found := store.newest():
        restore(replica, found)
    _announce(recipe, run, exchange, replica.progress.step)
    plan = recipe.plan()
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
        callbacks=[resolve({}, name, "callbacks") for name in recipe.callbacks],
        log_every=recipe.log.every,
        beat=beat,
    )
    examples = task.data("train")
    if len(examples) == 0:
        raise RecipeError(f"task.name: {recipe.task.name} has no examples to train on: Task.data('train') is empty")
    with watch.recording(replica.progress, [resolve(LOGGERS, name, "log.to") for name in recipe.log.to]):
        train(replica, task, examples, plan, watch)
    return watch.last


def task_of(recipe: TrainRecipe) -> Task:
    """Return the recipe's task."""
    return make_task(resolve(TASKS, recipe.task.name, "task.name"), recipe.task)


def build(recipe: TrainRecipe, task: Task, exchange: Exchange) -> Replica:
    """Return a new replica of what the recipe trains."""
    transport = exchange.transport
    dtype = torch.float64 if recipe.precision == "float64" else torch.float32
    module = task.model(recipe.seed).to(transport.device, dtype)
    optimizer = make_optimizer(resolve(OPTIMIZERS, recipe.optimizer.name, "optimizer.name"), recipe.optimizer, module)
    sync = resolve(SYNCHRONISERS, recipe.sync.name, "sync.name")(exchange, recipe.sync)
    return Replica(
        module=module.train(),
        optimizer=optimizer,
        options=recipe.optimizer,
        ema=Ema(module, recipe.ema) if recipe.ema else None,
        sync=sync,
        progress=Progress(),
        device=transport.device,
        dtype=dtype,
        rank=transport.rank,
        members=len(transport.members),
    )


def restore(replica: Replica, found: Manifest) -> None:
    """Put a checkpoint into a new replica.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    shared = load(found.path, 0)
    own = load(found.path, replica.rank) if found.members == replica.members else None
    load_state(replica, shared, own, found.path)
    replica.progress = Progress(**found.progress)


def _check_shared(run: RunDirectory, exchange: Exchange) -> None:
    """Check that all workers see the run's folder, which on several machines takes a shared file system.

    Raises:
        RecipeError: one of them does not.
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
        raise RecipeError(
            f"--out: {run.path} is not the same folder on {', '.join(blind)} as for worker 0; on more than one machine "
            "it must be on a file system that they share (for a job, name one with raytrain submit --storage)"
        )


def _announce(recipe: TrainRecipe, run: RunDirectory, exchange: Exchange, step: int) -> None:
    """Note which processes train, from which step, and by which recipe: it fits the checkpoint, so the old can go."""
    mine = {"pid": os.getpid(), "host": socket.gethostname()}
    workers = [json.loads(answer) for answer in exchange.gather(json.dumps(mine).encode())]
    if exchange.transport.rank == 0:
        run.write_recipe(recipe.to_toml())
        run.append(run.attempts, {"time": time.time(), "from_step": step, "workers": workers})
