"""Jobs, and what is known of one without asking the cluster."""

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from raytrain.errors import INTERRUPTED, RecipeError
from raytrain.launch.jobs.storage import check_storage
from raytrain.recipe import dotted_fields
from raytrain.terminal import format_mib

NO_PROGRAM = 127  # as a shell tells
RUNS = "~/raytrain-runs"  # on the machine that runs the job's command: the cluster's head
SERVED = "raytrain-"  # begins the name of what a job leaves among Ray's logs
SHOWN_FOLDERS = 5
ID = r"\w[\w.-]*"
"""Pattern of job names, which become parts of URLs and paths."""


@dataclass(frozen=True, slots=True)
class Job:
    """A run on a cluster.

    Attributes:
        id: its name there.
        words: of the command that it runs.
        run: the run's folder, as the cluster sees it.
        store: URL that the folder is copied to at the end, or nothing.
        with_code: whether it uses the raytrain of the machine that submitted it.
        status: "PENDING", "RUNNING", "SUCCEEDED", "FAILED" or "STOPPED".
        message: what Ray says of it.
        exit_code: of the command, where Ray tells.
        started, ended: when, in seconds since 1970; 0: not yet.
        node: Ray's name of the machine that runs the command.
    """

    id: str
    words: tuple[str, ...]
    run: str
    store: str = ""
    with_code: bool = False
    status: str = "PENDING"
    message: str = ""
    exit_code: int | None = None
    started: float = 0.0
    ended: float = 0.0
    node: str = ""

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def began(self) -> bool:
        """Whether there was a raytrain to run it."""
        missing = self.exit_code == NO_PROGRAM or re.search(r"No module named '?raytrain", self.message)
        return not (self.status == "FAILED" and missing)

    @property
    def exit_status(self) -> int:
        """The exit status of the command that followed it: that of the job's own command, where Ray tells."""
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED":
            return INTERRUPTED
        if not self.exit_code:
            return 1
        return self.exit_code if self.exit_code > 0 else 128 - self.exit_code  # as a shell tells of a signal


@dataclass
class JobLog:
    """The part of a job's log that has been printed; the server sends it from its start after each connection.

    Attributes:
        show: takes the text.
        shown: how many characters it took.
    """

    show: Callable[[str], object]
    shown: int = 0

    def reader(self) -> Callable[[str], None]:
        """Return a reader that takes the log from its start, and prints what is new."""
        place = 0

        def show_new(text: str) -> None:
            nonlocal place
            new = text[max(0, self.shown - place) :]
            place += len(text)
            if new:
                self.show(new)
                self.shown = place

        return show_new


def check_id(name: str) -> None:
    """Check the name of a job.

    Raises:
        RecipeError: it cannot.
    """
    if not re.fullmatch(ID, name):
        raise RecipeError(
            f"JOB: expected letters, digits, '_', '.' and '-', as in digits-3f2a1c; got {name!r}; raytrain jobs lists "
            "those that there are"
        )


def new_id(name: str) -> str:
    """Return a unique name for a job, such as digits-3f2a1c.

    Raises:
        RecipeError: no job can be called so.
    """
    if not re.fullmatch(ID, name):
        raise RecipeError(
            f"--name: expected letters, digits, '_', '.' and '-', and neither of the last two first; got {name!r}"
        )
    return f"{name}-{secrets.token_hex(3)}"


def run_location(job: str, out: Path | None, storage: str | None) -> tuple[str, str]:
    """Return the folder of a job's run, as the cluster sees it, and the URL to copy it to at the end, or nothing.

    Args:
        job: the job's name.
        out: --out of the command.
        storage: --storage.

    Raises:
        RecipeError: they contradict each other, or name a place that is not on the cluster.
    """
    if out is not None and not out.is_absolute():
        raise RecipeError(
            f"--out: expected an absolute path, as the cluster's machines see it; got {str(out)!r}. Leave it out, and "
            "bring the run here with raytrain fetch"
        )
    where = check_storage(storage) if storage else ""
    if out is not None and where.startswith("/"):
        raise RecipeError(f"--out and --storage both name the run's folder: {out} and {where}; leave one out")
    run = str(out) if out is not None else f"{where if where.startswith('/') else RUNS}/{job}"
    return run, f"{where}/{job}" if where and not where.startswith("/") else ""


def check_upload(files: Mapping[str, int], limit_bytes: int, folder: Path) -> None:
    """Check that the upload of a job is not too large.

    Args:
        files: path below `folder` -> size in bytes.
        limit_bytes: of the job server.
        folder: the current folder.

    Raises:
        RecipeError: it is too much.
    """
    total = sum(files.values())
    if total <= limit_bytes:
        return
    sizes: dict[str, int] = {}
    for name, size in files.items():
        top, slash, _ = name.partition("/")
        sizes[top + slash] = sizes.get(top + slash, 0) + size
    largest = sorted(sizes, key=lambda top: -sizes[top])[:SHOWN_FOLDERS]
    raise RecipeError(
        f"a job uploads the current folder, and {folder} holds {format_mib(total)}, where Ray takes at most "
        f"{format_mib(limit_bytes)}; the largest in it: "
        f"{', '.join(f'{top} {format_mib(sizes[top])}' for top in largest)}. Name what the job does not need in "
        ".gitignore or .rayignore, or run the command from another folder"
    )


def check_uploaded(needed: Mapping[str, Path], files: Mapping[str, int], folder: Path) -> None:
    """Check that the files that a recipe names are uploaded.

    Args:
        needed: how the user named it -> the path, absolute.
        files: uploaded: path below `folder` -> size.
        folder: the current folder.

    Raises:
        RecipeError: one is not.
    """
    for name, path in needed.items():
        inside = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else None
        if inside is None:
            raise RecipeError(
                f"{name} is outside the current folder, which is what a job uploads; run the command from a folder "
                "above it, or copy it here"
            )
        if path.exists() and not any(PurePosixPath(file).is_relative_to(inside) for file in files):
            raise RecipeError(
                f"{name} is not uploaded with the job: runs/, .venv/, .git/, what .gitignore or .rayignore names, "
                "links out of the folder and what may hold secrets stay here; copy it elsewhere"
            )


def uploaded_files(raw: Mapping[str, Any]) -> dict[str, str]:
    """Return the recipe fields that name uploaded files -> their paths before the upload."""
    found = {field: re.search(r"/_ray_pkg_[0-9a-f]+/(.+)", str(value)) for field, value in dotted_fields(raw)}
    return {field: match[1] for field, match in found.items() if match}


def describe_outcome(job: Job) -> str:
    """Return what went wrong with a job that has ended, and the way out if known; "" if it succeeded."""
    if job.status == "SUCCEEDED":
        return ""
    if job.status == "STOPPED":
        return "stopped"
    if job.exit_code == NO_PROGRAM:
        return "failed: the cluster's head has no `python` on its PATH; start Ray there in raytrain's environment"
    if not job.began:
        return "failed: the cluster has no raytrain, or an older one; install the same there, or submit --with-code"
    if job.exit_code is None:
        return f"failed: {job.message.strip() or 'Ray does not say why'}"
    return f"failed with exit status {job.exit_status}"
