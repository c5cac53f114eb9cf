"""Text corpora (a file, a folder, Python's standard library), and byte and character tokenizers."""

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
"""Folders of the standard library that are left out: installed packages, tests (which many machines lack), and the
manual's text in one generated string, which would be half of its split."""

SPEAKER = re.compile(rb"(?:\A|\n\n)([^\n:]{1,40}):\n")
"""A speaker line of a play."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document of a corpus.

    Attributes:
        name: path inside the corpus.
        text: contents in bytes.
        domains: (offset in bytes, domain) of each part; the first offset is 0.
    """

    name: str
    text: bytes
    domains: tuple[tuple[int, str], ...]


def standard_library() -> list[Document]:
    """Return the source files of Python's standard library; domains are its top-level packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path for path in root.rglob("*.py") if not EXCLUDED_STDLIB_FOLDERS.intersection(path.relative_to(root).parts)
    ]
    return _read(root, files)


def check_corpus(path: Path, pattern: str) -> None:
    """Check that there is text at a path, without reading it.

    Raises:
        RecipeError: there is no such file or folder, or it is empty.
    """
    if not path.exists():
        raise RecipeError(f"task.path: no such file or folder: {path}")
    if sum(file.stat().st_size for file in _files(path, pattern)) == 0:
        matching = "" if path.is_file() else f" in files that match task.pattern = {pattern!r}"
        raise RecipeError(f"task.path: there is no text at {path}{matching}")


def read_corpus(path: Path, pattern: str) -> list[Document]:
    """Read a corpus: one document for a file, or for each file of a folder that matches a pattern.

    Domains are the speakers of a play in a single file, or the top-level folders and files of a folder.

    Raises:
        RecipeError: there is none.
    """
    check_corpus(path, pattern)
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
    """Split a corpus into training and held-out documents; of a single document, the end is held out.

    Documents are chosen by hashes of their names: pseudo-random, and the same everywhere.

    Args:
        documents: of the corpus.
        share: fraction that is held out; 1: everything.
    """
    if share == 1:
        return {"train": [], "valid": documents}
    if len(documents) == 1:
        whole = documents[0]
        at = round(len(whole.text) * (1 - share))
        while at < len(whole.text) and whole.text[at] & 0xC0 == 0x80:  # not inside a UTF-8 sequence
            at += 1
        return {"train": [_part(whole, 0, at)], "valid": [_part(whole, at, len(whole.text))]}
    ordered = sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest())
    count = min(len(ordered) - 1, max(1, round(len(ordered) * share)))
    by_name = {"train": ordered[count:], "valid": ordered[:count]}
    return {"train": sorted(by_name["train"], key=_name), "valid": sorted(by_name["valid"], key=_name)}


def alphabet_of(documents: Iterable[Document]) -> str:
    """Return the distinct characters of documents, sorted by code point.

    Raises:
        RecipeError: a document is not UTF-8.
    """
    return "".join(sorted(set().union(*(_decoded(document) for document in documents))))


class ByteTokenizer:
    """Byte tokens; 256 is the beginning of a document."""

    bos_id = 256
    vocab_size = 257

    def encode(self, document: Document) -> NDArray[np.uint16]:
        """Return the beginning-of-document token and the document's tokens, shape (bytes + 1,)."""
        return np.concatenate(
            [np.array([self.bos_id], np.uint16), np.frombuffer(document.text, np.uint8).astype(np.uint16)]
        )

    def count(self, text: bytes) -> int:
        """Return the number of tokens of a text, without a beginning-of-document token."""
        return len(text)

    def bytes_per_token(self) -> NDArray[np.int64]:
        """Return the number of bytes of each token, shape (vocab_size,)."""
        return np.append(np.ones(self.bos_id, np.int64), 0)


class CharacterTokenizer:
    """Character tokens, in the order of an alphabet; the last token is the beginning of a document.

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
        """Return the beginning-of-document token and the document's tokens, shape (characters + 1,).

        Raises:
            RecipeError: it is not UTF-8, or has a character outside the alphabet.
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
        """Return the number of tokens of a text, without a beginning-of-document token."""
        return len(text.decode())

    def bytes_per_token(self) -> NDArray[np.int64]:
        """Return the number of bytes of each token, shape (vocab_size,)."""
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
    """Return the document text[start:end], with its domains."""
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
