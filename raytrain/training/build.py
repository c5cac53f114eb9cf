"""Builds what trains: the task, the replica, its optimizer and its synchroniser."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from raytrain.extensions import CALLBACK
from raytrain.models.adapters import adapt
from raytrain.models.blocks import compile_blocks, recompute
from raytrain.models.freezing import Half, freeze
from raytrain.optim.ema import average_of
from raytrain.optim.optimizers import make_optimizer
from raytrain.optim.options import ALL
from raytrain.optim.schedules import SCHEDULES, SHAPE, rate
from raytrain.recipe import read_toml
from raytrain.registry import resolve
from raytrain.run.directory import RunDirectory
from raytrain.run.loggers import logger_class
from raytrain.sync.averaging import Exchange
from raytrain.sync.fsdp import ShardedGradients
from raytrain.sync.options import ALL_SYNCHRONISERS, FsdpOptions
from raytrain.sync.scalars import Numbers
from raytrain.tasks.task import TASKS, Task, make_task
from raytrain.tensors import digest_of
from raytrain.training.loop import Plan
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import Progress, Replica
from raytrain.zeroth.optimizers import ZerothOrder, space_of
from raytrain.zeroth.perturbed import Probe
from raytrain.zeroth.step import Zeroth

logger = logging.getLogger(__name__)


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
            rate,
            shape,
            steps=recipe.steps,
            warmup=schedule.warmup,
            floor=schedule.min_lr_ratio,
            decay=schedule.decay_ratio,
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

    Raises:
        RecipeError: the task cannot be made, its data does not fit, or what is called later is not what it should be.
    """
    for name in recipe.log.loggers:
        logger_class(name)
    callbacks_of(recipe)
    plan_of(recipe)
    task = task_of(recipe)
    changes = options_from_data(task, run)
    if not changes:
        return recipe, task
    settled = recipe.with_overrides(changes)
    return settled, task_of(settled)


def options_from_data(task: Task, run: RunDirectory) -> dict[str, Any]:
    """Return the options of a task that its training data decides, as changes of a recipe.

    What the run has decided before holds, whatever became of the data since.
    """
    found = task.settle()
    before = read_toml(str(run.path), [])[0]["task"] if found and run.recipe.is_file() else {}
    return {f"task.{name}": before.get(name) or value for name, value in found.items()}


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
        task.start(module if isinstance(recipe.sync, FsdpOptions) else module.to(transport.device), recipe.seed)
        watched.remove()
        module.cpu()  # where what is drawn from here on is drawn
    if recipe.precision == "float64":
        module.double()
    dtype = next(module.parameters()).dtype
    freeze(module, recipe.freeze.match)
    elsewhere = adapt(module, recipe.adapter, recipe.seed)
    base = digest_of((name, module.get_parameter(name)) for name in elsewhere)
    sync = resolve(ALL_SYNCHRONISERS, recipe.sync.name, "sync.name")(exchange, recipe.sync)
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
        half=Half(module, recipe.seed, recipe.freeze.every) if recipe.freeze.random_half else None,
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


def trainable(
    recipe: TrainRecipe, task: Task, exchange: Exchange, *, new: bool, beat: Callable[[], None] = lambda: None
) -> Replica:
    """Return a replica that is ready to train, as it starts or for a state to be put into it.

    Args:
        recipe: what to train.
        task: the recipe's.
        exchange: with the other replicas.
        new: whether it starts; otherwise its first weights are made only where its mask goes by them.
        beat: called at every sign of progress.

    Raises:
        RecipeError: the recipe does not fit the model.
    """
    sparse = recipe.zo.sparsity > 0
    replica = build(recipe, task, exchange, start=new or sparse, beat=beat)
    if isinstance(replica.optimizer, ZerothOrder):
        if sparse:
            replica.sync.start(replica.module)  # a mask goes by the weights, to the bit: those of the first worker
        replica.zeroth = zeroth_of(replica, replica.optimizer, recipe, weighted=task.weights is not None)
    return replica


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
    module, options = replica.module, recipe.zo
    if not isinstance(replica.sync, Numbers):  # the recipe sees to that
        raise TypeError(type(replica.sync))
    space = space_of(
        module,
        optimizer,
        mode=options.distribution,
        sparsity=options.sparsity,
        blocks=options.blockwise,
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
        count=options.num_perturbations,
        eps=options.eps,
        sides={"forward": 1, "central": 2}[options.estimator],
        training=options.train_mode,
        objective=options.objective,
        outlier=options.outlier_threshold,
        weighted=weighted,
        first_order=[one for one in module.parameters() if one.requires_grad and one.data_ptr() not in moved],
    )
