"""Train neural networks on a Ray cluster.

>>> from raytrain import Task
"""

from raytrain.errors import RaytrainError, RecipeError, TrainingError
from raytrain.recipe import Options
from raytrain.tasks.task import Examples, Task

__version__ = "0.1.0"
__all__ = ["Examples", "Options", "RaytrainError", "RecipeError", "Task", "TrainingError"]
