"""The process group of Ray Train's workers."""

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.torch.config import TorchConfig, _TorchBackend

from raytrain.sync.transport import join_group


@dataclass
class GroupConfig(TorchConfig):
    """Ray Train's configuration, with a store that needs a secret and listens on the cluster's network alone.

    Attributes:
        secret: of the run; see `join_group`.
    """

    secret: str = field(default="", repr=False)

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """Return the class that creates the group."""
        return _GroupBackend


class _GroupBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: GroupConfig) -> None:
        address = worker_group.execute_single(0, get_address_and_port)
        members, backend = len(worker_group), backend_config.backend
        shared = (members, address, backend_config.timeout_s, backend_config.secret)
        ray.get(
            [worker_group.execute_single_async(rank, join_group, backend, rank, *shared) for rank in range(members)]
        )
