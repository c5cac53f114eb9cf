"""The upload of a job from the current folder, which Ray packs."""

import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

from raytrain.kinds import kind_entry_points, shared_packages
from raytrain.loggers import only_errors
from raytrain.modules import find_spec

EXCLUDED = (".git", ".venv", "venv", "__pycache__", "/runs")
PACKAGING = "ray._private.runtime_env"
"""Ray's logger of what it packs."""

SECRETS = (".env*", "*.pem", "id_*", ".ssh", ".aws", ".netrc", ".kaggle")


@dataclass(frozen=True, slots=True)
class Upload:
    """The upload of a job, as Ray selects it.

    Attributes:
        folder: the current one.
        files: path below it -> size in bytes.
        withheld: path of what might be taken for a part of it, and stays here -> why.
    """

    folder: Path
    files: dict[str, int]
    withheld: dict[str, str]

    def excludes(self) -> list[str]:
        """Return the excluded paths, as patterns of .gitignore."""
        return [*EXCLUDED, *SECRETS, *_own_packages(self.folder), *(_pattern(name) for name in self.withheld)]


def upload_of(folder: Path) -> Upload:
    """Return the upload of a job from a folder."""
    files: dict[str, int] = {}
    withheld: dict[str, str] = {}
    secret = _get_excludes(folder, SECRETS)

    def add_file(path: Path) -> None:
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = path.stat().st_size

    def withhold(path: Path) -> bool:
        name = path.relative_to(folder).as_posix()
        why = "may hold secrets" if secret(path) else _stray_link(path, folder)
        if why:
            withheld[name] = why
        return bool(why)

    left_out = _get_excludes(folder, [*EXCLUDED, *_own_packages(folder)])
    heeded = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    choices: list[Callable[[Path], bool]] = [left_out, withhold]
    with only_errors(PACKAGING):
        _dir_travel(folder, choices, add_file, include_gitignore=heeded, logger=logging.getLogger(PACKAGING))
    return Upload(folder, files, withheld)


def _pattern(name: str) -> str:
    """Return the pattern of .gitignore that matches this path alone."""
    return "/" + re.sub(r"[^\w./-]", lambda odd: f"\\{odd[0]}" if odd[0] in "\\!^[]" else f"[{odd[0]}]", name)


def _stray_link(path: Path, folder: Path) -> str:
    """Return why a link is not uploaded; Ray would follow it, and upload its target."""
    if path == folder or not path.is_symlink():
        return ""
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # the latter: Python 3.11 and 3.12, of one that leads to itself
        return "a link in a circle"
    if not target.is_relative_to(folder.resolve()):
        return "a link out of the folder"
    return "a link in a circle" if path.parent.resolve().is_relative_to(target) else ""


def upload_limit() -> int:
    """Return the limit of the job server in bytes."""
    return int(DASHBOARD_CLIENT_MAX_SIZE)


def own_code() -> list[str]:
    """Return raytrain and the kinds of this machine: their packages, and the metadata that names the kinds."""
    distributions = {point.dist.name: point.dist for point in kind_entry_points().values() if point.dist}
    metadata = [
        Path(str(file.locate())).parent
        for each in distributions.values()
        for file in each.files or []
        if file.name == "METADATA"
    ]
    return [str(path) for path in [*_code(), *metadata]]


def _own_packages(folder: Path) -> list[str]:
    """Return the code of raytrain and of kinds, which the cluster has installed, if the folder holds it."""
    return [f"/{path.name}" for path in _code() if path.parent == folder]


def _code() -> Iterator[Path]:
    """Yield the folders of the packages that a run's machines share, and the files of those that are one module."""
    for package in shared_packages():
        spec = find_spec(package)
        if spec and spec.submodule_search_locations:
            yield from map(Path, spec.submodule_search_locations)
        elif spec and spec.origin:
            yield Path(spec.origin)
