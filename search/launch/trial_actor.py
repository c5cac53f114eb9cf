"""The actors of a slot on a Ray cluster: each imports and loads once, and then trains whatever segment it is given."""

import secrets
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import ray
import torch

from raytrain.kinds import load_kind
from raytrain.sync.transport import GroupTransport, PeerLostError, free_address, join_group
from raytrain.training.recipe import TrainRecipe
from search.launch.slots import Beat
from search.launch.trial import Trial
from search.launch.trial_options import TrialOptions, prepare_process
from search.launch.whole_run import WholeRun
from search.scheduling.driver import SegmentEnd, attempt
from search.scheduling.work import Failed, Work

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
        host = prepare_process(self._options)
        self._peers = list(peers)
        if peers:
            self._meet()
        self._trial = self._load()
        return host

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
        self._beat = Beat(self._beat.count, work.snapshot.step)
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
