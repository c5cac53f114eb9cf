"""The NAS-Bench-Macro table: 6,561 networks of eight layers, each trained three times on CIFAR-10 by one recipe.

Source: Su et al. 2021, Prioritized Architecture Sampling with Monte-Carlo Tree Search (arXiv 2103.11922).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from search.chooser import Chooser

DIMENSIONS = {f"layer{number}": (0, 1, 2) for number in range(8)}
"""Layer -> its block: identity, or an inverted residual of kernel 3 or 5."""
BASE = 3 ** np.arange(7, -1, -1)
FILE = "nas_bench_macro/nas_bench_macro_cifar10.json"


def space(choose: Chooser) -> dict[str, Any]:
    """Return one of the 6,561 networks."""
    return {name: choose.one_of(name, blocks) for name, blocks in DIMENSIONS.items()}


def row_of(changes: dict[str, Any]) -> int:
    """Return the row of the table that a network has."""
    return int(BASE @ [changes[name] for name in DIMENSIONS])


def errors(data: Path) -> np.ndarray[Any, Any]:
    """Return the mean test errors in percent, shape (6561, 1); keys, sorted, are numbers to the base of 3."""
    table = json.loads((data / FILE).read_bytes())
    return 100 - np.array([[table[key]["mean_acc"]] for key in sorted(table)])
