"""Texts that a causal model writes, each next token being the likeliest, and how near they come to given ones."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from raytrain.tasks.batches import Tokens, inputs
from raytrain.tasks.pretrained import Pretrained

WORD = re.compile(r"\w+")


def continuations(
    module: Any, pretrained: Pretrained, prompts: Sequence[Tokens], new_tokens: int, stops: Sequence[int]
) -> list[str]:
    """Return what the model writes after each prompt, special tokens left out.

    Args:
        module: a causal model of transformers; it is left in the mode it was in.
        pretrained: the folder that it comes from.
        prompts: tokens; of one that leaves no room for the answer, only the end is read.
        new_tokens: the longest answer.
        stops: tokens that end an answer.
    """
    from transformers import GenerationConfig  # noqa: PLC0415 - slow to import

    new_tokens = min(new_tokens, pretrained.limit - 1)
    prompts = [prompt[-(pretrained.limit - new_tokens) :] or stops[:1] for prompt in prompts]
    device = next(module.parameters()).device
    batch = {name: part.to(device) for name, part in inputs(prompts, stops[0], left=True).items()}
    how = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=list(stops), pad_token_id=stops[0], use_cache=True
    )
    training = module.training
    module.eval()
    with torch.no_grad():
        written = module.generate(**batch, generation_config=how)
    module.train(training)
    answers = written[:, batch["input_ids"].shape[1] :]
    texts: list[str] = pretrained.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts


def rouge_l(written: str, reference: str) -> float:
    """Return how much of two texts is a common subsequence of words, from 0 to 1: the F1 score of Rouge-L (Lin 2004).

    Words are lower-cased runs of letters and digits. With the longest common subsequence of c words of texts of m and n
    words, precision is c / m, recall c / n, and their harmonic mean 2 c / (m + n).
    """
    one, other = WORD.findall(written.lower()), WORD.findall(reference.lower())
    if not one and not other:
        return 1.0
    return 2 * common(one, other) / (len(one) + len(other))


def common(one: Sequence[str], other: Sequence[str]) -> int:
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
