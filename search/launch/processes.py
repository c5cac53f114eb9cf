"""The process of a slot on this machine, without Ray.

It is forked from a server that has imported torch, so that it is there at once. Segments and their ends go through a
pipe; signs of progress, and the request to stop, through memory that both share, so that neither waits for the other.
"""

import multiprocessing
import os
from collections.abc import MutableSequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed.elastic.utils.process_state import read_proc_state

from raytrain.errors import RaytrainError, TrainingError
from raytrain.launch.forkserver import leave_command, without_main
from raytrain.training.recipe import TrainRecipe
from search.launch.slots import Beat, SlotDiedError, SlotEnd
from search.launch.trial import Trial
from search.launch.trial_options import TrialOptions, prepare_process
from search.scheduling.driver import attempt
from search.scheduling.work import Work

COUNT, STEP, STOP = range(3)
"""Places in the shared memory: signs of progress, optimizer steps done, whether to stop."""
SUSPENDED = "T"
"""State of a process, as the kernel has it."""


class SlotProcess:
    """A process that trains segments, one after the other.

    Args:
        options: of the trial that it trains.
    """

    def __init__(self, options: TrialOptions) -> None:
        context = multiprocessing.get_context("forkserver")
        self._connection, theirs = context.Pipe()
        self._shared: MutableSequence[int] = context.RawArray("q", 3)
        told = (theirs, self._shared, options, dict(os.environ))
        self._process = context.Process(target=_serve, args=told, daemon=True)
        with without_main():
            self._process.start()
        theirs.close()
        self._caller = ThreadPoolExecutor(1)  # a pipe to a process that is stopped can be full

    def load(self) -> Future[Any]:
        """Begin to start it; the future has the machine's name."""
        return self._caller.submit(self._receive)

    def train(self, work: Work, state: bytes | None) -> Future[Any]:
        """Begin to train a segment; the future has its end."""
        self._shared[STEP] = work.snapshot.step
        return self._caller.submit(self._call, work, state)

    def beat(self) -> Beat | None:
        """Return the last sign of progress, or None if the process is stopped."""
        if read_proc_state(self._process.pid or 0) == SUSPENDED:
            return None
        return Beat(self._shared[COUNT], self._shared[STEP])

    def stop(self) -> None:
        """Ask for the end of the segment after the step that it is at."""
        self._shared[STOP] = 1

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.join()
        self._caller.shutdown(cancel_futures=True)
        self._connection.close()

    def _call(self, work: Work, state: bytes | None) -> SlotEnd:
        try:
            self._connection.send((work, state))
        except OSError as error:
            raise SlotDiedError(str(error)) from error
        end: SlotEnd = self._receive()
        return end

    def _receive(self) -> Any:
        """Return an answer.

        Raises:
            RaytrainError: the answer is this error.
            SlotDiedError: the process has died.
        """
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise SlotDiedError(str(error)) from error
        if isinstance(answer, RaytrainError):
            raise answer
        return answer


def _serve(
    connection: Connection, shared: MutableSequence[int], options: TrialOptions, environment: dict[str, str]
) -> None:
    """Train segments as long as there are some."""
    leave_command()
    os.environ.update(environment)  # the server has that of the first search
    torch.set_num_threads(options.threads)
    try:
        host = prepare_process(options)
        trial = Trial(TrainRecipe.parse(options.base), torch.device("cpu"), lambda step: _beat(shared, trial, step))
    except Exception as error:  # also in the user's modules
        connection.send(error if isinstance(error, RaytrainError) else TrainingError(f"a slot cannot start: {error}"))
        return
    connection.send(host)
    while True:
        work, state = connection.recv()
        connection.send(attempt(work, state, trial.train))


def _beat(shared: MutableSequence[int], trial: Trial, step: int) -> None:
    shared[COUNT], shared[STEP] = shared[COUNT] + 1, step
    if shared[STOP]:
        trial.stop()
