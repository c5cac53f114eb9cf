"""Install raytrain into the environment of the Python that runs this, with the build of torch that fits the machine.

    python install.py        what raytrain needs
    python install.py dev    and what its tests and checks need

By uv, from the PATH or from PyPI, or else by pip; both heed pip's configuration. On Linux without a GPU of NVIDIA's the
build of torch is that for CPUs, which is gigabytes smaller; TORCH_INDEX=URL names an index of your own for torch alone.
"""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent
CONSTRAINTS = ("--constraint", str(ROOT / "constraints.txt"))
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

CHOSEN = ("TORCH_INDEX", "UV_TORCH_BACKEND")
"""Variables by which a user says where torch comes from: it comes from there, or not at all."""

UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
}
"""pip's option -> the variable by which uv, which does not read pip's configuration, is told the same."""


def main(extras: list[str]) -> int:
    """Install torch, and then raytrain with some of its extras."""
    uv = find_uv()
    install = [uv, "pip", "install", "--python", sys.executable] if uv else [*PIP, "install", "--no-compile"]
    environment = dict(os.environ)
    if uv:
        configured = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=False).stdout
        environment = {**uv_settings(configured), **environment}

    def succeeds(*words: str) -> bool:
        return not subprocess.run([*install, "--quiet", *CONSTRAINTS, *words], env=environment, check=False).returncode

    print(f"installing into {sys.prefix} by {'uv' if uv else 'pip'}", file=sys.stderr)
    # torch comes first and alone: its index lacks what else is pinned, and resolved with it another build may be taken.
    index = torch_index(sys.platform, os.environ, by_uv=bool(uv), gpu=has_gpu())
    if not succeeds("--no-deps", *index, "torch"):
        if not index or any(os.environ.get(name) for name in CHOSEN):
            return 1
        print("torch comes from where all else does instead, on Linux perhaps with CUDA's libraries", file=sys.stderr)
        if not succeeds("--no-deps", "torch"):
            return 1
    return 0 if succeeds("--editable", f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)) else 1


def find_uv() -> str:
    """Return the path of uv, which is installed beside this Python if there is none; "" if that does not work."""
    beside = str(Path(sys.executable).with_name("uv"))
    for uv in (shutil.which("uv"), beside):
        if uv and works([uv, "--version"]):
            return uv
    return beside if works([*PIP, "install", "--quiet", *CONSTRAINTS, "uv"]) and works([beside, "--version"]) else ""


def works(command: list[str]) -> bool:
    """Return whether a command ends well, without its output."""
    try:
        return not subprocess.run(command, capture_output=True, check=False).returncode
    except OSError:
        return False


def uv_settings(configuration: str) -> dict[str, str]:
    """Return what pip is configured with as variables for uv.

    Args:
        configuration: what `pip config list` prints.
    """
    lines = [line.partition("=") for line in configuration.splitlines()]
    found: dict[str, str] = {}
    for section in ("global", "install", ":env:"):  # the later ones prevail
        for key, _, value in lines:
            if key.startswith(f"{section}.") and (name := UV_NAMES.get(key.removeprefix(f"{section}."))):
                found[name] = ("," if name == "UV_FIND_LINKS" else " ").join(ast.literal_eval(value).split())
    if "UV_INDEX" in found:
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # as pip: of all indexes, not of the first that has a package
    return found


def torch_index(platform: str, environment: Mapping[str, str], *, by_uv: bool, gpu: bool) -> list[str]:
    """Return the words that have uv or pip take the torch that fits a machine; none where all else is right for it too.

    Args:
        platform: as `sys.platform`.
        environment: may name TORCH_INDEX, and UV_TORCH_BACKEND, which is uv's own.
        by_uv: whether it is uv that takes them, and finds the build for a driver of NVIDIA's. It would also find builds
            for the GPUs of others, such as a laptop's own, with which raytrain does not compute.
        gpu: whether there is a GPU of NVIDIA's, for which PyPI's builds for Linux are.
    """
    if index := environment.get("TORCH_INDEX"):
        return ["--default-index" if by_uv else "--index-url", index]
    if platform != "linux":
        return []
    if by_uv:
        return ["--torch-backend", environment.get("UV_TORCH_BACKEND") or ("auto" if gpu else "cpu")]
    return [] if gpu else ["--index-url", CPU_INDEX]


def has_gpu() -> bool:
    """Return whether there is a driver of NVIDIA's."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
