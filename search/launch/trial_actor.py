"""The actors of a slot: each imports and loads once, and then trains whatever segment it is given."""

import logging
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

import raytrain
from raytrain.errors import RecipeError
from raytrain.kinds import load_kind
from raytrain.launch.version import fingerprint
from raytrain.sync.transport import GroupTransport, PeerLostError, free_address, join_group
from raytrain.training.recipe import TrainRecipe
from search.launch.trial import Trial
from search.launch.whole_run import WholeRun
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
        whole_runs_in: the search's folder, if each trial is a whole run; None: it trains segments.
    """

    base: Mapping[str, Any]
    threads: int
    import_from: Sequence[str]
    code: str
    whole_runs_in: Path | None = None


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of progress.

    Attributes:
        count: of such signs; one that grows no more is a segment that hangs.
        step: optimizer steps done.
    """

    count: int = 0
    step: int = 0


PEER_SECONDS = 2.0
"""How long the first worker, which has failed, waits for what the others say of it."""


class TrialActor:
    """Trains one segment at a time; `beat` and `stop` answer meanwhile, on a thread of their own.

    Args:
        options: of the trial.
    """

    def __init__(self, options: TrialOptions) -> None:
        self._options = options
        self._beat = Beat()

    def load(self, peers: Sequence[Any] = ()) -> str:
        """Make ready to train, and return the machine's name.

        Args:
            peers: the actors of the trial's other workers, if this one is the first of several.

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
        self._peers = list(peers)
        if peers:
            self._meet()
        self._trial = self._load()
        return socket.gethostname()

    def _meet(self) -> None:
        """Form a process group with the other workers."""
        loading = [peer.load.remote() for peer in self._peers]
        address, secret = free_address(ray.util.get_node_ip_address()), secrets.token_hex(16)
        members = 1 + len(self._peers)
        joining = [peer.join.remote(rank, members, address, secret) for rank, peer in enumerate(self._peers, start=1)]
        self.join(0, members, address, secret)
        ray.get([*loading, *joining])

    def join(self, rank: int, members: int, address: tuple[str, int], secret: str) -> None:
        """Join the process group of a trial of several workers; see `join_group`."""
        base = TrainRecipe.parse(self._options.base)
        backend = "cpu:gloo,cuda:nccl" if base.resources.gpus else "gloo"
        join_group(backend, rank, members, address, base.sync.timeout_seconds, secret)

    def _load(self) -> Trial | WholeRun:
        raw, folder = self._options.base, self._options.whole_runs_in
        if folder is not None:
            return WholeRun(load_kind(raw["kind"]).recipe_class().parse(raw), folder)
        base = TrainRecipe.parse(raw)
        device, timeout_seconds = torch.device("cuda" if base.resources.gpus else "cpu"), base.sync.timeout_seconds
        connect = (lambda: closing(GroupTransport(device, timeout_seconds))) if base.workers > 1 else None
        return Trial(base, device, self._note, connect)

    def train(self, work: Work, state: bytes | None) -> SegmentEnd | Failed:
        """Train a segment, with the other workers if there are some."""
        torch.set_num_threads(self._options.threads)  # of this thread
        theirs = [peer.train.remote(work, state) for peer in self._peers]
        own = attempt(work, state, self._trial.train)
        if not theirs:
            return own
        ended = ray.wait(theirs, num_returns=len(theirs), timeout=PEER_SECONDS if isinstance(own, Failed) else None)[0]
        failures = [end for end in [own, *ray.get(ended)] if isinstance(end, Failed)]
        return min(failures, key=lambda failure: PeerLostError.__name__ in failure.message, default=own)

    def beat(self) -> Beat:
        """Return the last sign of progress; for a whole run, that this process lives: its kind sees to the rest."""
        if isinstance(self._trial, WholeRun):
            self._note(0)
            if self._trial.stopping:
                self._trial.stop()
        return self._beat

    def stop(self) -> None:
        """End the segment after the step that it is at."""
        self._trial.stop()

    def _note(self, step: int) -> None:
        self._beat = Beat(self._beat.count + 1, step)
