"""What the processes of a slot are told when they start, and what they do with it first."""

import logging
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import raytrain
from raytrain.errors import RecipeError
from raytrain.launch.version import fingerprint


@dataclass(frozen=True, slots=True)
class TrialOptions:
    """What a trial is told when its process starts.

    Attributes:
        base: the recipe whose fields are searched, as plain data.
        threads: to compute with; sums depend on it.
        import_from: folders to import the user's modules from.
        code: the fingerprint of raytrain on the driver's machine.
        whole_runs_in: the search's folder, if each trial is a whole run; None: it trains segments.
    """

    base: Mapping[str, Any]
    threads: int
    import_from: Sequence[str]
    code: str
    whole_runs_in: Path | None = None


def prepare_process(options: TrialOptions) -> str:
    """Prepare this process to train, and return the machine's name.

    Raises:
        RecipeError: another raytrain is installed here.
    """
    logging.getLogger().setLevel(logging.WARNING)
    if options.code != fingerprint():
        raise RecipeError(
            f"raytrain at {Path(raytrain.__file__).parent} on {socket.gethostname()} is not the raytrain of the "
            "command; install the same version on every machine"
        )
    sys.path.extend(path for path in options.import_from if path not in sys.path)
    return socket.gethostname()
