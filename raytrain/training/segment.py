"""A segment of a training: from where a replica stands to a step, without a run's folder."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from raytrain.tasks.task import Task
from raytrain.training.build import plan_of
from raytrain.training.loader import Feeds, Walk, local_feed
from raytrain.training.loop import Plan, Watch, train
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import Replica


def segment(
    recipe: TrainRecipe,
    task: Task,
    replica: Replica,
    until: int,
    watch: Watch,
    *,
    feeds: Feeds = local_feed,
    recording: AbstractContextManager[None] | None = None,
) -> None:
    """Train a replica from where it stands; segments, one after the other, are the training that they are parts of.

    Args:
        recipe: how.
        task: the recipe's.
        replica: as `trainable` returns it, or with a state.
        until: step to train to; the learning rate is that of the recipe's `steps`.
        watch: what surrounds the loop.
        feeds: where the examples come from.
        recording: entered once examples can be taken.
    """
    plan = replace(plan_of(recipe), steps=until)
    with feeds(task, recipe.task, _walk(replica, plan)) as feed, recording or nullcontext():
        train(replica, task, feed, plan, watch)


def _walk(replica: Replica, plan: Plan) -> Walk:
    """Return the positions that the loop will take examples from."""
    return Walk(
        seed=plan.seed,
        rank=replica.rank,
        first=replica.progress.position + replica.rank * plan.local_batch,
        stride=replica.members * plan.local_batch,
        steps=max(0, plan.steps - replica.progress.step),
        count=plan.local_batch,
        parts=plan.accumulate,
    )
