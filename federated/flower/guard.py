"""Whether a deployment is closed to strangers: TLS, and keys by which SuperNodes are known.

Flower does not tell its apps how it was started. But the process of an app is a child of the SuperLink or the
SuperNode, unless that was started with `--isolation process`. So its words are read from there: from /proc, or by `ps`
where there is none.
"""

import logging
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from raytrain.errors import RecipeError

ASKED: Mapping[str, Mapping[str, str]] = {
    "flower-superlink": {
        "--ssl-certfile": "whoever is on the way could read and change all messages",
        "--enable-supernode-auth": "any SuperNode that reaches it could take part",
    },
    "flower-supernode": {"--auth-supernode-private-key": "the SuperLink could not know it"},
}
"""Program -> option -> what would be without it."""

logger = logging.getLogger(__name__)


def check_closed(program: str, *, insecure: bool) -> None:
    """Refuse to take part in a deployment that is open to strangers.

    Args:
        program: "flower-superlink" or "flower-supernode", the one that started this process.
        insecure: the user wants it so.

    Raises:
        RecipeError: it was started without TLS or without keys, or processes cannot be looked at.
    """
    if insecure:
        return
    try:
        words = words_of_ancestor(program)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise RecipeError(
            f"{program}: expected to see how it was started, in /proc or by ps; got {error}. Make sure that it has TLS "
            "and keys of SuperNodes, and set insecure=true in --run-config, and in --node-config"
        ) from None
    if words is None:
        logger.warning("%s: cannot see how it was started; it needs TLS, and keys of SuperNodes", program)
        return
    if "--simulation" in words:  # on this machine alone
        return
    given = {word.partition("=")[0] for word in words}
    open_to = {"--insecure": "messages are not encrypted"} if "--insecure" in given else {}
    open_to |= {option: why for option, why in ASKED[program].items() if option not in given}
    if open_to:
        listed = "; ".join(f"{option}: {why}" for option, why in open_to.items())
        raise RecipeError(
            f"{program}: expected TLS and keys of SuperNodes, by {', '.join(ASKED[program])} and without --insecure; "
            f"got {listed}. Set insecure=true in --run-config, and in --node-config, to do without"
        )


def words_of_ancestor(program: str) -> list[str] | None:
    """Return the words of the nearest process above this one that runs a program; None: there is none.

    Raises:
        OSError, ValueError, subprocess.SubprocessError: processes cannot be looked at.
    """
    look = look_in_proc if Path("/proc/self/stat").is_file() else look_by_ps
    pid = os.getppid()
    while pid > 0:
        words, above = look(pid)
        if any(Path(word).name == program for word in words):
            return words
        pid = above
    return None


def look_in_proc(pid: int) -> tuple[list[str], int]:
    """Return the words of a process and the id of its parent, as Linux shows them in files."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    status = Path(f"/proc/{pid}/stat").read_text()
    return words, int(status.rpartition(")")[2].split()[1])  # the name before it may hold anything


def look_by_ps(pid: int) -> tuple[list[str], int]:
    """Return the words of a process and the id of its parent, as `ps` does on macOS and elsewhere."""
    shown = subprocess.run(
        ["ps", "-ww", "-o", "ppid=,args=", "-p", str(pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    return shown[1:], int(shown[0])
