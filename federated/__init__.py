"""Federated zeroth-order fine-tuning: clients send a few bytes a round, whatever the size of the model.

What is named here is imported when it is used, and the import of this package itself takes no time.

>>> from federated import FedKSeed, RayGrid
"""

from typing import TYPE_CHECKING

from raytrain.lazy_names import lazy_names

if TYPE_CHECKING:
    from federated.build import Federation
    from federated.flower.strategies import CommonSeeds, FedKSeed, FedKSeedPro, Sign
    from federated.flower.testing import InProcessGrid
    from federated.launch.actor_pool import ActorOptions
    from federated.launch.ray_grid import RayGrid
    from federated.partition import make_partition
    from federated.recipe import FederateRecipe

__all__ = [
    "ActorOptions",
    "CommonSeeds",
    "FedKSeed",
    "FedKSeedPro",
    "FederateRecipe",
    "Federation",
    "InProcessGrid",
    "RayGrid",
    "Sign",
    "make_partition",
]

_MODULES = {
    **dict.fromkeys(("CommonSeeds", "FedKSeed", "FedKSeedPro", "Sign"), "federated.flower.strategies"),
    "ActorOptions": "federated.launch.actor_pool",
    "FederateRecipe": "federated.recipe",
    "Federation": "federated.build",
    "InProcessGrid": "federated.flower.testing",
    "RayGrid": "federated.launch.ray_grid",
    "make_partition": "federated.partition",
}
"""Name -> module, of what is imported when it is used."""

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
