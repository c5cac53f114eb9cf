"""Verbalizer: classification by a causal language model's probability of a word for each class."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raytrain.data.collate import IGNORE_INDEX, Tokens, lm_batch, target_logits, token_losses
from raytrain.errors import RecipeError
from raytrain.models.options import PLACEHOLDER
from raytrain.models.pretrained import Pretrained


class Verbalizer:
    """A prompt template, and a word for each class.

    score(class) = log p(word of the class | prompt). If all words are single tokens, one forward pass of the prompt
    scores all classes; otherwise each word is appended to the prompt.

    Args:
        pretrained: the model's folder and tokenizer.
        prompt: template with "{text}" in it.
        words: one for each class.
        max_tokens: largest number of tokens of prompt and word; the text is truncated to fit.

    Raises:
        RecipeError: a word has no tokens, two have the same tokens, or the prompt leaves no room for a text.

    Source: Schick and Schuetze 2021, "Exploiting cloze questions for few-shot text classification" (PET).
    """

    def __init__(self, pretrained: Pretrained, prompt: str, words: Sequence[str], max_tokens: int) -> None:
        self._pretrained = pretrained
        self._before, self._after = prompt.split(PLACEHOLDER)
        self._words = [pretrained.tokenize(word, special=False) for word in words]
        self._single = all(len(word) == 1 for word in self._words)
        self._filler = pretrained.pad_id()
        self._room = max_tokens - max(len(word) for word in self._words)
        self._bare = len(self._prompt(""))
        if self._bare >= self._room:
            raise RecipeError(
                f"task.prompt: it has {self._bare} tokens without a text, and task.length is {max_tokens}"
            )
        if len({tuple(word) for word in self._words}) < len(words) or not all(self._words):
            raise RecipeError(f"task.verbalizer: expected words of different tokens; got {', '.join(map(repr, words))}")

    def encode(self, text: str) -> list[int]:
        """Return the tokens of the prompt with a text, truncated to fit."""
        tokens = self._prompt(text)
        while len(tokens) > self._room:
            ratio = (self._room - self._bare) / (len(tokens) - self._bare)
            text = text[: min(len(text) - 1, int(len(text) * ratio))]
            tokens = self._prompt(text)
        return tokens

    def _prompt(self, text: str) -> list[int]:
        return self._pretrained.tokenize(self._before + text + self._after)

    def collate(self, prompts: Sequence[Tokens]) -> dict[str, Tensor]:
        """Return a batch of prompts; with words of several tokens, of each prompt with each word."""
        if self._single:
            batch = lm_batch(prompts, [[IGNORE_INDEX] * (len(prompt) - 1) + [0] for prompt in prompts], self._filler)
            return {**batch, "words": torch.tensor(self._words)[:, 0]}
        rows = [[*prompt, *word[:-1]] for prompt in prompts for word in self._words]
        targets = [[IGNORE_INDEX] * (len(prompt) - 1) + word for prompt in prompts for word in self._words]
        return lm_batch(rows, targets, self._filler)

    def scores(self, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the log-probability of each class's word after each prompt, shape (prompts, classes)."""
        if self._single:
            position = (batch["targets"] != IGNORE_INDEX).long().argmax(dim=1)
            last = target_logits(module, batch)[torch.arange(len(position), device=position.device), position]
            return last.log_softmax(dim=1)[:, batch["words"]]
        losses = token_losses(module, batch).view(len(batch["targets"]), -1)
        return -losses.sum(dim=1).view(-1, len(self._words))
