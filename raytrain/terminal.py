"""Sanitized text for the terminal: control characters in foreign text could clear it or hide lines."""

import re
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# C0 and C1 controls but line ends and tabs, zero-width characters, bidirectional overrides, and lone surrogates.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Return text without control characters; line ends and tabs stay."""
    return _CONTROLS.sub("", text)


def printable_line(text: str) -> str:
    """Return text in one line, without control characters."""
    return " ".join(printable(text).split())


def progress_console() -> "Console":
    """Return where progress is shown: standard error; in a notebook, where that is red, plain lines below the cell."""
    from rich.console import Console  # noqa: PLC0415 - most of those who print a line need no more

    if Console().is_jupyter:  # it cannot redraw a bar in place, and says that it has colours
        return Console(force_jupyter=False, force_terminal=False, highlight=False, soft_wrap=True)
    return Console(stderr=True, highlight=False, soft_wrap=True)


def format_time(seconds: float) -> str:
    """Format seconds since the epoch as local time; "" where no calendar has it."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return ""


def format_mib(size: int) -> str:
    """Format a number of bytes in MiB."""
    return f"{size / 2**20:.1f} MiB"
