"""Text for the user's terminal, which obeys what is written to it: text of others could clear it, or hide lines."""

import re

# All but line ends and tabs: C0 and C1 controls, invisible marks, overrides of the direction, and halves of characters.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Return text without what is no text; line ends and tabs stay."""
    return _CONTROLS.sub("", text)


def printable_line(text: str) -> str:
    """Return text in one line, without what is no text."""
    return " ".join(printable(text).split())


def format_mib(size: int) -> str:
    """Return a number of bytes for people."""
    return f"{size / 2**20:.1f} MiB"
