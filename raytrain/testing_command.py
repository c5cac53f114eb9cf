"""The command for tests, as a process forked from one that has imported its modules."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from raytrain.testing import fork_server

EXIT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Command:
    """A command that runs.

    Attributes:
        process: that runs it, the leader of a session, as what a shell starts.
        folder: holds what it prints, until it has ended.
    """

    process: BaseProcess
    folder: Path

    @property
    def pid(self) -> int:
        """Return the process id, which is that of the session too."""
        return self.process.pid or 0

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()

    def finish(self) -> tuple[int, str, str]:
        """Wait for its end, and return (exit status, standard output, standard error).

        Raises:
            TimeoutError: it does not end.
        """
        self.process.join(EXIT_SECONDS)
        out, err = ((self.folder / name).read_text() for name in ("out", "err"))
        if self.process.exitcode is None:
            raise TimeoutError(f"the command has not ended in {EXIT_SECONDS:g} s; it said: {err}")
        shutil.rmtree(self.folder)
        return self.process.exitcode, out, err


def start_command(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Command:
    """Start `raytrain WORDS` in a folder, with an environment."""
    output = Path(tempfile.mkdtemp(prefix="raytrain-command-"))
    for name in ("out", "err"):
        (output / name).touch()
    process = fork_server().Process(target=_command, args=(list(words), str(folder), dict(environment), str(output)))
    process.start()
    return Command(process, output)


def _command(words: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    """Become the command."""
    os.setsid()
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_APPEND), stream.fileno())
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["raytrain", *words]
    # Who only starts it needs neither.
    from raytrain.cli.main import main  # noqa: PLC0415
    from raytrain.launch.forked_processes import FORK_SERVER, fork_ray_processes  # noqa: PLC0415
    from raytrain.launch.private_cluster import reload_ray_environment  # noqa: PLC0415

    reload_ray_environment()
    if FORK_SERVER in environment:
        fork_ray_processes()
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # a process that was forked ends without
