"""Conversations in the format of a model, and where in them an answer begins and ends."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from raytrain.data.columns import shorten
from raytrain.errors import RecipeError
from raytrain.models.pretrained import Pretrained

DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '### ' + message['role'] + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
"""The chat template of a tokenizer that has none."""

Message = Mapping[str, Any]
"""A "role" and a "content", and what else a chat template may look at."""


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        pretrained: the folder of the tokenizer, which gets a plain template if it has none.

    Raises:
        RecipeError: the tokenizer has no end-of-text token.
    """

    def __init__(self, pretrained: Pretrained) -> None:
        self._pretrained = pretrained
        self._end = pretrained.eos_id()
        tokenizer = pretrained.tokenizer
        tokenizer.chat_template = tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE
        added = {token for token, word in tokenizer.added_tokens_decoder.items() if word.special}
        self._special = added | set(tokenizer.all_special_ids)

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: the end-of-text token, and what the template puts after answers."""
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        for probe in (talk, [{"role": "system", "content": "."}, *talk]):  # some templates refuse one or the other
            with suppress(RecipeError):
                return list(dict.fromkeys([self._end, self.prompt_and_answer(probe, "an example")[1][-1]]))
        return [self._end]

    def prompt(self, messages: Sequence[Message], where: str = "") -> list[int]:
        """Return the tokens after which the assistant's answer to `messages` begins."""
        return self._pretrained.tokenize(self._rendered(messages, where, asks=True), special=False) or [self._end]

    def prompt_and_answer(self, messages: Sequence[Message], where: str) -> tuple[list[int], list[int]]:
        """Return the tokens of the prompt, and those of the answer: the last message and the token that ends it.

        Both are cut into tokens apart, as they are when the model answers: a token is never part of both.

        Raises:
            RecipeError: the template does not keep them apart.
        """
        prompt, whole = self._rendered(messages[:-1], where, asks=True), self._rendered(messages, where)
        answer = whole.removeprefix(prompt)
        content = messages[-1]["content"].strip()
        begin = answer.find(content)
        if not whole.startswith(prompt) or begin < 0:
            raise RecipeError(
                f"task.model: the chat template of {self._pretrained.source} writes the prompt of {where} differently "
                "when an answer follows, or changes the answer; set tokenizer.chat_template to one that does neither, "
                "and save the tokenizer there"
            )
        end = begin + len(content)
        tokens = self._pretrained.tokenize(answer[:end] + answer[end:].rstrip(), special=False)
        ended = bool(tokens) and tokens[-1] in self._special
        return self.prompt(messages[:-1], where), tokens if ended else [*tokens, self._end]

    def _rendered(self, messages: Sequence[Message], where: str, asks: bool = False) -> str:
        try:
            text: str = self._pretrained.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=asks
            )
        except Exception as error:  # templates are programs, and raise what they like
            raise RecipeError(f"task.messages: {where}: the chat template refuses it: {error}") from error
        return text


def parse_messages(value: Any, where: str) -> list[Message]:
    """Return the messages of a record, without fields that are null.

    Raises:
        RecipeError: they are not messages.
    """
    messages = value if isinstance(value, list) else []
    if not messages or not all(_is_message(message) for message in messages):
        raise RecipeError(
            f'task.messages: {where}: expected a list of messages, each with a text as "role" and as "content"; got '
            f"{shorten(value)}"
        )
    return [{key: part for key, part in message.items() if part is not None} for message in messages]


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
