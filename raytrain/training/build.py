"""Builds what trains: the task, the replica, its optimizer and its synchroniser."""

import logging
from collections.abc import Callable
from functools import partial

import torch

from raytrain.extensions import CALLBACK
from raytrain.models.adapters import inject_adapter
from raytrain.models.blocks import checkpoint_activations, compile_blocks
from raytrain.models.freezing import HalfFineTuning, freeze
from raytrain.optim.ema import make_average
from raytrain.optim.optimizers import make_optimizer
from raytrain.optim.options import ALL_OPTIMIZERS
from raytrain.optim.schedules import SCHEDULE, SCHEDULES, lr_factor
from raytrain.recipe import read_toml
from raytrain.registry import resolve
from raytrain.run.directory import RunDirectory
from raytrain.run.loggers import logger_class
from raytrain.sync.averaging import Exchange
from raytrain.sync.fsdp import ShardedGradients
from raytrain.sync.options import NUMBERS, SYNCHRONISERS
from raytrain.sync.scalars import Numbers
from raytrain.tasks.task import TASKS, Task, make_task
from raytrain.tensors import tensor_digest
from raytrain.training.loop import Plan
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import Progress, Replica
from raytrain.zeroth.optimizers import ZerothOrderOptimizer, directions_of
from raytrain.zeroth.perturbed import PerturbedModel
from raytrain.zeroth.step import ZeroOrderStep

logger = logging.getLogger(__name__)


def plan_of(recipe: TrainRecipe) -> Plan:
    """Return what the loop needs to know of a recipe."""
    schedule = recipe.schedule
    shape = SCHEDULE.load(SCHEDULES, schedule.name)
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
            lr_factor,
            shape,
            steps=recipe.steps,
            warmup=schedule.warmup,
            min_lr_ratio=schedule.floor,
            decay_ratio=schedule.decay,
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
    found = task.infer_options()
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
    if task.init_head and start:
        watched = module.register_forward_hook(lambda *_: beat())  # it may look at all of the data
        task.init_head(module if getattr(recipe.sync, "shard", False) else module.to(transport.device), recipe.seed)
        watched.remove()
        module.cpu()  # where what is drawn from here on is drawn
    if recipe.precision == "float64":
        module.double()
    dtype = next(module.parameters()).dtype
    freeze(module, recipe.freeze.match)
    elsewhere = inject_adapter(module, recipe.adapter, recipe.seed)
    base = tensor_digest((name, module.get_parameter(name)) for name in elsewhere)
    sync = resolve(SYNCHRONISERS | NUMBERS, recipe.sync.name, "sync.name")(exchange, recipe.sync)
    if recipe.compile:
        compile_blocks(module, recipe.compile, transport.device)
    if recipe.activation_checkpointing:
        checkpoint_activations(module)
    shards = sync.shard(module, plan_of(recipe).autocast) if isinstance(sync, ShardedGradients) else None
    parts = shards.parts if shards else module.to(transport.device)
    optimizer = make_optimizer(
        resolve(ALL_OPTIMIZERS, recipe.optimizer.name, "optimizer.name"), recipe.optimizer, parts
    )
    return Replica(
        module=module.train(),
        elsewhere=elsewhere,
        base=base,
        half=HalfFineTuning(module, recipe.seed, recipe.freeze.every) if recipe.freeze.half else None,
        optimizer=optimizer,
        options=recipe.optimizer,
        ema=make_average(parts, optimizer, recipe.ema),
        sync=sync,
        progress=Progress(),
        device=transport.device,
        dtype=dtype,
        rank=transport.rank,
        members=len(transport.members),
        shards=shards,
    )


def zeroth_of(
    replica: Replica, optimizer: ZerothOrderOptimizer, recipe: TrainRecipe, *, weighted: bool
) -> ZeroOrderStep:
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
    directions = directions_of(
        module,
        optimizer,
        distribution=options.mode,
        sparsity=options.sparsity,
        blockwise=options.blocks,
        first_order=options.first_order,
    )
    perturbed = {part.tensor.data_ptr() for part in directions.slices}
    narrow = {str(part.tensor.dtype).removeprefix("torch.") for part in directions.slices if part.tensor.itemsize < 4}
    if narrow and replica.rank == 0:
        logger.warning(
            "parameters in %s are too coarse for zeroth-order training: updates and perturbations below half a unit in "
            'the last place are rounded away; use float32 parameters (task.dtype = "float32"), with '
            'precision = "bfloat16" to compute as before',
            " and ".join(sorted(narrow)),
        )
    optimizer.bind(directions)
    return ZeroOrderStep(
        model=PerturbedModel(module, directions),
        optimizer=optimizer,
        sync=replica.sync,
        num_perturbations=options.count,
        eps=options.eps,
        estimator="central" if options.sides == 2 else "forward",
        train_mode=options.training,
        objective=options.objective,
        outlier_threshold=options.outlier,
        weighted=weighted,
        first_order=[one for one in module.parameters() if one.requires_grad and one.data_ptr() not in perturbed],
    )
