"""What every benchmark shares: its arguments, the machine, intervals, and the JSON that it leaves."""

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("ray", "torch", "transformers", "numpy", "triton", "flwr")


def arguments(description: str) -> argparse.Namespace:
    """Return the arguments that every benchmark takes."""
    return parse(parser_of(description))


def parser_of(description: str) -> argparse.ArgumentParser:
    """Return a parser of these arguments, for a benchmark that takes more."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--quick", action="store_true", help="smaller, at most five minutes on 2 cores")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the arguments, with the environment set for what the benchmark starts."""
    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
        FLWR_TELEMETRY_ENABLED="0",
        HF_HUB_OFFLINE="1",
    )
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    about = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in about if line.startswith("model name")), "")
    packages = {name: version(name) for name in PACKAGES if find_spec(name)}
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    cores = len(os.sched_getaffinity(0))
    return {"cpu": model, "cores": cores, **gpu, "python": platform.python_version(), **packages}


def commit() -> str:
    """Return the commit that is checked out, marked if files differ from it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def median_and_interval(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the range that holds all values."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def finish(
    name: str, rows: Sequence[Mapping[str, Any]], headline: Mapping[str, float], options: argparse.Namespace
) -> None:
    """Print the table and the headline, and write the JSON."""
    columns = [name for name, value in rows[0].items() if not isinstance(value, list)]
    cells = [[_shown(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(column), *(len(row[place]) for row in cells)) for place, column in enumerate(columns)]
    for row in [columns, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    for key, value in headline.items():
        print(f"{key} = {_shown(value)}")
    result = {"bench": name, "commit": commit(), "machine": machine(), "rows": rows, "headline": headline}
    file = options.json or RESULTS / f"{name}{'-quick' if options.quick else ''}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {file}")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
