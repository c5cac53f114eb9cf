"""Loggers of libraries that are changed for a while: those of the calling program are the user's."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def restored_loggers(*names: str) -> Iterator[None]:
    """Restore the level, the handlers and the propagation of loggers at the end of the `with` block.

    Args:
        names: of the loggers that the block, or a library that it calls, changes.
    """
    before = [
        (logger, logger.level, list(logger.handlers), logger.propagate) for logger in map(logging.getLogger, names)
    ]
    try:
        yield
    finally:
        for logger, level, handlers, propagate in before:
            logger.setLevel(level)
            logger.handlers = handlers
            logger.propagate = propagate


@contextmanager
def only_errors(*names: str) -> Iterator[None]:
    """Let loggers write errors alone inside the `with` block."""
    with restored_loggers(*names):
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
