"""Text classification: an encoder with a head, or a causal model with a verbalizer."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raytrain.data.cache import Example, StoredExamples, token_count
from raytrain.data.collate import model_inputs
from raytrain.data.columns import Label, domain_of, label_of, text_of
from raytrain.data.records import Record, read_records
from raytrain.errors import RecipeError
from raytrain.models import discriminant
from raytrain.models.adapters import mark_untrained
from raytrain.models.pretrained import AutoClass, Pretrained
from raytrain.models.verbalizer import Verbalizer
from raytrain.tasks.options import ClassifyOptions
from raytrain.tasks.splits import SplitName, Splits
from raytrain.tasks.task import Task
from raytrain.tensors import at_least_float32, to_device

_DEFAULT_LENGTH = 512
INIT_BATCH = 32
"""Batch size of the forward passes that initialize the head."""
LOADERS: dict[str, AutoClass] = {
    "own": "AutoModelForSequenceClassification",
    "mean": "AutoModel",
    "verbalizer": "AutoModelForCausalLM",
}
MANY_LABELS = 20
"""Up to this many different labels are accepted; beyond it, at most half as many as texts."""


def classify(options: ClassifyOptions) -> Task:
    """Text classification with an encoder or a causal language model."""
    methods = _Classifier(options)
    return Task(
        model=methods.model,
        data=methods.data,
        losses=methods.losses,
        collate=methods.collate,
        length=token_count,
        measure=methods.measure,
        infer_options=methods.infer_options,
        init_head=methods.init_head if options.head_init != "random" else None,
        metric="accuracy",
        better="higher",
        references=methods.references,
        inputs=methods.inputs,
        predict=methods.predict,
        export=methods.export,
    )


class _Classifier:
    def __init__(self, options: ClassifyOptions) -> None:
        self._options = options
        self._pretrained = Pretrained(options, LOADERS[options.head])
        self._columns = (options.text, options.label)
        self._splits = Splits(options, self._columns)
        self._length = self._pretrained.context_length(options.length, _DEFAULT_LENGTH)
        self._filler = self._pretrained.pad_id()
        self.data = cache(self._data)  # the examples go when the task does

    def infer_options(self) -> dict[str, Any]:
        for record in self._splits.first_records():
            text_of(record, "text", self._options.text)
            label_of(record, self._options.label)
        return {} if self._options.classes else {"classes": self._classes}

    def model(self, seed: int) -> nn.Module:
        module = self._module(seed)
        module.config.id2label = {place: str(label) for place, label in enumerate(self._classes)}
        module.config.label2id = {str(label): place for place, label in enumerate(self._classes)}
        module.config.pad_token_id = self._filler
        if self._options.head_init != "random":
            mark_untrained(discriminant.find_head(module, len(self._classes)).parameters())
        prepared: nn.Module = self._pretrained.prepare(module)
        return prepared

    def init_head(self, module: nn.Module, seed: int) -> None:
        train = self.data("train")
        for place in set(range(len(self._classes))).difference(train.labels.tolist()):
            raise RecipeError(
                f"task.head_init: no training text is of the class {self._classes[place]!r}, to start from"
            )
        some = [train[place] for place in discriminant.sample_per_class(train.labels, self._options.shots, seed)]
        some.sort(key=token_count)  # less padding
        batches = [self.collate(some[at : at + INIT_BATCH]) for at in range(0, len(some), INIT_BATCH)]
        discriminant.init_discriminant(module, batches, self._scores, whole=self._options.head_init == "discriminant")

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        rows = [example["tokens"] for example in examples]
        batch = self._words.collate(rows) if self._words else model_inputs(rows, self._filler)
        labels = [example["label"] for example in examples if "label" in example]
        return {**batch, "labels": torch.tensor(labels)} if labels else batch

    def losses(self, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(self._scores(module, batch), batch["labels"], reduction="none")

    def measure(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        scores, labels = self._scores(module, batch).double(), batch["labels"]
        right = (scores.argmax(dim=1) == labels).sum()
        losses = cross_entropy(scores, labels, reduction="none")
        sums = {"loss": losses.sum(), "accuracy": right, "expected_accuracy": (-losses).exp().sum()}
        found = {name: (float(value), float(len(labels))) for name, value in sums.items()}
        if len(self._classes) == 2:
            predicted, actual = scores.argmax(dim=1) == 1, labels == 1
            found["f1"] = (2.0 * int((predicted & actual).sum()), float(predicted.sum() + actual.sum()))
        return found

    def references(self) -> dict[str, float]:
        labels = self.data("valid").labels
        return {"accuracy_of_commonest_class": float(np.bincount(labels).max() / len(labels))}

    def inputs(self, path: Path) -> list[Example]:
        return [self._encoded(record) for record in read_records(path, self._columns)]

    def predict(self, module: nn.Module, examples: Sequence[Example]) -> list[dict[str, Any]]:
        parameter = next(module.parameters())
        with torch.no_grad():
            scores = self._scores(module, to_device(self.collate(examples), parameter.device, parameter.dtype))
        return [
            {
                "label": self._classes[int(row.argmax())],
                "scores": {str(label): float(score) for label, score in zip(self._classes, row, strict=True)},
            }
            for row in scores.softmax(dim=1)
        ]

    def export(self, module: nn.Module, folder: Path) -> None:
        self._pretrained.export(module, folder)

    def _module(self, seed: int) -> Any:
        classes = len(self._classes)
        if self._options.head == "verbalizer":
            return self._pretrained.load_module(seed)
        if self._options.head == "own":
            return self._pretrained.load_module(seed, num_labels=classes)
        from raytrain.models.mean_pooling import with_mean_pooling  # noqa: PLC0415 - it imports transformers

        module = with_mean_pooling(self._pretrained.load_module(seed, num_labels=classes))
        mark_untrained(module.classifier.parameters())
        return module

    def _scores(self, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the logits of the classes, shape (texts, classes), in float32 at least."""
        if self._words:
            return self._words.scores(module, batch)
        return at_least_float32(module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)

    def _data(self, part: SplitName) -> StoredExamples:
        options = self._options
        asked = [options.text, options.label, options.domain, options.head, options.prompt, options.verbalizer]
        key = [
            self._splits.fingerprint(part),
            self._pretrained.fingerprint,
            self._length,
            [str(c) for c in self._classes],
            asked,
        ]
        columns = {"tokens": "tokens", "label": "int64", "domain": "string"}
        return StoredExamples(lambda: self._labelled(part), columns, key)

    def _labelled(self, part: SplitName) -> Iterator[Example]:
        places = {label: place for place, label in enumerate(self._classes)}
        for record in self._splits.records(part):
            label = label_of(record, self._options.label)
            if label not in places:
                raise RecipeError(
                    f"task.label: {record.where}: the label {label!r} is not one of task.classes, which are those of "
                    f"the training data unless you name them: {', '.join(map(repr, self._classes))}"
                )
            domain = domain_of(record, self._options.domain)
            yield {**self._encoded(record), "label": places[label], "domain": domain}

    def _encoded(self, record: Record) -> Example:
        text = text_of(record, "text", self._options.text)
        if self._words:
            tokens = self._words.encode(text)
        else:
            tokens = self._pretrained.tokenizer(text, truncation=True, max_length=self._length)["input_ids"]
        return {"tokens": tokens or [self._filler]}  # some tokenizers return no tokens for an empty text

    @cached_property
    def _words(self) -> Verbalizer | None:
        options = self._options
        if options.head != "verbalizer":
            return None
        words = options.verbalizer or [f" {label}" for label in self._classes]
        if len(words) != len(self._classes):
            raise RecipeError(
                f"task.verbalizer: expected a word for each of the {len(self._classes)} classes "
                f"({', '.join(map(str, self._classes))}); got {len(words)}"
            )
        return Verbalizer(self._pretrained, options.prompt, words, self._length)

    @cached_property
    def _classes(self) -> list[Label]:
        """Labels in the order of the classes."""
        return list(self._options.classes) or collect_classes(self._splits.records("train"), self._options.label)


def collect_classes(records: Iterator[Record], column: str) -> list[Label]:
    """Return the distinct labels of records, sorted.

    Raises:
        RecipeError: there are fewer than two or too many, or only some are integers.
    """
    first: dict[Label, Record] = {}
    counts: Counter[bool] = Counter()
    for record in records:
        label = label_of(record, column)
        first.setdefault(label, record)
        counts[isinstance(label, int)] += 1
    if len(counts) == 2:
        rarer = min(counts, key=lambda kind: counts[kind])
        label, record = next((label, record) for label, record in first.items() if isinstance(label, int) == rarer)
        raise RecipeError(
            f"task.label: {record.where}: the label is {label!r}, while most are {'text' if rarer else 'integers'}; if "
            "these are the names of columns, say which with task.text and task.label"
        )
    if len(first) < 2:
        raise RecipeError(
            f"task.label: all {counts.total()} training texts have the label {min(first)!r}; expected two or more"
        )
    if len(first) > max(MANY_LABELS, counts.total() // 2):
        raise RecipeError(
            f"task.label: {counts.total()} training texts have {len(first)} different labels, as {min(first)!r}; name "
            "the column of their classes"
        )
    return sorted(first)
