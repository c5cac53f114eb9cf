"""Chat templates: conversations as tokens, split into prompt and answer."""

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
"""Chat template for tokenizers without one."""

Message = Mapping[str, Any]
""""role", "content", and other fields that a chat template may use."""


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        pretrained: of the tokenizer, which gets the default template if it has none.

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
        """Tokens that end an answer: the end-of-text token, and the template's token after answers."""
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        for messages in (
            talk,
            [{"role": "system", "content": "."}, *talk],
        ):  # templates may refuse or require a system message
            with suppress(RecipeError):
                return list(dict.fromkeys([self._end, self.prompt_and_answer(messages, "an example")[1][-1]]))
        return [self._end]

    def prompt(self, messages: Sequence[Message], where: str = "") -> list[int]:
        """Return the tokens of the prompt, after which the assistant answers."""
        return self._pretrained.tokenize(self._rendered(messages, where, asks=True), special=False) or [self._end]

    def prompt_and_answer(self, messages: Sequence[Message], where: str) -> tuple[list[int], list[int]]:
        """Return (tokens of the prompt, tokens of the answer: the last message and its end token).

        Both are tokenized separately, as in generation, so no token belongs to both.

        Raises:
            RecipeError: the template writes the prompt differently if an answer follows.
        """
        prompt, whole = self._rendered(messages[:-1], where, asks=True), self._rendered(messages, where)
        answer = whole.removeprefix(prompt)
        content = messages[-1]["content"].strip()
        start = answer.find(content)
        if not whole.startswith(prompt) or start < 0:
            raise RecipeError(
                f"task.model: the chat template of {self._pretrained.source} writes the prompt of {where} differently "
                "when an answer follows, or changes the answer; set tokenizer.chat_template to one that does neither, "
                "and save the tokenizer there"
            )
        end = start + len(content)
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
    """Parse the messages of a record, dropping null fields.

    Raises:
        RecipeError: the value is not a list of messages.
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
