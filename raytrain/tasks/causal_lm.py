"""Causal language modelling of documents with a Hugging Face model, pretrained or from scratch."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raytrain.data.cache import Example, StoredExamples, token_count
from raytrain.data.collate import lm_batch, token_losses, token_weights
from raytrain.data.columns import domain_of, text_of
from raytrain.data.records import read_records
from raytrain.errors import RecipeError
from raytrain.models.generation import generate_texts
from raytrain.models.pretrained import Pretrained
from raytrain.tasks.options import CausalLmOptions, Overflow
from raytrain.tasks.splits import SplitName, Splits
from raytrain.tasks.task import Task

_DEFAULT_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A tokenized document.

    Attributes:
        tokens: shape (n,), with the tokenizer's prefix, and the end-of-text token at the end.
        bytes_per_token: bytes of the text for each token, shape (n,); zeros if unknown.
        where: location, for error messages.
        domain: of the document.
    """

    tokens: NDArray[np.int64]
    bytes_per_token: NDArray[np.int64]
    where: str
    domain: str


def causal_lm(options: CausalLmOptions) -> Task:
    """Causal language modelling of documents with a Hugging Face model."""
    methods = _CausalLm(options)
    return Task(
        model=methods.model,
        data=methods.data,
        losses=token_losses,
        weights=token_weights,
        collate=methods.collate,
        length=token_count,
        measure=methods.measure,
        infer_options=methods.infer_options,
        inputs=methods.inputs,
        predict=methods.predict,
        export=methods.export,
    )


class _CausalLm:
    def __init__(self, options: CausalLmOptions) -> None:
        self._options = options
        self._pretrained = Pretrained(options, "AutoModelForCausalLM")
        self._splits = Splits(options, (options.text,), options.document)
        self._length = self._pretrained.context_length(options.length, _DEFAULT_LENGTH)
        self._end = self._pretrained.eos_id()
        self.data = cache(self._data)  # the examples go when the task does

    def infer_options(self) -> dict[str, Any]:
        for record in self._splits.first_records():
            text_of(record, "text", self._options.text)
        return {}

    def model(self, seed: int) -> nn.Module:
        module: nn.Module = self._pretrained.prepare(self._pretrained.load_module(seed))
        return module

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        rows = [example["tokens"] for example in examples]
        batch = lm_batch([row[:-1] for row in rows], [row[1:] for row in rows], self._end)
        return {**batch, "bytes": torch.tensor([example["bytes"] for example in examples])}

    def measure(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        loss = float(token_losses(module, batch).double().sum())
        size = float(batch["bytes"].sum())
        known = {"bits_per_byte": (loss / math.log(2), size)} if size else {}
        return {"loss": (loss, float(token_weights(batch).sum())), **known}

    def inputs(self, path: Path) -> list[Example]:
        column = self._options.text
        texts = (text_of(record, "text", column) for record in read_records(path, (column,)))
        return [{"tokens": self._pretrained.tokenize(text)} for text in texts]

    def predict(self, module: nn.Module, examples: Sequence[Example]) -> list[dict[str, Any]]:
        prompts = [example["tokens"] for example in examples]
        written = generate_texts(module, self._pretrained, prompts, self._options.new_tokens, [self._end])
        return [{"text": text} for text in written]

    def export(self, module: nn.Module, folder: Path) -> None:
        self._pretrained.export(module, folder)

    def _data(self, part: SplitName) -> StoredExamples:
        options = self._options
        asked = [options.text, options.domain, options.packed, options.overflow]
        key = [self._splits.fingerprint(part), self._pretrained.fingerprint, self._length, asked]
        columns = {"tokens": "tokens", "bytes": "int64", "domain": "string"}
        return StoredExamples(lambda: self._examples(part), columns, key)

    def _examples(self, part: SplitName) -> Iterator[Example]:
        if self._options.packed:
            return pack_documents(self._documents(part), self._length)
        return (
            each for one in self._documents(part) for each in split_document(one, self._length, self._options.overflow)
        )

    def _documents(self, part: SplitName) -> Iterator[Tokenized]:
        empty = True
        for record in self._splits.records(part):
            text = text_of(record, "text", self._options.text)
            if text.strip():
                empty = False
                tokens, ends = self._pretrained.tokenize_with_ends(text)
                tokens.append(self._end)
                widths = byte_widths(text, np.array([*ends, len(text)])) if ends else np.zeros(len(tokens), np.int64)
                yield Tokenized(np.array(tokens), widths, record.where, domain_of(record, self._options.domain))
        if empty:
            raise RecipeError(f"task.path: the {part} part of {self._options.path} has no text")


def byte_widths(text: str, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of bytes of a text for each token, shape (n,); their sum is the text's size.

    Args:
        text: the tokenized text.
        ends: end of each token in characters, shape (n,); arbitrary for special tokens.
    """
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return np.diff(offsets[np.maximum.accumulate(ends)], prepend=0)


def split_document(document: Tokenized, length: int, overflow: Overflow) -> Iterator[Example]:
    """Yield the examples of one document, each of at most `length` tokens and the next one.

    Raises:
        RecipeError: the document is longer, and `task.overflow` is "error".
    """
    predicted = len(document.tokens) - 1
    if predicted > length and overflow == "error":
        raise RecipeError(
            f"task.overflow: {document.where}: the document has {predicted} tokens, and task.length is {length}; set "
            "task.overflow=truncate to take its beginning, task.overflow=split to make several examples of it, or "
            "task.packed=true"
        )
    for start in range(0, length if overflow == "truncate" else predicted, length):
        piece = slice(start, start + length + 1)
        yield _example(document.tokens[piece], document.bytes_per_token[piece], document.domain)


def pack_documents(documents: Iterable[Tokenized], length: int) -> Iterator[Example]:
    """Yield examples packed from concatenated documents, each of `length` tokens and the next one.

    An example starts with the last token of the one before, so that each token but the first is predicted once. The
    last example may be shorter.
    """
    domains: list[str] = []
    stream = np.zeros((3, 0), np.int64)  # tokens, bytes per token, indices of domains
    for document in documents:
        domains.append(document.domain)
        place = np.full(len(document.tokens), len(domains) - 1)
        stream = np.concatenate([stream, np.stack([document.tokens, document.bytes_per_token, place])], axis=1)
        while stream.shape[1] > length:
            yield _example(stream[0, : length + 1], stream[1, : length + 1], domains[stream[2, 0]])
            stream = stream[:, length:]
    if stream.shape[1] > 1:
        yield _example(stream[0], stream[1], domains[stream[2, 0]])


def _example(tokens: NDArray[np.int64], widths: NDArray[np.int64], domain: str) -> Example:
    return {"tokens": tokens, "bytes": int(widths[1:].sum()), "domain": domain}
