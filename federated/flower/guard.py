"""Whether a deployment is closed to strangers: TLS, and keys by which SuperNodes are known.

Flower does not tell its apps how it was started. But the process of an app is a child of the SuperLink or the
SuperNode, unless that was started with `--isolation process`. So its words are read from there, on Linux.
"""

import logging
import os
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
        RecipeError: it was started without TLS or without keys.
    """
    if insecure:
        return
    words = words_of_ancestor(program)
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
    """Return the words of the nearest process above this one that runs a program; None: there is none to see."""
    pid = os.getppid()
    while pid > 0:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            status = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        if any(Path(word).name == program for word in words):
            return words
        pid = int(status.rpartition(")")[2].split()[1])  # the name before it may hold anything
    return None
