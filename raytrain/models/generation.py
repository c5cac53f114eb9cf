"""Texts that a causal model writes, each next token being the likeliest, and how near they come to given ones."""

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
    """Return what the model writes after each prompt, special tokens left out, whichever prompts are asked together.

    Args:
        module: a causal model of transformers; it is left as it was.
        pretrained: the folder that it comes from.
        prompts: tokens; of one that alone fills what the model can see, only the end is read.
        new_tokens: the longest answer; after a long prompt it ends where the model sees no further.
        stop_ids: tokens that end an answer.
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
    """Return the likeliest tokens after each prompt, shape (prompts, longest answer)."""
    from transformers import GenerationConfig  # noqa: PLC0415 - slow to import

    device = next(module.parameters()).device
    batch = {name: part.to(device) for name, part in model_inputs(prompts, stops[0], left=True).items()}
    how = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=list(stops), pad_token_id=stops[0], use_cache=True
    )
    training, usual = module.training, module.generation_config
    module.eval()
    module.generation_config = how  # `generate` would take what is not said here from the model's own
    try:
        with torch.no_grad():
            written: Tensor = module.generate(**batch, generation_config=how)
    finally:
        module.generation_config = usual
        module.train(training)
    return written[:, batch["input_ids"].shape[1] :]


def rouge_l(written: str, reference: str) -> float:
    """Return how much of two texts is a common subsequence of words, from 0 to 1: the F1 score of Rouge-L (Lin 2004).

    Words are lower-cased runs of letters and digits. With the longest common subsequence of c words of texts of m and n
    words, precision is c / m, recall c / n, and their harmonic mean 2 c / (m + n).
    """
    one, other = WORD.findall(written.lower()), WORD.findall(reference.lower())
    if not one and not other:
        return 1.0
    return 2 * longest_common_subsequence(one, other) / (len(one) + len(other))


def longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    Bit i of `row` is 0 where such a sequence grows at word i of `one`. Source: Hyyro 2004, "Bit-parallel LCS-length
    computation revisited".
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
