"""The HPOLib tables: 62,208 networks and training recipes on each of four data sets, with four stored runs."""

from pathlib import Path
from typing import Any

import numpy as np

from search.chooser import Chooser

DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "activation_fn_1": ("relu", "tanh"),
    "activation_fn_2": ("relu", "tanh"),
    "batch_size": (8, 16, 32, 64),
    "dropout_1": (0.0, 0.3, 0.6),
    "dropout_2": (0.0, 0.3, 0.6),
    "init_lr": (5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1e-1),
    "lr_schedule": ("cosine", "const"),
    "n_units_1": (16, 32, 64, 128, 256, 512),
    "n_units_2": (16, 32, 64, 128, 256, 512),
}
UNORDERED = {"activation_fn_1", "activation_fn_2", "lr_schedule"}
STRIDES = np.array([31104, 15552, 3888, 1296, 432, 72, 36, 6, 1])
INPUTS = {"slice_localization": 380, "protein_structure": 9, "naval_propulsion": 15, "parkinsons_telemonitoring": 20}
"""Table -> inputs of its networks."""


def space(choose: Chooser) -> dict[str, Any]:
    """Return one of the 62,208 configurations."""
    return {
        name: (choose.one_of if name in UNORDERED else choose.ordered)(name, values)
        for name, values in DIMENSIONS.items()
    }


def row_of(changes: dict[str, Any]) -> int:
    """Return the row of the table that a configuration has."""
    return int(STRIDES @ [values.index(changes[name]) for name, values in DIMENSIONS.items()])


def losses_of(table: str, data: Path) -> np.ndarray[Any, Any]:
    """Return the losses of a table, shape (62208, 4)."""
    losses: np.ndarray[Any, Any] = np.load(data / "hpolib" / f"{table}.npz")["valid_mse"].astype(float)
    return losses


def check_data(data: Path) -> None:
    """End the program if the tables are not there."""
    if not (data / "hpolib").is_dir():
        raise SystemExit(f"{data} has no folder hpolib, which holds the tables; name another with --data")
