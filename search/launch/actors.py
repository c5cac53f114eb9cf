"""The actors of a slot: one for each worker of the base recipe."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from raytrain.launch.forkserver import WORKER_ENVIRONMENT
from search.launch.trial_actor import TrialActor, TrialOptions


@dataclass(frozen=True, slots=True)
class SlotResources:
    """What each slot takes of the cluster.

    Attributes:
        cpus: processors of each worker, which are also its threads.
        beside_cpus: GPUs and custom resources of each worker, by the cluster's names.
        labels: of the machines, as in a recipe's `resources.labels`.
        workers: processes that train a member together.
        placement: of several workers on the machines, as in a recipe's `resources.placement`.
    """

    cpus: float
    beside_cpus: Mapping[str, float]
    labels: Mapping[str, str]
    workers: int = 1
    placement: str = "PACK"

    @property
    def threads(self) -> int:
        """Threads of each process."""
        return max(1, int(self.cpus))

    def __str__(self) -> str:
        """Return what is said of a slot."""
        return f"{self.cpus:g} CPU each" if self.workers == 1 else f"{self.workers} workers with {self.cpus:g} CPU each"


class SlotActors:
    """The actors of a slot. Several are placed together or not at all, so two slots never wait for each other.

    Args:
        options: of the trial that they train.
        each: what the slot takes of the cluster.

    Attributes:
        first: the actor that is told what to train, and tells the others.
    """

    def __init__(self, options: TrialOptions, each: SlotResources) -> None:
        self._group = _group(each) if each.workers > 1 else None
        self.first, *self._others = [self._actor(options, each, rank) for rank in range(each.workers)]

    def load(self) -> ray.ObjectRef:
        """Begin to start them."""
        loading: ray.ObjectRef = self.first.load.remote(self._others)
        return loading

    def kill(self) -> None:
        """End them, whatever they do, and free what they took."""
        for actor in (self.first, *self._others):
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)

    def _actor(self, options: TrialOptions, each: SlotResources, rank: int) -> Any:
        custom = {name: amount for name, amount in each.beside_cpus.items() if name != "GPU"}
        lacking = {name: value for name, value in WORKER_ENVIRONMENT.items() if os.environ.get(name) != value}
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
                runtime_env={"env_vars": lacking} if lacking else None,
                **where,
            )
            .remote(options)
        )


def _group(each: SlotResources) -> PlacementGroup:
    bundles = [{"CPU": each.cpus, **each.beside_cpus}] * each.workers
    labels = [dict(each.labels)] * each.workers if each.labels else None
    return placement_group(bundles, strategy=each.placement, bundle_label_selector=labels)
