"""Ctrl-C while Ray starts is heard, wherever it falls."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from raytrain.launch.session import kept_interrupts

armed = threading.Event()


def interrupt() -> None:
    if armed.is_set():
        armed.clear()
        signal.raise_signal(signal.SIGINT)


os.register_at_fork(before=interrupt)


@pytest.fixture(autouse=True)
def usual_handler() -> Iterator[None]:
    """Python's own handler, also after a library in this process has set another one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ctrl_c_in_a_hook_of_fork_is_raised_afterwards() -> None:
    forked = False
    with pytest.raises(KeyboardInterrupt), kept_interrupts():  # noqa: PT012
        armed.set()
        if not (child := os.fork()):
            os._exit(0)
        os.waitpid(child, 0)
        forked = True  # Python has ignored it
    assert forked
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_any_other_ctrl_c_is_raised_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), kept_interrupts():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")


def test_what_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with kept_interrupts():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
