"""Builds the task and the replica of a recipe: model, optimizer and synchroniser."""

import logging
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from raytrain.data.source import GeneratorSource
from raytrain.errors import RecipeError
from raytrain.extensions import CALLBACK
from raytrain.models.adapters import inject_adapter
from raytrain.models.blocks import checkpoint_activations, compile_blocks
from raytrain.models.freezing import HalfFineTuning, freeze
from raytrain.optim.ema import make_average
from raytrain.optim.optimizers import make_optimizer
from raytrain.optim.options import ALL_OPTIMIZERS
from raytrain.optim.schedules import SCHEDULE, SCHEDULES
from raytrain.recipe import read_toml
from raytrain.registry import error_location, resolve
from raytrain.run.directory import RunDirectory
from raytrain.run.loggers import logger_class
from raytrain.sync.averaging import Averager
from raytrain.sync.fsdp import ShardedDataParallel
from raytrain.sync.options import ALL_SYNCHRONISERS, FsdpOptions
from raytrain.sync.scalars import ScalarExchange
from raytrain.tasks.task import TASKS, Task, make_task
from raytrain.tensors import autocast_type, tensor_digest
from raytrain.training.recipe import Perturbation, TrainRecipe
from raytrain.training.replica import Progress, Replica
from raytrain.zeroth.optimizers import ZerothOrderOptimizer, directions_of
from raytrain.zeroth.perturbed import PerturbedModel
from raytrain.zeroth.step import ZeroOrderStep

logger = logging.getLogger(__name__)


def build_task(recipe: TrainRecipe) -> Task:
    """Return the task of a recipe."""
    return make_task(resolve(TASKS, recipe.task.name, "task.name"), recipe.task)


def load_callbacks(recipe: TrainRecipe) -> list[Callable[[Replica], None]]:
    """Return the callbacks of a recipe.

    Raises:
        RecipeError: one cannot be imported, or does not take a replica.
    """
    return [CALLBACK.load({}, name) for name in recipe.callbacks]


def resolve_recipe(recipe: TrainRecipe, run: RunDirectory) -> tuple[TrainRecipe, Task]:
    """Return the recipe with the options that the task infers from its training data, and the task.

    Raises:
        RecipeError: the task cannot be built, its data does not fit, or a callback, logger or schedule is wrong.
    """
    for name in recipe.log.loggers:
        logger_class(name)
    load_callbacks(recipe)
    SCHEDULE.load(SCHEDULES, recipe.schedule.name)
    task = build_task(recipe)
    changes = options_from_data(task, run)
    if recipe.epochs:
        changes["steps"] = steps_in_epochs(recipe, task)
    if not changes:
        return recipe, task
    settled = recipe.with_overrides(changes)
    return settled, build_task(settled)


def check_examples(recipe: TrainRecipe, task: Task) -> None:
    """Check that the examples can be read and collated, where workers take long to start.

    Raises:
        RecipeError: they cannot, or there are none to train on.
    """
    generated = isinstance(recipe.task.source, GeneratorSource)
    for split in ("valid",) if generated else ("train", "valid"):
        try:
            examples = task.data(split)  # type: ignore[arg-type]
            if count := len(examples):
                task.collate([examples[0]])
        except RecipeError:
            raise
        except Exception as error:  # in code of the user
            raise RecipeError(
                f"task.name: {recipe.task.name} cannot read the examples of the split {split!r}: "
                f"{type(error).__name__}: {error}{error_location(error)}"
            ) from error
        if not count and split == "train":
            raise RecipeError(f"task.name: {recipe.task.name} has no examples to train on: Task.data('train') is empty")


def steps_in_epochs(recipe: TrainRecipe, task: Task) -> int:
    """Return the optimizer steps in a recipe's epochs, the last one whole.

    Raises:
        RecipeError: the training examples have no number.
    """
    if isinstance(recipe.task.source, GeneratorSource):
        raise RecipeError(f"epochs: {recipe.task.source.name} makes examples without end; set steps instead")
    batch = recipe.workers * recipe.batch * recipe.accumulate
    return max(1, math.ceil(recipe.epochs * len(task.data("train")) / batch))


def options_from_data(task: Task, run: RunDirectory) -> dict[str, Any]:
    """Return the options of a task that its training data decides, as changes of a recipe.

    What the run has decided before holds, whatever became of the data since.
    """
    found = task.infer_options()
    before = read_toml(str(run.path), [])[0]["task"] if found and run.recipe.is_file() else {}
    return {f"task.{name}": before.get(name) or value for name, value in found.items()}


def build_replica(
    recipe: TrainRecipe,
    task: Task,
    averager: Averager,
    *,
    init_head: bool = True,
    heartbeat: Callable[[], None] = lambda: None,
) -> Replica:
    """Return a replica of the recipe's model with its first weights.

    Args:
        recipe: to train.
        task: of the recipe.
        averager: over the replicas.
        init_head: whether the task initialises a new head from training data; not needed before a checkpoint is loaded.
        heartbeat: called at every sign of progress.

    Raises:
        RecipeError: the recipe does not fit the model.
    """
    transport = averager.transport
    module = task.model(recipe.seed)
    if task.init_head and init_head:
        watched = module.register_forward_hook(lambda *_: heartbeat())  # it may read all of the data
        task.init_head(module if isinstance(recipe.sync, FsdpOptions) else module.to(transport.device), recipe.seed)
        watched.remove()
        module.cpu()  # random draws from here on are made on the CPU
    if recipe.precision == "float64":
        module.double()
    dtype = next(module.parameters()).dtype
    freeze(module, recipe.freeze.match)
    frozen_base = inject_adapter(module, recipe.adapter, recipe.seed)
    base = tensor_digest((name, module.get_parameter(name)) for name in frozen_base)
    sync = resolve(ALL_SYNCHRONISERS, recipe.sync.name, "sync.name")(averager, recipe.sync)
    if recipe.compile:
        compile_blocks(module, recipe.compile, transport.device)
    if recipe.activation_checkpointing:
        checkpoint_activations(module)
    shards = sync.shard(module, autocast_type(recipe.precision)) if isinstance(sync, ShardedDataParallel) else None
    parts = shards.local if shards else module.to(transport.device)
    optimizer = make_optimizer(
        resolve(ALL_OPTIMIZERS, recipe.optimizer.name, "optimizer.name"), recipe.optimizer, parts
    )
    return Replica(
        module=module.train(),
        frozen_base=frozen_base,
        base_digest=base,
        half_freezing=HalfFineTuning(module, recipe.seed, recipe.freeze.every) if recipe.freeze.random_half else None,
        optimizer=optimizer,
        options=recipe.optimizer,
        ema=make_average(parts, optimizer, recipe.ema),
        sync=sync,
        progress=Progress(),
        device=transport.device,
        dtype=dtype,
        rank=transport.rank,
        world_size=len(transport.members),
        shards=shards,
    )


def trainable(
    recipe: TrainRecipe, task: Task, averager: Averager, *, new: bool, heartbeat: Callable[[], None] = lambda: None
) -> Replica:
    """Return a replica that is ready to train, as it starts or for a state to be put into it.

    Args:
        recipe: what to train.
        task: the recipe's.
        averager: with the other replicas.
        new: whether it starts; otherwise its first weights are made only where its mask goes by them.
        heartbeat: called at every sign of progress.

    Raises:
        RecipeError: the recipe does not fit the model.
    """
    sparse = recipe.zo.sparsity > 0
    replica = build_replica(recipe, task, averager, init_head=new or sparse, heartbeat=heartbeat)
    if isinstance(replica.optimizer, ZerothOrderOptimizer):
        if sparse:
            replica.sync.attach(replica.module)  # a mask goes by the weights, to the bit: those of the first worker
        replica.zero_order = build_zero_order(replica, replica.optimizer, recipe, weighted=task.weights is not None)
    return replica


def build_zero_order(
    replica: Replica, optimizer: ZerothOrderOptimizer, recipe: TrainRecipe, *, weighted: bool
) -> ZeroOrderStep:
    """Return the zeroth-order step of a replica that has its first weights.

    Args:
        replica: with the model.
        optimizer: of its parameters.
        recipe: of the run.
        weighted: whether losses have weights.

    Raises:
        RecipeError: the section [zo] of the recipe does not fit the model.
    """
    if not isinstance(replica.sync, ScalarExchange):  # the recipe sees to that
        raise TypeError(type(replica.sync))
    return make_zero_order(replica.module, optimizer, replica.sync, recipe.zo, weighted=weighted)


def make_zero_order(
    module: nn.Module, optimizer: ZerothOrderOptimizer, sync: ScalarExchange, options: Perturbation, *, weighted: bool
) -> ZeroOrderStep:
    """Return the zeroth-order step of a model that has its first weights.

    Args:
        module: the model.
        optimizer: of its parameters.
        sync: to the other replicas.
        options: of the perturbations.
        weighted: whether losses have weights.

    Raises:
        RecipeError: the options do not fit the model.
    """
    directions = directions_of(
        module,
        optimizer,
        distribution=options.distribution,
        sparsity=options.sparsity,
        blockwise=options.blockwise,
        first_order=options.first_order,
    )
    perturbed = {part.tensor.data_ptr() for part in directions.slices}
    narrow = {str(part.tensor.dtype).removeprefix("torch.") for part in directions.slices if part.tensor.itemsize < 4}
    if narrow and sync.rank == 0:
        logger.warning(
            "parameters in %s round away updates below half a unit in the last place, which most zeroth-order updates "
            'are, and parts of each perturbation; float32 parameters keep them (task.dtype = "float32"), and '
            'precision = "bfloat16" still computes in bfloat16',
            " and ".join(sorted(narrow)),
        )
    optimizer.bind(directions)
    return ZeroOrderStep(
        model=PerturbedModel(module, directions),
        optimizer=optimizer,
        sync=sync,
        num_perturbations=options.num_perturbations,
        eps=options.eps,
        estimator=options.estimator,
        train_mode=options.train_mode,
        objective=options.objective,
        outlier_threshold=options.outlier_threshold,
        weighted=weighted,
        first_order=[one for one in module.parameters() if one.requires_grad and one.data_ptr() not in perturbed],
    )
