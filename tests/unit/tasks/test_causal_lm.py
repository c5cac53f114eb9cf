import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from raytrain.data.collate import IGNORE_INDEX, lm_batch, model_inputs, pad, target_logits, token_losses, token_weights
from raytrain.errors import RecipeError
from raytrain.run.rows import read_jsonl
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.tasks.causal_lm import CausalLmOptions, Tokenized, byte_widths, causal_lm, pack_documents, split_document
from raytrain.tasks.task import Task
from raytrain.testing import train_here
from raytrain.training.evaluation import evaluate
from raytrain.training.recipe import TrainRecipe

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=6)


def documents(sizes: list[int]) -> list[Tokenized]:
    """Documents of so many tokens, all different; token n stands for n % 5 bytes."""
    begins = np.cumsum([0, *sizes])
    tokens = [np.arange(begin, begin + size) for begin, size in zip(begins, sizes, strict=False)]
    return [Tokenized(part, part % 5, f"line {place}", f"from {place}") for place, part in enumerate(tokens)]


@settings(deadline=None)
@given(lengths, st.integers(1, 12))
def test_packed_pieces_predict_each_token_of_the_stream_once(sizes: list[int], length: int) -> None:
    pieces = list(pack_documents(documents(sizes), length))
    stream = np.arange(sum(sizes))
    assert np.concatenate([piece["tokens"][1:] for piece in pieces] or [[]]).tolist() == stream[1:].tolist()
    assert all(len(piece["tokens"]) == length + 1 for piece in pieces[:-1])
    assert all(2 <= len(piece["tokens"]) <= length + 1 for piece in pieces)
    assert sum(piece["bytes"] for piece in pieces) == (stream[1:] % 5).sum()
    owners = np.repeat(np.arange(len(sizes)), sizes)
    assert [piece["domain"] for piece in pieces] == [f"from {owners[piece['tokens'][0]]}" for piece in pieces]


@settings(deadline=None)
@given(st.integers(2, 30), st.integers(1, 12))
def test_split_documents_predict_each_token_once_and_cut_ones_their_first(size: int, length: int) -> None:
    document = documents([size])[0]
    pieces = list(split_document(document, length, "split"))
    assert np.concatenate([piece["tokens"][1:] for piece in pieces]).tolist() == list(range(1, size))
    assert all(piece["tokens"][0] == length * place for place, piece in enumerate(pieces))
    cut = list(split_document(document, length, "truncate"))
    assert [piece["tokens"].tolist() for piece in cut] == [list(range(min(size, length + 1)))]
    if size <= length + 1:
        assert [piece["tokens"].tolist() for piece in split_document(document, length, "error")] == [list(range(size))]


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), st.data())
def test_widths_count_every_byte_once(text: str, data: st.DataObject) -> None:
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    blank = data.draw(st.lists(st.integers(0, len(ends)), max_size=2))
    for place in blank:
        ends.insert(place, 0)  # a token that stands for nothing
    widths = byte_widths(text, np.array([*ends, len(text)]))
    assert widths.sum() == len(text.encode())
    assert (widths >= 0).all()
    reached = np.maximum.accumulate([*ends, len(text)])
    assert np.cumsum(widths).tolist() == [len(text[:end].encode()) for end in reached]


rows_of_tokens = st.lists(st.lists(st.integers(2, 200), min_size=1, max_size=9), min_size=1, max_size=4)


@settings(deadline=None)
@given(rows_of_tokens, st.booleans())
def test_short_rows_are_filled_up_and_masked(table: list[list[int]], left: bool) -> None:
    batch = model_inputs(table, 1, left=left)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(table), max(map(len, table)))
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], table, strict=True):
        assert ids[mask.bool()].tolist() == row
        assert ids[~mask.bool()].tolist() == [1] * (len(ids) - len(row))
        assert mask.tolist() == sorted(mask.tolist(), reverse=not left)
    assert torch.equal(pad(table, 1, left=left), batch["input_ids"])


@pytest.fixture(scope="session")
def llama(models: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(models / "llama").eval()


class Forgetful(torch.nn.Module):
    """A causal model that does not know `logits_to_keep`."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, logits_to_keep: object = None, **more: Any) -> Any:
        return self.module(**more)


@settings(deadline=None, max_examples=20)
@given(rows_of_tokens, st.data())
def test_losses_are_those_of_the_scored_tokens(llama: Any, table: list[list[int]], data: st.DataObject) -> None:
    """Against one row at a time, all its logits, and the definition."""
    targets = [[data.draw(st.sampled_from([IGNORE_INDEX, token])) for token in row] for row in table]
    targets[0][0] = 7
    batch = lm_batch(table, targets, 1)
    assert (batch["targets"] != IGNORE_INDEX).any(dim=0).all(), "no place is kept that no row scores"
    losses, weights = token_losses(llama, batch), token_weights(batch)
    assert losses.shape == weights.shape
    assert weights.sum() == sum(target != IGNORE_INDEX for row in targets for target in row)
    expected = 0.0
    for row, wanted in zip(table, targets, strict=True):
        logits = llama(input_ids=torch.tensor([row])).logits[0]
        expected += cross_entropy(logits, torch.tensor(wanted), ignore_index=IGNORE_INDEX, reduction="sum").item()
    assert (losses @ weights).item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(target_logits(Forgetful(llama), batch), target_logits(llama, batch))


TEXTS = [
    "the film is good",
    "a naïve question",
    "what an answer, 漢 😀",
    "awful plot and bad acting",
    "  but very great ",
]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text, "by": "x"}) for text in TEXTS * 3))
    return tmp_path


def made(models: Path, path: Path | str, model: str = "llama", **options: Any) -> Task:
    return causal_lm(CausalLmOptions(name="causal-lm", path=str(path), model=str(models / model), **options))


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("packed", [True, False])
def test_bits_per_byte_are_those_of_the_definition(models: Path, texts: Path, model: str, packed: bool) -> None:
    """A model whose outputs are all equal pays log2(tokens) bits for each token that it predicts."""
    task = made(models, texts, model, packed=packed, length=16)
    module = task.model(0)
    for value in module.parameters():
        torch.nn.init.zeros_(value)
    found = evaluate(task, module, task.data("valid"), 3, ExactAverager(LocalTransport()))
    tokenizer = task.predict.__self__._pretrained.tokenizer
    tokens = [tokenizer(text)["input_ids"] for text in TEXTS * 3]
    size = sum(len(text.encode()) for text in TEXTS * 3)
    # What comes first is predicted by nothing: of the stream if packed, or of each document.
    first = [tokenizer.decode(part[:1]) for part in (tokens[:1] if packed else tokens)]
    predicted = sum(len(part) + 1 for part in tokens) - len(first)
    assert found["loss"] == pytest.approx(math.log(len(tokenizer)), rel=1e-6)
    known = size - sum(len(text.encode()) for text in first)
    assert found["bits_per_byte"] == pytest.approx(math.log2(len(tokenizer)) * predicted / known, rel=1e-6)


def test_packed_and_padded_documents_are_what_was_written(models: Path, texts: Path) -> None:
    tokenizer = made(models, texts).predict.__self__._pretrained.tokenizer
    whole = made(models, texts, packed=False, overflow="error").data("train")
    assert [tokenizer.decode(whole[place]["tokens"]) for place in range(15)] == [f"{text}</s>" for text in TEXTS * 3]
    pieces = made(models, texts, length=8).data("train")
    joined = pieces[0]["tokens"][:1] + [token for place in range(len(pieces)) for token in pieces[place]["tokens"][1:]]
    assert tokenizer.decode(joined) == "".join(f"{text}</s>" for text in TEXTS * 3)
    assert {len(pieces[place]["tokens"]) for place in range(len(pieces) - 1)} == {9}
    by = made(models, texts, domain="by").data("train")
    assert (by.domain(0), by.label(0), whole.domain(0)) == ("x", 0, "train")


def test_padding_changes_no_loss(models: Path, texts: Path) -> None:
    for model in ("llama", "gpt2"):
        task = made(models, texts, model, packed=False)
        module, examples = task.model(0).eval(), [task.data("train")[place] for place in range(5)]
        batch = task.collate(examples)
        together = (task.losses(module, batch) @ task.weights(batch)).item()
        alone_ = [task.collate([example]) for example in examples]
        apart = sum((task.losses(module, each) @ task.weights(each)).item() for each in alone_)
        assert together == pytest.approx(apart, rel=1e-5)
        assert task.weights(batch).sum() == sum(len(example["tokens"]) - 1 for example in examples)


@pytest.mark.parametrize("unit", ["line", "paragraph", "file"])
def test_text_files_hold_documents(models: Path, tmp_path: Path, unit: Any) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text("one\ntwo\n\nthree\n")
    data = made(models, tmp_path, packed=False, document=unit).data("train")
    tokenizer = made(models, tmp_path).predict.__self__._pretrained.tokenizer
    expected = {"line": ["one", "two", "three"], "paragraph": ["one\ntwo", "three"], "file": ["one\ntwo\n\nthree\n"]}
    assert [tokenizer.decode(data[place]["tokens"]) for place in range(len(data))] == [
        f"{x}</s>" for x in expected[unit]
    ]


def test_a_document_that_does_not_fit_is_named(models: Path, texts: Path) -> None:
    fits = len(made(models, texts, packed=False).data("train")[0]["tokens"]) - 1
    made(models, texts, packed=False, overflow="truncate", length=fits).data("train")
    (texts / "train.jsonl").write_text(json.dumps({"text": TEXTS[0]}) + "\n" + json.dumps({"text": TEXTS[0] + " good"}))
    with pytest.raises(RecipeError) as refused:
        made(models, texts, packed=False, overflow="error", length=fits).data("train")
    assert str(refused.value) == (
        f"task.overflow: train.jsonl, line 2: the document has {fits + 1} tokens, and task.length is {fits}; set "
        "task.overflow=truncate to take its beginning, task.overflow=split to make several examples of it, or "
        "task.packed=true"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "content"}, "text: train.jsonl, line 1: there is no column 'content'; known: by, text"),
        ({"domain": "author"}, "domain: train.jsonl, line 1: there is no column 'author'; known: by, text"),
        ({"length": 129}, "length: .*llama sees 128 tokens at most; got 129"),
        ({"model": "bert"}, "model: .*bert is a bert, an encoder, whose tokens see what comes after them; expected a"),
    ],
)
def test_options_that_do_not_fit_are_refused(models: Path, texts: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"^task.{message}"):
        made(models, texts, **options).data("train")


def test_blank_documents_are_left_out_and_nothing_else_is_an_error(models: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": " "}\n{"text": ""}')
    (tmp_path / "dev.jsonl").write_text('{"text": " "}\n{"text": "a"}')
    for packed_ in (True, False):
        task = made(models, tmp_path, packed=packed_)
        with pytest.raises(RecipeError, match=re.escape(f"task.path: the train part of {tmp_path} has no text")):
            task.data("train")
        assert len(task.data("valid")) == 1


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_predictions_go_on_greedily_whoever_shares_the_batch(models: Path, tmp_path: Path, model: str) -> None:
    """Against the definition: the likeliest token, one at a time."""
    task = made(models, corpus(tmp_path), model, new_tokens=6)
    (tmp_path / "in.txt").write_text("the\nwhat is a naïve question?\ngood and bad\n")
    module, examples = task.model(0).eval(), task.inputs(tmp_path / "in.txt")
    tokenizer = task.predict.__self__._pretrained.tokenizer
    found = [each["text"] for each in task.predict(module, examples)]
    module.generation_config.update(repetition_penalty=9.0, no_repeat_ngram_size=1, suppress_tokens=[7], min_length=20)
    assert [each["text"] for each in task.predict(module, examples)] == found, "whatever the model's own file says"
    assert module.generation_config.repetition_penalty == 9.0, "which is left as it was"
    for example, text in zip(examples, found, strict=True):
        tokens = list(example["tokens"])
        for _ in range(6):
            tokens.append(int(module(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(tokens[len(example["tokens"]) :], skip_special_tokens=True)


def test_a_prompt_that_leaves_no_room_is_read_from_its_end(models: Path, tmp_path: Path) -> None:
    task = made(models, corpus(tmp_path), "gpt2", new_tokens=50)
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "very good " * 300}) + '\n{"text": ""}')
    module, prompts = task.model(0).eval(), task.inputs(tmp_path / "in.jsonl")
    assert len(prompts[0]["tokens"]) > 64 - 1
    found = task.predict(module, prompts)
    assert found == task.predict(module, [{"tokens": prompts[0]["tokens"][-63:]}, {"tokens": [1]}])
    assert found[0] != task.predict(module, [{"tokens": prompts[0]["tokens"][-14:]}])[0]


@pytest.mark.parametrize("size", [20, 31, 63])
def test_a_prompt_that_fits_is_read_as_a_whole(models: Path, tmp_path: Path, size: int) -> None:
    """The model sees 64 tokens: the answer is as long as there is room for."""
    task = made(models, corpus(tmp_path), "gpt2", new_tokens=128)
    module, prompt = task.model(0).eval(), [2 + place * 7 % 300 for place in range(size)]
    tokenizer = task.predict.__self__._pretrained.tokenizer
    alone_ = task.predict(module, [{"tokens": prompt}])[0]["text"]
    assert task.predict(module, [{"tokens": part} for part in ([5], prompt, [9] * 40)])[1]["text"] == alone_
    tokens = list(prompt)
    while len(tokens) < 64 and tokens[-1] != tokenizer.eos_token_id:
        tokens.append(int(module(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    assert alone_ == tokenizer.decode(tokens[size:], skip_special_tokens=True)


def corpus(folder: Path) -> Path:
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return folder / "corpus.jsonl"


@pytest.mark.parametrize("task", [{"fresh": True}, {"fresh": True, "packed": False}])
def test_it_learns(models: Path, texts: Path, tmp_path: Path, task: dict[str, Any]) -> None:
    raw = {
        "kind": "train", "steps": 60, "batch": 4, "optimizer": {"name": "adamw", "lr": 0.02}, "log": {"loggers": []},
        "task": {"name": "causal-lm", "path": str(texts), "model": str(models / "llama"), "length": 32, **task},
    }  # fmt: skip
    run = train_here(TrainRecipe.parse(raw), tmp_path / "run")
    assert run.failure() is None
    assert read_jsonl(run.metrics)[-1]["valid"]["loss"] < 1.5 < read_jsonl(run.metrics)[0]["loss"]
