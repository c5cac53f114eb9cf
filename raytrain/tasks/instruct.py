"""Supervised fine-tuning (SFT) of a causal model on conversations, by its chat template."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from raytrain.data.cache import Example, StoredExamples, token_count
from raytrain.data.collate import IGNORE_INDEX, Tokens, lm_batch, token_losses, token_weights
from raytrain.data.columns import column_of, domain_of, text_of, usual_column
from raytrain.data.records import Record, read_records
from raytrain.errors import RecipeError
from raytrain.models.chat_template import ChatTemplate, Message, parse_messages
from raytrain.models.generation import generate_texts, rouge_l
from raytrain.models.pretrained import Pretrained
from raytrain.tasks.options import InstructOptions
from raytrain.tasks.splits import SplitName, Splits
from raytrain.tasks.task import Examples, Task

_DEFAULT_LENGTH = 1024


def instruct(options: InstructOptions) -> Task:
    """Supervised fine-tuning (SFT) on conversations, with the model's chat template."""
    methods = _Instruct(options)
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


class _Instruct:
    def __init__(self, options: InstructOptions) -> None:
        self._options = options
        self._pretrained = Pretrained(options, "AutoModelForCausalLM")
        self._chat = ChatTemplate(self._pretrained)
        self._columns = (options.messages, options.prompt, options.answer, options.context)
        self._splits = Splits(options, self._columns)
        self._length = self._pretrained.context_length(options.length, _DEFAULT_LENGTH)
        self.data = cache(self._data)  # the examples go when the task does

    def infer_options(self) -> dict[str, Any]:
        for record in self._splits.first_records():
            self._conversation(record)
        return {}

    def model(self, seed: int) -> nn.Module:
        module: nn.Module = self._pretrained.prepare(self._pretrained.load_module(seed))
        return module

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        rows = [example["tokens"][:-1] for example in examples]
        targets = [[IGNORE_INDEX] * (each["prompt"] - 1) + each["tokens"][each["prompt"] :] for each in examples]
        written = [example for example in examples if "answer" in example]
        prompts = [example["tokens"][: example["prompt"]] for example in written]
        more = {"prompts": prompts, "answers": [example["answer"] for example in written]} if written else {}
        return {**lm_batch(rows, targets, self._pretrained.eos_id()), **more}

    def measure(self, module: nn.Module, batch: dict[str, Any]) -> dict[str, tuple[float, float]]:
        loss = float(token_losses(module, batch).double().sum())
        measured = {"loss": (loss, float(token_weights(batch).sum()))}
        if "prompts" not in batch:
            return measured
        pairs = list(zip(self._written(module, batch["prompts"]), batch["answers"], strict=True))
        rouge = sum(rouge_l(written, answer) for written, answer in pairs)
        exact = sum(written == answer.strip() for written, answer in pairs)
        return {**measured, "rouge_l": (rouge, len(pairs)), "exact_match": (exact, len(pairs))}

    def inputs(self, path: Path) -> list[Example]:
        conversations = (self._conversation(record, asked=True) for record in read_records(path, self._columns))
        return [{"tokens": self._chat.prompt(messages)} for messages in conversations]

    def predict(self, module: nn.Module, examples: Sequence[Example]) -> list[dict[str, Any]]:
        return [{"text": text} for text in self._written(module, [example["tokens"] for example in examples])]

    def export(self, module: nn.Module, folder: Path) -> None:
        self._pretrained.export(module, folder)

    def _written(self, module: nn.Module, prompts: Sequence[Tokens]) -> list[str]:
        texts = generate_texts(module, self._pretrained, prompts, self._options.new_tokens, self._chat.stop_ids)
        return [text.strip() for text in texts]

    def _data(self, part: SplitName) -> Examples:
        options = self._options
        asked = [*self._columns, options.domain, options.turns, options.overflow]
        key = [self._splits.fingerprint(part), self._pretrained.fingerprint, self._length, asked]
        columns = {"tokens": "tokens", "prompt": "int64", "answer": "string", "domain": "string"}
        stored = StoredExamples(lambda: self._examples(part), columns, key)
        return AnsweredSubset(stored, options.generate if part == "valid" else 0)

    def _examples(self, part: SplitName) -> Iterator[Example]:
        empty = True
        for record in self._splits.records(part):
            messages = self._conversation(record)
            answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
            for place in answers if self._options.turns == "all" else answers[-1:]:
                tokens, prompt = self._fitted(
                    *self._chat.prompt_and_answer(messages[: place + 1], record.where), record
                )
                if tokens:
                    empty = False
                    domain = domain_of(record, self._options.domain)
                    yield {"tokens": tokens, "prompt": prompt, "answer": messages[place]["content"], "domain": domain}
        if empty:
            raise RecipeError(f"task.overflow: no record of the {part} part fits into task.length = {self._length}")

    def _fitted(self, prompt: list[int], answer: list[int], record: Record) -> tuple[list[int], int]:
        """Return (tokens of prompt and answer, length of the prompt); ([], 0) to skip the record."""
        room = self._length + 1 - len(prompt)  # the last token is only a target
        if len(answer) <= room or (self._options.overflow == "truncate" and room > 0):
            return prompt + answer[:room], len(prompt)
        if self._options.overflow == "skip":
            return [], 0
        raise RecipeError(
            f"task.overflow: {record.where}: the prompt has {len(prompt)} tokens and the answer {len(answer)}, and "
            f"task.length is {self._length}; set {'task.overflow=truncate to cut answers, or ' if room > 0 else ''}"
            "task.overflow=skip to leave such records out"
        )

    def _conversation(self, record: Record, asked: bool = False) -> list[Message]:
        """Return the messages of a record; with `asked`, without a final answer.

        Raises:
            RecipeError: there are no messages, or there is no answer without `asked`.
        """
        options = self._options
        name = column_of(record, "messages", options.messages) if options.messages else usual_column(record, "messages")
        if name is not None and not options.prompt:
            messages = parse_messages(record.fields[name], record.where)
            while asked and messages and messages[-1]["role"] == "assistant":
                messages.pop()
        else:
            messages = [{"role": "user", "content": self._question(record)}]
            if not asked:
                messages.append({"role": "assistant", "content": text_of(record, "answer", options.answer)})
        if not messages or not (asked or any(message["role"] == "assistant" for message in messages)):
            role = "user" if asked else "assistant"
            raise RecipeError(f"task.messages: {record.where}: expected a message with the role {role!r}")
        return messages

    def _question(self, record: Record) -> str:
        prompt = column_of(record, "prompt", self._options.prompt)
        given = self._options.context
        context = column_of(record, "context", given) if given else usual_column(record, "context") or prompt
        parts = [text_of(record, "prompt", prompt)]
        if context != prompt and record.fields[context]:
            parts.append(text_of(record, "context", context))
        return "\n\n".join(parts)


class AnsweredSubset:
    """Examples of which some keep their "answer", for comparison with generated answers.

    Args:
        examples: all examples.
        count: number of examples with an answer, evenly spaced.
    """

    def __init__(self, examples: StoredExamples, count: int) -> None:
        self._examples = examples
        self._asked = frozenset(np.linspace(0, len(examples) - 1, min(count, len(examples))).astype(int).tolist())
        self.label = examples.label
        self.domain = examples.domain

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        """Return example `index`, with its "answer" if it is one of `count`."""
        example = self._examples[index]
        return example if index in self._asked else {key: example[key] for key in ("tokens", "prompt")}
