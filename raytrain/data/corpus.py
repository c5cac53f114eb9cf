"""Text to learn from: the standard library's source, a file or a folder, in documents with domains."""

import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raytrain.errors import RecipeError

EXCLUDED_STDLIB_FOLDERS = {"site-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}
"""Folders of the standard library that are not its source: what others installed, tests, which many machines lack, and
the manual's text as one generated string, which would be half of whatever split it falls into."""

SPEAKER = re.compile(rb"(?:\A|\n\n)([^\n:]{1,40}):\n")
"""A line of a play that says who speaks next."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text that belongs together.

    Attributes:
        name: its path inside the corpus.
        text: its bytes.
        domains: (offset in bytes, domain) of each part, the first at 0.
    """

    name: str
    text: bytes
    domains: tuple[tuple[int, str], ...]


def standard_library() -> list[Document]:
    """Return the source files of the Python standard library that runs this, with its top-level packages as domains."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path for path in root.rglob("*.py") if not EXCLUDED_STDLIB_FOLDERS.intersection(path.relative_to(root).parts)
    ]
    return _read(root, files)


def check_corpus(path: Path, pattern: str) -> None:
    """Check without reading any text that there is some.

    Raises:
        RecipeError: there is no such file or folder, or nothing in it.
    """
    if not path.exists():
        raise RecipeError(f"task.path: no such file or folder: {path}")
    if sum(file.stat().st_size for file in _files(path, pattern)) == 0:
        matching = "" if path.is_file() else f" in files that match task.pattern = {pattern!r}"
        raise RecipeError(f"task.path: there is no text at {path}{matching}")


def read_corpus(path: Path, pattern: str) -> list[Document]:
    """Return the text at `path`: one document for a file, one for each matching file of a folder.

    The domains of a play in a single file are its speakers; those of a folder are its top-level folders and files.
    """
    files = _files(path, pattern)
    if len(files) > 1:
        return _read(path, files)
    text = files[0].read_bytes()
    speakers = [(match.start(1), match.group(1).decode("utf-8", "replace")) for match in SPEAKER.finditer(text)]
    domains = speakers if len({name for _, name in speakers}) > 1 else []
    if not domains or domains[0][0] > 0:
        domains.insert(0, (0, files[0].stem))
    return [Document(files[0].name, text, tuple(domains))]


def split_corpus(documents: list[Document], share: float) -> dict[Literal["train", "valid"], list[Document]]:
    """Split a corpus: by document, or a single document by offset, its end being held out; a share of 1 is all of it.

    Which documents are held out depends on the hashes of their names, so it looks random and is the same everywhere.
    """
    if share == 1:
        return {"train": [], "valid": documents}
    if len(documents) == 1:
        whole = documents[0]
        at = round(len(whole.text) * (1 - share))
        while at < len(whole.text) and whole.text[at] & 0xC0 == 0x80:  # never inside a character
            at += 1
        return {"train": [_part(whole, 0, at)], "valid": [_part(whole, at, len(whole.text))]}
    ordered = sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest())
    count = min(len(ordered) - 1, max(1, round(len(ordered) * share)))
    by_name = {"train": ordered[count:], "valid": ordered[:count]}
    return {"train": sorted(by_name["train"], key=_name), "valid": sorted(by_name["valid"], key=_name)}


def alphabet_of(documents: Iterable[Document]) -> str:
    """Return the characters that there are, in order of their code points.

    Raises:
        RecipeError: a document is not UTF-8.
    """
    return "".join(sorted(set().union(*(_decoded(document) for document in documents))))


class ByteTokenizer:
    """Tokens that are bytes; 256 begins a document."""

    bos_id = 256
    vocab_size = 257

    def encode(self, document: Document) -> NDArray[np.uint16]:
        """Return the document's tokens, the first of which begins it, shape (bytes + 1,)."""
        return np.concatenate(
            [np.array([self.bos_id], np.uint16), np.frombuffer(document.text, np.uint8).astype(np.uint16)]
        )

    def count(self, text: bytes) -> int:
        """Return how many tokens the text has, without the one that begins a document."""
        return len(text)

    def bytes_per_token(self) -> NDArray[np.int64]:
        """Return how many bytes of text each token stands for, shape (size,)."""
        return np.append(np.ones(self.bos_id, np.int64), 0)


class CharacterTokenizer:
    """Tokens that are the characters of an alphabet, in their order; the last one begins a document.

    Args:
        alphabet: the characters.
    """

    def __init__(self, alphabet: str) -> None:
        self._alphabet = alphabet
        self.bos_id = len(alphabet)
        self.vocab_size = self.bos_id + 1
        self._table = np.full(sys.maxunicode + 1, self.bos_id, np.uint16)
        self._table[[ord(character) for character in alphabet]] = np.arange(len(alphabet))

    def encode(self, document: Document) -> NDArray[np.uint16]:
        """Return the document's tokens, the first of which begins it, shape (characters + 1,).

        Raises:
            RecipeError: it is not UTF-8, or has a character that the alphabet has not.
        """
        text = _decoded(document)
        tokens = self._table[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
        if (strange := tokens == self.bos_id).any():
            raise RecipeError(
                f"task.path: {document.name} has the character {text[int(strange.argmax())]!r}, which is not one of "
                f"task.alphabet, the {len(self._alphabet)} of the text that was learned from"
            )
        return np.concatenate([np.array([self.bos_id], np.uint16), tokens])

    def count(self, text: bytes) -> int:
        """Return how many tokens the text has, without the one that begins a document."""
        return len(text.decode())

    def bytes_per_token(self) -> NDArray[np.int64]:
        """Return how many bytes of text each token stands for, shape (size,)."""
        return np.array([len(character.encode()) for character in self._alphabet] + [0], np.int64)


def _files(path: Path, pattern: str) -> list[Path]:
    if path.is_file():
        return [path]
    inside = (file for file in path.glob(pattern) if file.is_file())
    return sorted(file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts))


def _read(root: Path, files: Iterable[Path]) -> list[Document]:
    documents = []
    for path in sorted(files):
        inside = path.relative_to(root)
        documents.append(
            Document(inside.as_posix(), path.read_bytes(), ((0, inside.parts[0].removesuffix(path.suffix)),))
        )
    return [document for document in documents if document.text]


def _part(document: Document, start: int, end: int) -> Document:
    """Return document.text[start:end] with the domains that hold there."""
    here = [domain for offset, domain in document.domains if offset <= start][-1]
    later = [(offset - start, domain) for offset, domain in document.domains if start < offset < end]
    return Document(document.name, document.text[start:end], ((0, here), *later))


def _name(document: Document) -> str:
    return document.name


def _decoded(document: Document) -> str:
    try:
        return document.text.decode()
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"task.path: {document.name} is not UTF-8 (byte {error.start}), so it has no characters; "
            "use task.tokens = 'bytes'"
        ) from None
