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

import torch

from raytrain.bits import digest_of
from raytrain.checkpoint import CheckpointStore, Manifest, load, reading
from raytrain.data.feed import Feeds, Walk, local_feed
from raytrain.errors import RecipeError
from raytrain.evaluation import evaluate
from raytrain.extensions import CALLBACK
from raytrain.loggers import logger_class
from raytrain.loop import Plan, train
from raytrain.model.adapters import adapt
from raytrain.model.blocks import compile_blocks, recompute
from raytrain.model.freezing import Half, freeze
from raytrain.names import resolve
from raytrain.optim.ema import average_of
from raytrain.optim.optimizers import make_optimizer
from raytrain.optim.options import ALL
from raytrain.optim.schedules import SCHEDULES, SHAPE, rate
from raytrain.optim.zeroth import ZerothOrder, space_of
from raytrain.recipe import read_toml
from raytrain.replica import Progress, Replica, load_state, progress_from
from raytrain.retrace import beginning
from raytrain.rundir import RunDirectory
from raytrain.seeds.probe import Probe
from raytrain.seeds.trajectory import Trajectory
from raytrain.sync.exchange import ExactExchange, Exchange
from raytrain.sync.numbers import Numbers
from raytrain.sync.options import NUMBERS, SYNCHRONISERS
from raytrain.sync.sharded import ShardedGradients
from raytrain.sync.transport import PeerLostError, Transport
from raytrain.task import TASKS, Task, make_task
from raytrain.train_recipe import TrainRecipe
from raytrain.watch import RunWatch, constants_of
from raytrain.watchdog import Watchdog, hang_file
from raytrain.zeroth import Zeroth

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
    if isinstance(replica.optimizer, ZerothOrder):
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
    about = beginning(zeroth.probe.space, replica.module, recipe.optimizer, recipe.directions.model_dump())
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


def plan_of(recipe: TrainRecipe) -> Plan:
    """Return what the loop needs to know of a recipe."""
    schedule = recipe.schedule
    shape = SHAPE.load(SCHEDULES, schedule.name)
    return Plan(
        steps=recipe.steps,
        seed=recipe.seed,
        batch=recipe.batch,
        accumulate=recipe.accumulate,
        clip=recipe.clip,
        noise=recipe.optimizer.gradient_noise,
        noise_decay=recipe.optimizer.gradient_noise_decay,
        autocast=torch.bfloat16 if recipe.precision == "bfloat16" else None,
        rate=partial(
            rate, shape, steps=recipe.steps, warmup=schedule.warmup, floor=schedule.floor, decay=schedule.decay
        ),
        evaluate_every=recipe.evaluation.every,
        checkpoint_every=recipe.checkpoint.every,
        patience=recipe.evaluation.patience,
    )


def task_of(recipe: TrainRecipe) -> Task:
    """Return the recipe's task."""
    return make_task(resolve(TASKS, recipe.task.name, "task.name"), recipe.task)


def callbacks_of(recipe: TrainRecipe) -> list[Callable[[Replica], None]]:
    """Return what is called after every step.

    Raises:
        RecipeError: it cannot be imported, or called so.
    """
    return [CALLBACK.load({}, name) for name in recipe.callbacks]


def settled(recipe: TrainRecipe, run: RunDirectory) -> tuple[TrainRecipe, Task]:
    """Return the recipe with the options that its training data decides, and its task.

    What the run has decided before holds, whatever became of the data since.

    Raises:
        RecipeError: the task cannot be made, its data does not fit, or what is called later is not what it should be.
    """
    for name in recipe.log.to:
        logger_class(name)
    callbacks_of(recipe)
    plan_of(recipe)
    task = task_of(recipe)
    found = task.settle()
    if not found:
        return recipe, task
    before = read_toml(str(run.path), [])[0]["task"] if run.recipe.is_file() else {}
    settled = recipe.with_overrides({f"task.{name}": before.get(name) or value for name, value in found.items()})
    return settled, task_of(settled)


def build(
    recipe: TrainRecipe, task: Task, exchange: Exchange, *, start: bool = True, beat: Callable[[], None] = lambda: None
) -> Replica:
    """Return a replica of what the recipe trains, as it starts.

    Args:
        recipe: what to train.
        task: the recipe's.
        exchange: with the other replicas.
        start: whether the task puts what the training data says into the model; for what is then read from a
            checkpoint there is no need to look at data.
        beat: called at every sign of progress.

    Raises:
        RecipeError: the recipe does not fit the model.
    """
    transport = exchange.transport
    module = task.model(recipe.seed)
    if task.start and start:
        watched = module.register_forward_hook(lambda *_: beat())  # it may look at all of the data
        task.start(module if getattr(recipe.sync, "shard", False) else module.to(transport.device), recipe.seed)
        watched.remove()
        module.cpu()  # where what is drawn from here on is drawn
    if recipe.precision == "float64":
        module.double()
    dtype = next(module.parameters()).dtype
    freeze(module, recipe.freeze.match)
    elsewhere = adapt(module, recipe.adapter, recipe.seed)
    base = digest_of((name, module.get_parameter(name)) for name in elsewhere)
    sync = resolve(SYNCHRONISERS | NUMBERS, recipe.sync.name, "sync.name")(exchange, recipe.sync)
    if recipe.compile:
        compile_blocks(module, recipe.compile, transport.device)
    if recipe.activation_checkpointing:
        recompute(module)
    shards = sync.shard(module, plan_of(recipe).autocast) if isinstance(sync, ShardedGradients) else None
    parts = shards.parts if shards else module.to(transport.device)
    optimizer = make_optimizer(resolve(ALL, recipe.optimizer.name, "optimizer.name"), recipe.optimizer, parts)
    return Replica(
        module=module.train(),
        elsewhere=elsewhere,
        base=base,
        half=Half(module, recipe.seed, recipe.freeze.every) if recipe.freeze.half else None,
        optimizer=optimizer,
        options=recipe.optimizer,
        ema=average_of(parts, optimizer, recipe.ema),
        sync=sync,
        progress=Progress(),
        device=transport.device,
        dtype=dtype,
        rank=transport.rank,
        members=len(transport.members),
        shards=shards,
    )


def zeroth_of(replica: Replica, optimizer: ZerothOrder, recipe: TrainRecipe, *, weighted: bool) -> Zeroth:
    """Return how a zeroth-order optimizer probes a model that has its first weights.

    Args:
        replica: with the model.
        optimizer: of its parameters.
        recipe: the run's.
        weighted: whether losses have weights.

    Raises:
        RecipeError: what the recipe says of directions does not fit the model.
    """
    module, options = replica.module, recipe.directions
    if not isinstance(replica.sync, Numbers):  # the recipe sees to that
        raise TypeError(type(replica.sync))
    space = space_of(
        module,
        optimizer,
        mode=options.mode,
        sparsity=options.sparsity,
        blocks=options.blocks,
        first_order=options.first_order,
    )
    moved = {part.tensor.data_ptr() for part in space.parts}
    narrow = {str(part.tensor.dtype).removeprefix("torch.") for part in space.parts if part.tensor.itemsize < 4}
    if narrow and replica.rank == 0:
        logger.warning(
            "parameters in %s lose each move below half of their last place, as most moves without gradients are and "
            "some of each probe; in float32 they keep them "
            '(task.dtype = "float32"), and precision = "bfloat16" computes as before',
            " and ".join(sorted(narrow)),
        )
    optimizer.shape(space)
    return Zeroth(
        probe=Probe(module, space),
        optimizer=optimizer,
        sync=replica.sync,
        count=options.count,
        eps=options.eps,
        sides=options.sides,
        training=options.training,
        objective=options.objective,
        outlier=options.outlier,
        weighted=weighted,
        first_order=[one for one in module.parameters() if one.requires_grad and one.data_ptr() not in moved],
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
