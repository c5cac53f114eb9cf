"""Fetching a run's folder from wherever it lies.

A copy appears under its name when all of it is there and is as it was listed. Until then it lies beside it, in a folder
that only this user can write to, and the next attempt goes on from there.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from raytrain.errors import CheckpointError, RecipeError, TrainingError
from raytrain.files import is_private
from raytrain.launch.jobs.storage import ChangedError, Listing, RunSource, first_bytes, measured, open_file, pieces_of
from raytrain.provenance import mark_fetched
from raytrain.terminal import format_mib

COPY_ATTEMPTS = 3


def fetch_run(source: RunSource, target: Path, say: Callable[[str], None]) -> None:
    """Copy a run's folder from `source` to `target`, which appears when it is complete.

    What an attempt that broke off left beside `target` is used again.

    Raises:
        RecipeError: there is something at `target`, or nothing to copy.
        TrainingError: it did not work.
    """
    _check_target(target)
    aside = target.with_name(f".{target.name}.partial")
    try:
        listing = _fetched(source, aside, say)
    finally:
        source.close()
    _keep_only(listing, aside)
    check_checkpoints(aside, say)
    mark_fetched(aside, source.origin)
    if target.is_dir():
        target.rmdir()
    aside.rename(target)


def _fetched(source: RunSource, aside: Path, say: Callable[[str], None]) -> Listing:
    """Copy all listed files to `aside`, with retries, and return the list."""
    for attempts_left in range(COPY_ATTEMPTS, 0, -1):
        try:
            listing = source.listing()
            if not listing:
                raise RecipeError("the run's folder is empty")
            _make_private(aside)
            _check_room(listing, aside)
            say(f"fetching {len(listing)} files, {format_mib(sum(entry.bytes for entry in listing.values()))}")
            _copy(source, listing, aside)
            break
        except (ChangedError, OSError) as error:
            if attempts_left == 1:
                kept = f"what has come is kept in {aside}: " if aside.exists() else ""
                raise TrainingError(f"{error}; {kept}try again") from error
            say(f"{error}; trying again")
    return listing


def check_checkpoints(run: Path, say: Callable[[str], None]) -> None:
    """Check that a checkpoint of the run in `run` is complete, and name those that are not.

    A run that was killed, or that goes on, may have removed an old one in part.

    Raises:
        CheckpointError: there are checkpoints, and none of them is complete.
    """
    from raytrain.run.checkpoint import list_checkpoints, verify_checkpoint  # noqa: PLC0415 - slow to import

    checkpoints, damaged = list_checkpoints(run / "checkpoints"), []
    for path in checkpoints:
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            damaged.append(str(error).replace(f"{run}/", ""))
    if damaged and len(damaged) == len(checkpoints):
        problems = "\n".join(damaged)
        raise CheckpointError(f"no checkpoint of the run can be read; its files are kept in {run}\n{problems}")
    for problem in damaged:
        say(f"a checkpoint of the run is damaged, and others are complete: {problem}")


def _check_target(target: Path) -> None:
    """Check that a folder can be renamed to `target`.

    Raises:
        RecipeError: it cannot.
    """
    if target.is_symlink() or target.is_mount() or target.resolve() == Path.cwd():
        raise RecipeError(f"{target} is a link, a mount point or the current folder; name another, or a new one in it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RecipeError(f"{target} is there already, and not empty; name another folder")


def _make_private(aside: Path) -> None:
    """Make a folder to copy to, or take one that an earlier attempt left, in which nobody else can plant anything.

    Raises:
        RecipeError: it may be another user's.
    """
    aside.mkdir(mode=0o755, parents=True, exist_ok=True)
    if not is_private(aside):
        raise RecipeError(
            f"{aside} is not yours alone: others can write to it, or it is a link; remove it and try again"
        )
    for link in [path for path in aside.rglob("*") if path.is_symlink()]:
        link.unlink()


def _check_room(listing: Listing, aside: Path) -> None:
    """Check that there is room for what is still to come.

    Raises:
        RecipeError: there is not.
    """
    there = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file())
    needed, free = sum(entry.bytes for entry in listing.values()) - there, shutil.disk_usage(aside).free
    if needed > free:
        raise RecipeError(
            f"{aside.parent}: the run's files take {format_mib(needed)} more, and {format_mib(free)} are free there"
        )


def _copy(source: RunSource, listing: Listing, aside: Path) -> None:
    for name, entry in listing.items():
        file = aside / name
        if file.is_file() and file.stat().st_size == entry.bytes and measured(pieces_of(file)) == entry:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        with open_file(file, "wb") as copy:
            pieces = first_bytes(source.read(name), entry.bytes) if entry.bytes else iter(())
            came = measured(_through(pieces, copy.write))
        if came != entry:
            raise ChangedError(f"{name}: expected {entry.bytes} bytes, and {came.bytes} came, or others")


def _keep_only(listing: Listing, aside: Path) -> None:
    """Remove what an earlier attempt brought and is no longer part of the run."""
    folders = {parent.as_posix() for name in listing for parent in PurePosixPath(name).parents}
    for path in sorted(aside.rglob("*"), reverse=True):
        name = path.relative_to(aside).as_posix()
        if path.is_dir() and name not in folders:
            shutil.rmtree(path)
        elif path.is_file() and name not in listing:
            path.unlink()


def _through(pieces: Iterable[bytes], take: Callable[[bytes], object]) -> Iterator[bytes]:
    for piece in pieces:
        take(piece)
        yield piece
