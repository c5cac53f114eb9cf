"""Train, search and federate neural networks on a Ray cluster.

What is named here is imported when it is used, and the import of this package itself takes no time.

>>> from raytrain import Task, train
"""

from typing import TYPE_CHECKING

from raytrain.errors import CheckpointError, RaytrainError, RecipeError, TrainingError
from raytrain.lazy_names import lazy_names

if TYPE_CHECKING:
    from raytrain.api import evaluate, federate, load, search, train
    from raytrain.recipe import Options
    from raytrain.run.result import Result
    from raytrain.sync.loop import CO2, DDP, CoCoD, DelayedAveraging, DiLoCo, LocalSGD, SlowMo
    from raytrain.tasks.task import Examples, Task
    from raytrain.training.zero_order import ZeroOrder

__version__ = "0.1.0"
__all__ = [
    "CO2",
    "DDP",
    "CheckpointError",
    "CoCoD",
    "DelayedAveraging",
    "DiLoCo",
    "Examples",
    "LocalSGD",
    "Options",
    "RaytrainError",
    "RecipeError",
    "Result",
    "SlowMo",
    "Task",
    "TrainingError",
    "ZeroOrder",
    "evaluate",
    "federate",
    "load",
    "search",
    "train",
]

_MODULES = {
    **dict.fromkeys(("evaluate", "federate", "load", "search", "train"), "raytrain.api"),
    **dict.fromkeys(("Examples", "Task"), "raytrain.tasks.task"),
    **dict.fromkeys(("CO2", "DDP", "CoCoD", "DelayedAveraging", "DiLoCo", "LocalSGD", "SlowMo"), "raytrain.sync.loop"),
    "Options": "raytrain.recipe",
    "Result": "raytrain.run.result",
    "ZeroOrder": "raytrain.training.zero_order",
}
"""Name -> module, of what is imported when it is used."""

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
