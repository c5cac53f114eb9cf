"""A segment of a training: from where a replica stands to a step, without a run's folder."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from raytrain.tasks.task import Task
from raytrain.tensors import autocast_type
from raytrain.training.loader import LoaderFactory, StepRange, local_loader
from raytrain.training.loop import LoopCallbacks, LoopConfig, train
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import Replica


def loop_config(recipe: TrainRecipe) -> LoopConfig:
    """Return the loop configuration of a recipe."""
    return LoopConfig(
        steps=recipe.steps,
        seed=recipe.seed,
        batch=recipe.batch,
        accumulate=recipe.accumulate,
        clip=recipe.clip,
        gradient_noise=recipe.optimizer.gradient_noise,
        gradient_noise_decay=recipe.optimizer.gradient_noise_decay,
        autocast=autocast_type(recipe.precision),
        lr_factor=recipe.schedule.factor(recipe.steps),
        evaluate_every=recipe.evaluation.every,
        checkpoint_every=recipe.checkpoint.every,
        patience=recipe.evaluation.patience,
    )


def segment(
    recipe: TrainRecipe,
    task: Task,
    replica: Replica,
    until: int,
    watch: LoopCallbacks,
    *,
    make_loader: LoaderFactory = local_loader,
    recording: AbstractContextManager[None] | None = None,
) -> None:
    """Train a replica from where it stands; segments, one after the other, are the training that they are parts of.

    Args:
        recipe: how.
        task: the recipe's.
        replica: as `trainable` returns it, or with a state.
        until: step to train to; the learning rate is that of the recipe's `steps`.
        watch: what surrounds the loop.
        make_loader: where the examples come from.
        recording: entered once examples can be taken.
    """
    config = replace(loop_config(recipe), steps=until)
    with make_loader(task, recipe.task, loop_range(replica, config)) as loader, recording or nullcontext():
        train(replica, task, loader, config, watch)


def loop_range(replica: Replica, config: LoopConfig) -> StepRange:
    """Return the positions of the examples that the loop will read."""
    return StepRange(
        seed=config.seed,
        rank=replica.rank,
        first_position=replica.progress.position + replica.rank * config.local_batch,
        stride=replica.world_size * config.local_batch,
        steps=max(0, config.steps - replica.progress.step),
        local_batch=config.local_batch,
        accumulate=config.accumulate,
    )
