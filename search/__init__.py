"""Population based training and sweeps, of recipes by the command or in a loop of the user's own.

What is named here is imported when it is used, and the import of this package itself takes no time.

>>> from search import PBT, Space
"""

from typing import TYPE_CHECKING

from raytrain.lazy_names import lazy_names

if TYPE_CHECKING:
    from search.launch.tune import PBTScheduler
    from search.space import Space
    from search.study import (
        ASHA,
        GP,
        MCTS,
        NARS,
        PBT,
        TPE,
        Evolution,
        Extrapolation,
        Grid,
        Hyperband,
        Median,
        Random,
        Sobol,
        Study,
        Trial,
    )

__all__ = [
    "ASHA",
    "GP",
    "MCTS",
    "NARS",
    "PBT",
    "TPE",
    "Evolution",
    "Extrapolation",
    "Grid",
    "Hyperband",
    "Median",
    "PBTScheduler",
    "Random",
    "Sobol",
    "Space",
    "Study",
    "Trial",
]

_MODULES = {
    **dict.fromkeys(("ASHA", "GP", "MCTS", "NARS", "PBT", "TPE"), "search.study"),
    **dict.fromkeys(("Evolution", "Extrapolation", "Grid", "Hyperband", "Median", "Random", "Sobol"), "search.study"),
    **dict.fromkeys(("Study", "Trial"), "search.study"),
    "PBTScheduler": "search.launch.tune",
    "Space": "search.space",
}
"""Name -> module, of what is imported when it is used."""

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
