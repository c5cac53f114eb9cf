"""Causal language modelling of bytes or characters, with a small GPT-2, Llama or recurrent network."""

import lzma
import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raytrain.data import corpus
from raytrain.data.collate import IGNORE_INDEX, token_cross_entropy, token_weights
from raytrain.data.corpus import ByteTokenizer, CharacterTokenizer, Document
from raytrain.errors import RecipeError
from raytrain.tasks.options import TextOptions
from raytrain.tasks.task import Task
from raytrain.tensors import at_least_float32

XZ_LIMIT_BYTES = 64 << 20

Window = tuple[NDArray[np.uint16], int]
"""(tokens, one more than the input; number of leading predictions without a target)."""


class TextExamples:
    """Windows of concatenated documents.

    Training windows start at every token, so an epoch has as many examples as tokens. Held-out windows are inside one
    document and predict each of its tokens exactly once, the first one included.

    Args:
        documents: the documents.
        tokens: the tokenizer.
        block: context length in tokens.
        stride: distance between held-out windows; 0: training windows.
    """

    def __init__(
        self, documents: Sequence[Document], tokens: ByteTokenizer | CharacterTokenizer, block: int, stride: int
    ) -> None:
        encoded = [tokens.encode(document) for document in documents]
        begins = np.cumsum([0, *(len(part) for part in encoded)])
        self._stream = np.concatenate([*encoded, np.array([tokens.bos_id], np.uint16)])
        self._block = block
        self._windows = _held_out_windows(begins, block, stride) if stride else None
        self._starts = np.concatenate(
            [begins[:0], *(begin + _starts(part, tokens) for begin, part in zip(begins[:-1], documents, strict=True))]
        )
        self._domains = [domain for document in documents for _, domain in document.domains]
        self._classes = {domain: place for place, domain in enumerate(sorted(set(self._domains)))}

    def __len__(self) -> int:
        """Return the number of windows."""
        return max(0, len(self._stream) - self._block) if self._windows is None else len(self._windows)

    def __getitem__(self, index: int) -> Window:
        """Return window `index`."""
        if self._windows is None:
            return self._stream[index : index + self._block + 1], 0
        start, end, unscored = self._windows[index]
        return self._stream[start:end], int(unscored)

    def domain(self, index: int) -> str:
        """Return the domain of the window's first token: a package, file or speaker."""
        start = index if self._windows is None else self._windows[index][0]
        return self._domains[int(np.searchsorted(self._starts, start, side="right")) - 1]

    def label(self, index: int) -> int:
        """Return the index of the domain in the sorted domains."""
        return self._classes[self.domain(index)]


def text(options: TextOptions) -> Task:
    """Language modelling of bytes or characters, with a small GPT-2, Llama or recurrent network."""

    @cache
    def tokens() -> ByteTokenizer | CharacterTokenizer:
        return (
            ByteTokenizer()
            if options.tokens == "bytes"
            else CharacterTokenizer(options.alphabet or _corpus(options)[1])
        )

    def infer_options() -> dict[str, str]:
        if options.path is not None:
            corpus.check_corpus(options.path, options.pattern)
        learns = options.tokens == "chars" and not options.alphabet
        return {"alphabet": _corpus(options)[1]} if learns else {}

    def model(seed: int) -> nn.Module:
        return _model(options, tokens().vocab_size, seed)

    def data(split: Literal["train", "valid"]) -> TextExamples:
        stride = (options.stride or options.block) if split == "valid" else 0
        examples = TextExamples(_corpus(options)[0][split], tokens(), options.block, stride)
        if len(examples) == 0:
            raise RecipeError(f"task.path: the {split} part of the text is shorter than task.block = {options.block}")
        return examples

    def measure(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        loss = float(_losses(module, batch).double().sum())
        targets = batch["targets"].flatten()
        scored = targets[targets != IGNORE_INDEX].cpu().numpy()
        text_bytes = int(tokens().bytes_per_token()[scored].sum())
        return {"loss": (loss, len(scored)), "bits_per_byte": (loss / math.log(2), text_bytes)}

    return Task(
        model=model,
        data=data,
        losses=_losses,
        weights=token_weights,
        collate=_collate,
        measure=measure,
        infer_options=infer_options,
        references=lambda: _xz(_corpus(options)[0]["valid"]),
    )


def _losses(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return token_cross_entropy(at_least_float32(module(input_ids=batch["inputs"]).logits), batch["targets"])


def _collate(windows: Sequence[Window]) -> dict[str, Tensor]:
    """Return {"inputs", "targets"}, each of shape (windows, longest - 1); IGNORE_INDEX without a target."""
    longest = max(len(tokens) for tokens, _ in windows)
    inputs = np.zeros((len(windows), longest - 1), np.int64)
    targets = np.full((len(windows), longest - 1), IGNORE_INDEX, np.int64)
    for row, (tokens, unscored) in enumerate(windows):
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, unscored : len(tokens) - 1] = tokens[unscored + 1 :]
    return {"inputs": torch.from_numpy(inputs), "targets": torch.from_numpy(targets)}


def _starts(document: Document, tokens: ByteTokenizer | CharacterTokenizer) -> NDArray[np.int64]:
    """Return the index of the first token of each domain of a document, shape (domains,)."""
    offsets = [offset for offset, _ in document.domains]
    counts = [tokens.count(document.text[start:end]) for start, end in pairwise(offsets)]
    return np.cumsum([0, *counts]) + (
        np.array(offsets) > 0
    )  # the beginning-of-document token belongs to the first domain


def _held_out_windows(begins: NDArray[np.int64], block: int, stride: int) -> NDArray[np.int64]:
    """Return (start, end, leading predictions without a target) of each window, shape (windows, 3).

    Args:
        begins: start of each document in the stream, and the end of the last, shape (documents + 1,).
        block: predictions of a full window.
        stride: predictions with a target of each window after a document's first.
    """
    rows = []
    for begin, end in zip(begins[:-1], begins[1:], strict=True):
        scored = begin  # the last predicted token; the beginning-of-document token is not
        while scored < end - 1:
            start = begin if scored == begin else scored - (block - stride)
            stop = min(end, start + block + 1)
            start = max(begin, stop - block - 1)  # the last window is extended to the left to full length
            rows.append((start, stop, scored - start))
            scored = stop - 1
    return np.array(rows, np.int64).reshape(-1, 3)


Corpus = tuple[Mapping[Literal["train", "valid"], Sequence[Document]], str]
"""(split -> documents, alphabet), the latter only if characters are tokens and no alphabet is given."""


def _corpus(options: TextOptions) -> Corpus:
    return _corpus_at(options.path, options.pattern, options.valid, options.tokens == "chars" and not options.alphabet)


@cache
def _corpus_at(path: Path | None, pattern: str, valid: float, learns: bool) -> Corpus:
    documents = corpus.standard_library() if path is None else corpus.read_corpus(path, pattern)
    return corpus.split_corpus(documents, valid), corpus.alphabet_of(documents) if learns else ""


def _model(options: TextOptions, size: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return _transformer(options, size) if options.has_heads else _recurrent(options, size)


def _recurrent(options: TextOptions, size: int) -> nn.Module:
    from raytrain.models.recurrent import RecurrentForCausalLM  # noqa: PLC0415 - slow to import

    return RecurrentForCausalLM(options.model, size, options.layers, options.width, options.dropout)


def _transformer(options: TextOptions, size: int) -> nn.Module:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig  # noqa: PLC0415 - slow to import

    common = {
        "vocab_size": size,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": True,
    }
    if options.model == "gpt":
        config = GPT2Config(
            n_layer=options.layers, n_head=options.heads, n_embd=options.width, n_positions=options.block,
            activation_function="gelu_pytorch_tanh",  # what "gelu_new" computes, in one kernel: a fifth off the step
            resid_pdrop=options.dropout, embd_pdrop=options.dropout, attn_pdrop=options.dropout, **common,
        )  # fmt: skip
    else:
        config = LlamaConfig(
            num_hidden_layers=options.layers, num_attention_heads=options.heads, hidden_size=options.width,
            intermediate_size=max(32, options.width * 8 // 3 // 32 * 32), max_position_embeddings=options.block,
            **common,
        )  # fmt: skip
    module: nn.Module = AutoModelForCausalLM.from_config(config)
    return module


def _xz(documents: Sequence[Document]) -> dict[str, float]:
    """Return bits per byte of ``xz -9e`` on held-out text, by file and concatenated; {}: too large."""
    total = sum(len(document.text) for document in documents)
    if total > XZ_LIMIT_BYTES:
        return {}
    each = sum(_xz_bytes(document.text) for document in documents)
    together = _xz_bytes(b"".join(document.text for document in documents))
    return {"bits_per_byte_of_xz_each_file": 8 * each / total, "bits_per_byte_of_xz_together": 8 * together / total}


def _xz_bytes(content: bytes) -> int:
    return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
