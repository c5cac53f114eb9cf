"""The actors of a slot on a Ray cluster: one for each worker of the base recipe."""

import time
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from raytrain.errors import RaytrainError, TrainingError
from raytrain.launch.forkserver import WORKER_ENVIRONMENT
from search.launch.slots import Beat, SlotDiedError, SlotResources
from search.launch.trial_actor import TrialActor
from search.launch.trial_options import TrialOptions
from search.scheduling.work import Work

ASK_SECONDS = 0.5
"""How often an actor is asked for a sign of progress."""


class SlotActors:
    """The actors of a slot. Several are placed together or not at all, so two slots never wait for each other.

    Args:
        options: of the trial that they train.
        each: what the slot takes of the cluster.
    """

    def __init__(self, options: TrialOptions, each: SlotResources) -> None:
        self._group = _group(each) if each.workers > 1 else None
        self._first, *self._others = [self._actor(options, each, rank) for rank in range(each.workers)]
        self._question: ray.ObjectRef | None = None
        self._asked = time.monotonic()

    def load(self) -> Future[Any]:
        """Begin to start them; the future has the machine's name."""
        return _future(self._first.load.remote(self._others))

    def train(self, work: Work, state: bytes | None) -> Future[Any]:
        """Begin to train a segment; the future has its end."""
        return _future(self._first.train.remote(work, state))

    def beat(self) -> Beat | None:
        """Return a new sign of progress, or None if there is no answer yet."""
        now = time.monotonic()
        if self._question is None and now - self._asked > ASK_SECONDS:
            self._question, self._asked = self._first.beat.options(concurrency_group="control").remote(), now
        if self._question is None or not ray.wait([self._question], timeout=0)[0]:
            return None
        question, self._question = self._question, None
        try:
            found: Beat = ray.get(question)
        except RayError:
            return None  # it has died, which its segment's future tells
        return found

    def stop(self) -> None:
        """Ask for the end of the segment after the step that it is at."""
        self._first.stop.options(concurrency_group="control").remote()

    def kill(self) -> None:
        """End them, whatever they do, and free what they took."""
        if not ray.is_initialized():
            return
        for actor in (self._first, *self._others):
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)

    def _actor(self, options: TrialOptions, each: SlotResources, rank: int) -> Any:
        custom = {name: amount for name, amount in each.beside_cpus.items() if name != "GPU"}
        where: dict[str, Any] = {"label_selector": dict(each.labels) or None}
        if self._group is not None:
            where = {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, rank)}
        elif options.whole_runs_in is not None:  # whose folder may be on this machine alone
            here = ray.get_runtime_context().get_node_id()
            where = {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
        return (
            ray.remote(concurrency_groups={"control": 1})(TrialActor)
            .options(
                num_cpus=each.cpus,
                num_gpus=each.beside_cpus.get("GPU", 0),
                resources=custom or None,
                runtime_env={"env_vars": WORKER_ENVIRONMENT},
                **where,
            )
            .remote(options)
        )


def _group(each: SlotResources) -> PlacementGroup:
    bundles = [{"CPU": each.cpus, **each.beside_cpus}] * each.workers
    labels = [dict(each.labels)] * each.workers if each.labels else None
    return placement_group(bundles, strategy=each.placement, bundle_label_selector=labels)


def _future(answer: ray.ObjectRef) -> Future[Any]:
    """Return the future of an actor's answer, whose errors are those that a slot knows."""
    future: Future[Any] = Future()

    def settle(found: Future[Any]) -> None:
        if error := found.exception():
            future.set_exception(_known(error))
        else:
            future.set_result(found.result())

    answer.future().add_done_callback(settle)
    return future


def _known(error: BaseException) -> RaytrainError:
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RayError):  # of this actor, or of another worker of its slot
        return SlotDiedError(str(cause))
    return cause if isinstance(cause, RaytrainError) else TrainingError(str(cause))
