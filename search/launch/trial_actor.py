"""The actor of a slot: it imports and loads once, and then trains whatever segment it is given."""

import logging
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import raytrain
from raytrain.errors import RecipeError
from raytrain.launch.version import fingerprint
from raytrain.training.recipe import TrainRecipe
from search.launch.trial import Trial
from search.scheduling.driver import SegmentEnd, attempt
from search.scheduling.work import Failed, Work


@dataclass(frozen=True, slots=True)
class TrialOptions:
    """What a trial is told when its process starts.

    Attributes:
        base: the recipe whose fields are searched, as plain data.
        threads: to compute with; sums depend on it.
        import_from: folders to import the user's modules from.
        code: the fingerprint of raytrain on the driver's machine.
    """

    base: Mapping[str, Any]
    threads: int
    import_from: Sequence[str]
    code: str


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of progress.

    Attributes:
        count: of such signs; one that grows no more is a segment that hangs.
        step: optimizer steps done.
    """

    count: int = 0
    step: int = 0


class TrialActor:
    """Trains one segment at a time; `beat` and `stop` answer meanwhile, on a thread of their own.

    Args:
        options: of the trial.
    """

    def __init__(self, options: TrialOptions) -> None:
        self._options = options
        self._beat = Beat()

    def load(self) -> str:
        """Make ready to train, and return the machine's name.

        Raises:
            RecipeError: another raytrain is installed here, or the recipe does not fit it.
        """
        logging.getLogger().setLevel(logging.WARNING)
        if self._options.code != fingerprint():
            raise RecipeError(
                f"raytrain at {Path(raytrain.__file__).parent} on {socket.gethostname()} is not the raytrain of the "
                "command; install the same version on every machine"
            )
        sys.path.extend(path for path in self._options.import_from if path not in sys.path)
        base = TrainRecipe.parse(self._options.base)
        device = torch.device("cuda" if base.resources.gpus else "cpu")
        self._trial = Trial(base, device, self._note)
        return socket.gethostname()

    def train(self, work: Work, state: bytes | None) -> SegmentEnd | Failed:
        """Train a segment."""
        torch.set_num_threads(self._options.threads)  # of this thread
        return attempt(work, state, self._trial.train)

    def beat(self) -> Beat:
        """Return the last sign of progress."""
        return self._beat

    def stop(self) -> None:
        """End the segment after the step that it is at."""
        self._trial.stop.set()

    def _note(self, step: int) -> None:
        self._beat = Beat(self._beat.count + 1, step)
