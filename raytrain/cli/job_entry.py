"""Entry point of a Ray job: ``python -m raytrain.cli.job_entry run|serve``."""

import argparse
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import raytrain
from raytrain.errors import RaytrainError, RecipeError
from raytrain.files import write_atomic
from raytrain.launch.jobs.storage import LIST, Store, dump, list_files
from raytrain.launch.version import fingerprint
from raytrain.terminal import format_mib

JOB_LOG = "job-driver-"
SERVE_SECONDS = 6 * 3600.0  # for who does not end it


def run_entry() -> None:
    """Run or serve, and exit with the status of the command `raytrain`."""
    parser = argparse.ArgumentParser(prog="raytrain.cli.job_entry")
    verbs = parser.add_subparsers(dest="verb", required=True)
    run_parser = verbs.add_parser("run", help="run the command in the run's folder, and store what it left there")
    run_parser.add_argument("--out", required=True, help="the run's folder")
    run_parser.add_argument("--store", help="URL to copy it to at the end")
    run_parser.add_argument("--code", required=True, help="fingerprint of the raytrain that submitted the job")
    run_parser.add_argument("words", nargs="+", help="of the command")
    serve_parser = verbs.add_parser("serve", help="let the job server serve the run's files, until the job is stopped")
    serve_parser.add_argument("--out", required=True, help="the run's folder")
    serve_parser.add_argument("--place", required=True, help="what to call it among Ray's logs")
    options = parser.parse_args()
    out = Path(options.out).expanduser()
    try:
        if options.verb == "run":
            status = run_job(options.words, out, options.store, options.code)
        else:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
            status = serve_run(out, _log_folder() / options.place, SERVE_SECONDS)
    except RaytrainError as error:
        print(f"raytrain: {error}", file=sys.stderr)
        status = error.exit_status
    sys.exit(status)


def run_job(words: list[str], out: Path, store_url: str | None, code: str) -> int:
    """Run the command, then copy the run's folder to the store, whatever the result; return the exit status.

    Raises:
        RecipeError: this is another raytrain than the one that checked the recipe, or the store cannot be written.
    """
    if code != fingerprint():
        raise RecipeError(
            f"raytrain {raytrain.__version__} at {Path(raytrain.__file__).parent} on {socket.gethostname()}, which runs"
            " the job, is not the raytrain that submitted it; install the same on the cluster, or submit --with-code"
        )
    store = Store(store_url) if store_url else None
    if store:
        store.announce(f"raytrain {shlex.join(words)}\n")
    stored, status = True, 1
    try:
        status = _command([*words, "--out", str(out)])
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a job that is stopped now has only this left to do
        refused = status == RecipeError.exit_status  # then what lies in the folder is of another run
        if store and not refused and out.is_dir():
            stored = _stored(store, str(store_url), out)
    return status or int(not stored)


def _command(words: list[str]) -> int:
    """Run the command `raytrain` in this process, which is the one that gets the signals, and return its status."""
    from raytrain.cli.main import main as command  # noqa: PLC0415 - slow to import

    sys.argv = ["raytrain", *words]
    try:
        command()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1


def _stored(store: Store, url: str, out: Path) -> bool:
    """Copy the run's folder to the store, and return whether it worked; if not, the folder is still there."""
    try:
        count = store.put(out)
    except Exception as error:  # of any package
        print(
            f"raytrain: {out} could not be stored at {url}: {type(error).__name__}: {error}\n"
            f"it stays where it is on {socket.gethostname()}, from where `raytrain fetch {out.name}` brings it",
            file=sys.stderr,
        )
        return False
    print(f"stored at {url}: {format_mib(count)}")
    return True


def serve_run(out: Path, place: Path, seconds: float) -> int:
    """Serve a run's files by Ray's dashboard, which serves the folder of logs, for a while.

    Args:
        out: the run's folder.
        place: among the logs, where links to its files and their list go; there is nothing at the end.
        seconds: how long, unless the process is asked to end before.

    Raises:
        RecipeError: there is no run.
    """
    if not out.is_dir():
        raise RecipeError(f"there is no run in {out} on {socket.gethostname()}: the job left none, or it was removed")
    place.mkdir(mode=0o700)
    try:
        listing = list_files(out)
        for name in listing:  # and not the folder, in which there may be links
            link = place / "run" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(out.absolute() / name)
        write_atomic(place / LIST, dump(listing))
        time.sleep(seconds)
    finally:
        shutil.rmtree(place)
    return 0


def _log_folder() -> Path:
    """Return the folder of Ray's logs on this machine, which is where the output of a job goes.

    Raises:
        RecipeError: this is not a job, or not on Linux.
    """
    try:
        log = Path(os.readlink("/proc/self/fd/1"))
    except OSError as error:
        raise RecipeError(f"cannot find Ray's logs on this machine: {error}; use submit --storage") from error
    if not log.name.startswith(JOB_LOG):
        raise RecipeError(f"this is for a Ray job, whose output goes to a file {JOB_LOG}*; here it goes to {log}")
    return log.parent


if __name__ == "__main__":
    run_entry()
