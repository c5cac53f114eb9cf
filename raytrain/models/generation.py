"""Greedy generation with a causal language model, and the Rouge-L score."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raytrain.data.collate import Tokens, model_inputs
from raytrain.models.pretrained import Pretrained

WORD = re.compile(r"\w+")


def generate_texts(
    module: Any, pretrained: Pretrained, prompts: Sequence[Tokens], new_tokens: int, stop_ids: Sequence[int]
) -> list[str]:
    """Return greedy continuations of prompts, without special tokens; they do not depend on the batch.

    Args:
        module: a causal model of transformers; its mode and configuration are restored.
        pretrained: the model's folder and tokenizer.
        prompts: tokens; prompts beyond the context length are truncated on the left.
        new_tokens: largest number of new tokens; less where the context length is reached.
        stop_ids: tokens that end a continuation.
    """
    limit = pretrained.max_context_length
    read = [list(prompt[-(limit - 1) :]) or list(stop_ids[:1]) for prompt in prompts]
    rooms = [min(new_tokens, limit - len(prompt)) for prompt in read]
    texts = [""] * len(read)
    for room in sorted(set(rooms)):
        places = [place for place, each in enumerate(rooms) if each == room]
        answers = _greedy(module, [read[place] for place in places], room, stop_ids)
        written: list[str] = pretrained.tokenizer.batch_decode(answers, skip_special_tokens=True)
        for place, text in zip(places, written, strict=True):
            texts[place] = text
    return texts


def _greedy(module: Any, prompts: Sequence[Tokens], new_tokens: int, stops: Sequence[int]) -> Tensor:
    """Return the most probable tokens after each prompt, shape (prompts, longest continuation)."""
    from transformers import GenerationConfig  # noqa: PLC0415 - slow to import

    device = next(module.parameters()).device
    batch = {name: part.to(device) for name, part in model_inputs(prompts, stops[0], left=True).items()}
    how = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=list(stops), pad_token_id=stops[0], use_cache=True
    )
    training, usual = module.training, module.generation_config
    module.eval()
    module.generation_config = how  # `generate` would fill in fields from the model's own
    try:
        with torch.no_grad():
            written: Tensor = module.generate(**batch, generation_config=how)
    finally:
        module.generation_config = usual
        module.train(training)
    return written[:, batch["input_ids"].shape[1] :]


def rouge_l(written: str, reference: str) -> float:
    """Return the F1 score of Rouge-L, in [0, 1].

    F1 = 2 c / (m + n) for texts of m and n words with a longest common subsequence of c words. Words are lower-cased
    runs of letters and digits.

    Source: Lin 2004, "ROUGE: a package for automatic evaluation of summaries".

    >>> rouge_l("the cat sat", "The cat ran")
    0.6666666666666666
    """
    one, other = WORD.findall(written.lower()), WORD.findall(reference.lower())
    if not one and not other:
        return 1.0
    return 2 * longest_common_subsequence(one, other) / (len(one) + len(other))


def longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by bit-parallel dynamic programming.

    Bit i of `row` is 0 where the length grows at word i of `one`.

    Source: Hyyro 2004, "Bit-parallel LCS-length computation revisited".
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(one) - row.bit_count()
