"""Check that all that is pinned can be had from PyPI, as wheels, on each platform and version that we promise.

Only names and versions are read. Nothing is installed, and this machine's configuration and wheels are not looked at.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin")
VERSIONS = ("3.11", "3.12", "3.13")
OLDEST_MACOS = "14.0"
WITHOUT_PINS = ("cuda-", "nvidia-")
"""Beginnings of the names of CUDA's libraries, of which torch says which it takes."""


def main() -> int:
    """Resolve for all of them; return 1 if one cannot be."""
    places = (Path(sys.executable).with_name("uv"), ROOT / ".venv/bin/uv", shutil.which("uv") or "uv")
    uv = next((path for path in map(Path, places) if path.is_file()), None)
    if uv is None:
        print("resolve.py needs uv, and finds none beside this Python, in .venv or on PATH; pip install uv")
        return 1
    pins = {name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    with ThreadPoolExecutor() as threads:  # which wait for answers, most of the time
        found = list(threads.map(lambda place: resolve(str(uv), pins, *place), product(PLATFORMS, VERSIONS)))
    print(*(verdict for verdict, _ in found), sep="\n")
    return 0 if all(good for _, good in found) else 1


def resolve(uv: str, pins: set[str], platform: str, version: str) -> tuple[str, bool]:
    """Resolve the project and its extras for one platform and version; return what came of it, and if all is well."""
    words = ["pip", "compile", "--no-config", "--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:"]
    words += ["--constraint", "constraints.txt", "--all-extras", "pyproject.toml"]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    resolved = subprocess.run(
        [uv, *words, "--python-platform", platform, "--python-version", version],
        cwd=ROOT,
        env={**ours, "MACOSX_DEPLOYMENT_TARGET": OLDEST_MACOS},
        capture_output=True,
        text=True,
        check=False,
    )
    packages = [name(line) for line in resolved.stdout.splitlines() if "==" in line]
    lacking = [package for package in packages if package not in pins and not package.startswith(WITHOUT_PINS)]
    about = [f"{len(packages)} packages", *(f"constraints.txt lacks {package}" for package in lacking)]
    if resolved.returncode:
        about = ["cannot be installed", resolved.stderr.strip()]
    return f"{platform}, Python {version}: {'; '.join(about)}", not resolved.returncode and not lacking


def name(line: str) -> str:
    """Return the name of the package that a line like `torch==2.13.0` is about, as all spell it."""
    return re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()


if __name__ == "__main__":
    sys.exit(main())
