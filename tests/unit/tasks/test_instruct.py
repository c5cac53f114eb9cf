import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.data.collate import IGNORE_INDEX
from raytrain.errors import RecipeError
from raytrain.models.generation import longest_common_subsequence, rouge_l
from raytrain.run.rows import read_jsonl
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.tasks.instruct import InstructOptions, instruct
from raytrain.tasks.task import Task
from raytrain.testing import ThreadGroup, train_here
from raytrain.training.evaluation import evaluate
from raytrain.training.recipe import TrainRecipe

words = st.lists(st.sampled_from("abcd"), max_size=7)


@settings(deadline=None)
@given(words, words)
def test_common_subsequences_are_the_longest(one: list[str], other: list[str]) -> None:
    def subsequences(row: list[str]) -> set[tuple[str, ...]]:
        return {part for size in range(len(row) + 1) for part in combinations(row, size)}

    assert longest_common_subsequence(one, other) == max(map(len, subsequences(one) & subsequences(other)))


@settings(deadline=None)
@given(words, words)
def test_rouge_l_is_a_similarity(one: list[str], other: list[str]) -> None:
    score = rouge_l(" ".join(one), " ".join(other))
    assert 0 <= score <= 1
    assert score == rouge_l(" ".join(other), " ".join(one))
    assert (score == 1) == (one == other)
    assert (score == 0) == (not set(one) & set(other) and one != other)


@pytest.mark.parametrize(
    ("written", "reference", "score"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004, section 3.1, S1 and S2
        ("the gunman kill police", "police killed the gunman", 2 / 4),  # S3
        ("the gunman police killed", "police killed the gunman", 2 / 4),  # S4
        ("Police, KILLED: the gunman!", "police killed the gunman", 1),
        ("a b c d e", "a c e", 2 * 3 / 8),
        ("naïve Café", "NAÏVE cafe", 1 / 2),
    ],
)
def test_rouge_l_of_known_examples(written: str, reference: str, score: float) -> None:
    assert rouge_l(written, reference) == pytest.approx(score)


PAIRS = [
    {"prompt": "what is the film", "answer": "very good"},
    {"prompt": "and the plot?", "answer": "naïve 漢 😀"},
    {"prompt": "the acting", "answer": "great, but\n\nnot the story"},
    {"prompt": "a question\nof two lines", "answer": "an answer"},
]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.jsonl", PAIRS)
    return tmp_path


def made(models: Path, path: Path | str, model: str = "chat", **options: Any) -> Task:
    return instruct(InstructOptions(name="instruct", path=str(path), model=str(models / model), **options))


def tokenizer_of(task: Task) -> Any:
    return task.predict.__self__._pretrained.tokenizer


def shown(task: Task, part: Any = "train") -> list[tuple[str, str]]:
    """Return the text of each example that is not scored, and the text that is."""
    data, tokenizer = task.data(part), tokenizer_of(task)
    found = []
    for place in range(len(data)):
        batch = task.collate([data[place]])
        whole = data[place]["tokens"]
        scored = batch["targets"][batch["targets"] != IGNORE_INDEX].tolist()
        assert scored == whole[len(whole) - len(scored) :], "the end is scored, and nothing before it"
        found.append((tokenizer.decode(whole[: len(whole) - len(scored)]), tokenizer.decode(scored)))
    return found


def test_the_answer_and_its_end_are_scored_and_nothing_else(models: Path, pairs: Path) -> None:
    assert shown(made(models, pairs)) == [
        (f"<|im_start|>user\n{pair['prompt']}<|im_end|>\n<|im_start|>assistant\n", f"{pair['answer']}<|im_end|>")
        for pair in PAIRS
    ]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_tokenizer_without_a_chat_template_gets_a_plain_one(models: Path, pairs: Path, model: str) -> None:
    task = made(models, pairs, model)
    assert shown(task) == [
        (f"<s>### user:\n{pair['prompt']}\n\n### assistant:\n", f"{pair['answer']}</s>") for pair in PAIRS
    ]
    from transformers import AutoTokenizer

    task.export(task.model(0), pairs / "out")
    assert AutoTokenizer.from_pretrained(pairs / "out").chat_template == tokenizer_of(task).chat_template


def with_template(models: Path, folder: Path, template: str) -> Path:
    """Copy the small chat model, with another template."""
    shutil.copytree(models / "chat", folder / "chat")
    tokenizer = tokenizer_of(made(models, write(folder / "x.jsonl", PAIRS)))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "chat")
    return folder


def test_tokens_that_would_merge_prompt_and_answer_do_not(models: Path, pairs: Path) -> None:
    """The prompt ends in " goo", the answer begins with "d": together they would be one token."""
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }} goo"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    folder = with_template(models, pairs / "more", template)
    for name in ("train", "dev"):
        write(pairs / f"{name}.jsonl", [{"prompt": "it is", "answer": "d film"}] * 2)
    task = made(folder, pairs)
    tokenizer, example = tokenizer_of(task), task.data("train")[0]
    merged = tokenizer("it is good film")["input_ids"]
    assert "Ġgood" in tokenizer.tokenize("it is good film")
    assert example["tokens"] != [*merged, tokenizer.eos_token_id]
    assert shown(task)[0] == ("it is goo", "d film<|im_end|>"), "without an end in the template, it is the end of text"
    # The model is asked exactly what it has learned to answer.
    asked = task.inputs(write(pairs / "ask.jsonl", [{"prompt": "it is"}]))
    assert asked[0]["tokens"] == example["tokens"][: example["prompt"]]


def test_weights_depend_on_the_answer_alone(models: Path, pairs: Path) -> None:
    task = made(models, pairs)
    module, examples = task.model(0).eval(), [task.data("train")[place] for place in range(4)]
    batch = task.collate(examples)
    weights, losses = task.weights(batch), task.losses(module, batch)
    assert weights.shape == losses.shape
    answers = [len(example["tokens"]) - example["prompt"] for example in examples]
    assert weights.sum() == sum(answers)
    assert weights.view(4, -1).sum(dim=1).tolist() == answers
    # Other tokens in the prompts, as many: other losses, the same weights and targets.
    for example in examples:
        example["tokens"] = [9] * example["prompt"] + example["tokens"][example["prompt"] :]
    changed = task.collate(examples)
    assert torch.equal(task.weights(changed), weights)
    assert torch.equal(changed["targets"], batch["targets"])
    assert not torch.equal(task.losses(module, changed), losses)
    assert (losses[weights == 0] == 0).all()


TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d", "note": None},
]


def chatml(messages: list[dict[str, Any]]) -> str:
    return "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in messages)


def test_conversations_have_an_answer_for_each_turn_or_the_last(models: Path, tmp_path: Path) -> None:
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.jsonl", [{"messages": TALK, "prompt": "not this"}])
    turns = [(f"{chatml(TALK[:2])}<|im_start|>assistant\n", "b<|im_end|>")]
    last = [(f"{chatml(TALK[:4])}<|im_start|>assistant\n", "d<|im_end|>")]
    assert shown(made(models, tmp_path)) == turns + last
    assert shown(made(models, tmp_path, turns="last")) == last
    task = made(models, tmp_path)
    asked = task.inputs(tmp_path / "dev.jsonl")
    assert [tokenizer_of(task).decode(each["tokens"]) for each in asked] == [last[0][0]], "the answer there is left out"


def test_columns_and_contexts_are_found(models: Path, tmp_path: Path) -> None:
    for name in ("train", "dev"):
        write(
            tmp_path / f"{name}.jsonl",
            [
                {"instruction": "sum up", "context": "a story", "response": "short", "category": "summary"},
                {"instruction": "say", "context": "", "response": "yes", "category": "talk"},
            ],
        )
    task = made(models, tmp_path, domain="category")
    prompts = [prompt.split("\n", 1)[1].split("<|im_end|>")[0] for prompt, _ in shown(task)]
    assert prompts == ["sum up\n\na story", "say"]
    train = task.data("train")
    assert [train.domain(place) for place in (0, 1)] == ["summary", "talk"]
    assert [train.label(place) for place in (0, 1)] == [0, 1]
    task = made(models, tmp_path, prompt="context", answer="category")
    assert [answer for _, answer in shown(task)] == ["summary<|im_end|>", "talk<|im_end|>"]
    (tmp_path / "ask.txt").write_text("what\nwho\n")
    assert len(task.inputs(tmp_path / "ask.txt")) == 2


def test_records_that_do_not_fit(models: Path, pairs: Path) -> None:
    sizes = [len(made(models, pairs).data("train")[place]["tokens"]) - 1 for place in range(4)]
    length = sorted(sizes)[1]
    small = [size for size in sizes if size <= length]
    assert len(made(models, pairs, length=length, overflow="skip").data("train")) == len(small)
    cut = made(models, pairs, length=length, overflow="truncate").data("train")
    assert [len(cut[place]["tokens"]) - 1 for place in range(4)] == [min(size, length) for size in sizes]
    first = next(place for place, size in enumerate(sizes) if size > length)
    prompt = cut[first]["prompt"]
    with pytest.raises(RecipeError) as refused:
        made(models, pairs, length=length).data("train")
    assert str(refused.value) == (
        f"task.overflow: train.jsonl, line {first + 1}: the prompt has {prompt} tokens and the answer "
        f"{sizes[first] + 1 - prompt}, and task.length is {length}; set task.overflow=truncate to cut answers, or "
        "task.overflow=skip to leave such records out"
    )
    with pytest.raises(
        RecipeError, match=r"the prompt has \d+ .* task.length is 2; set task.overflow=skip to leave such"
    ):
        made(models, pairs, length=2, overflow="truncate").data("train")
    with pytest.raises(RecipeError) as refused:
        made(models, pairs, length=2, overflow="skip").data("train")
    assert str(refused.value) == "task.overflow: no record of the train part fits into task.length = 2"


LOST = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
PROMPTLY = "{% if add_generation_prompt %}>{% endif %}{% for message in messages %}{{ message['content'] }}{% endfor %}"
ORDER = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}{% endif %}"


@pytest.mark.parametrize("template", [LOST, PROMPTLY])
def test_a_template_that_hides_where_the_answer_begins_is_refused(models: Path, pairs: Path, template: str) -> None:
    folder = with_template(models, pairs / "more", template)
    with pytest.raises(RecipeError) as refused:
        made(folder, pairs).data("train")
    assert str(refused.value) == (
        f"task.model: the chat template of {folder / 'chat'} writes the prompt of train.jsonl, line 1 differently when "
        "an answer follows, or changes the answer; set tokenizer.chat_template to one that does neither, and save the "
        "tokenizer there"
    )


def test_what_a_template_refuses_is_named(models: Path, pairs: Path) -> None:
    folder = with_template(models, pairs / "more", ORDER)
    with pytest.raises(RecipeError) as refused:
        made(folder, pairs).data("train")
    assert str(refused.value) == ("task.messages: train.jsonl, line 1: the chat template refuses it: no system message")


def test_a_template_that_wants_a_system_message_gets_it_from_the_data(models: Path, tmp_path: Path) -> None:
    chatml = (Path(models) / "chat" / "chat_template.jinja").read_text()
    folder = with_template(models, tmp_path / "more", ORDER + chatml.replace("<|im_end|>", "<pad>"))
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.jsonl", [{"messages": TALK}] * 2)
    task = made(folder, tmp_path, generate=2, new_tokens=4)
    task.infer_options()
    found = evaluate(task, task.model(0), task.data("valid"), 2, ExactAverager(LocalTransport()))
    assert found["exact_match"] == 0
    assert tokenizer_of(task).decode(task.predict.__self__._chat.stop_ids) == "<|im_end|><pad>"


HELLO = {"role": "user", "content": "hello"}


LIST = 'expected a list of messages, each with a text as "role" and as "content"; got'


@pytest.mark.parametrize(
    ("record", "options", "role", "message"),
    [
        ({"messages": []}, {}, "messages", f"{LIST} []"),
        ({"messages": [{"role": "user"}]}, {}, "messages", f"{LIST} [{{'role': 'user'}}]"),
        ({"messages": [HELLO]}, {}, "messages", "expected a message with the role 'assistant'"),
        ({"x": "a", "y": "b"}, {}, "prompt", "no column is called prompt or instruction or question or input; name one "
         "of: x, y"),
        ({"prompt": "a", "y": "b"}, {}, "answer", "no column is called answer or response or output or completion or "
         "target; name one of: prompt, y"),
        ({"prompt": "a", "answer": 3}, {}, "answer", "expected text in column 'answer'; got 3"),
        ({"prompt": "a", "context": "c", "answer": "b"}, {"context": "contxt"}, "context", "there is no column "
         "'contxt'; did you mean context? known: answer, context, prompt"),
        ({"prompt": "a", "answer": "b"}, {"messages": "talk"}, "messages", "there is no column 'talk'; known: answer, "
         "prompt"),
    ],
)  # fmt: skip
def test_records_without_a_conversation_are_named(
    models: Path, tmp_path: Path, record: dict[str, Any], options: dict[str, str], role: str, message: str
) -> None:
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.jsonl", [record])
    with pytest.raises(RecipeError) as refused:
        made(models, tmp_path, **options).data("train")
    assert str(refused.value) == f"task.{role}: train.jsonl, line 1: {message}"


def test_answers_are_written_and_compared_exactly_on_any_number_of_workers(models: Path, tmp_path: Path) -> None:
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.jsonl", [{"prompt": f"question {n}", "answer": f"{n} good {n}"} for n in range(11)])
    task = made(models, tmp_path, generate=5, new_tokens=6)
    module, valid = task.model(0), task.data("valid")
    asked = [place for place in range(len(valid)) if "answer" in valid[place]]
    assert asked == [0, 2, 5, 7, 10], "evenly spread"
    assert not any("answer" in task.data("train")[place] for place in range(11))
    alone = evaluate(task, module, valid, 4, ExactAverager(LocalTransport()))
    prompts = [{"tokens": valid[place]["tokens"][: valid[place]["prompt"]]} for place in asked]
    written = [each["text"] for each in task.predict(module.eval(), prompts)]
    expected = [rouge_l(text, f"{place} good {place}") for text, place in zip(written, asked, strict=True)]
    assert alone["rouge_l"] == pytest.approx(sum(expected) / 5)
    assert alone["exact_match"] == 0
    together = ThreadGroup(3).run(lambda transport: evaluate(task, module, valid, 4, ExactAverager(transport)))
    assert together[0] == together[1] == together[2]
    assert together[0] == pytest.approx(alone)


def test_it_learns_to_answer(models: Path, pairs: Path, tmp_path: Path) -> None:
    raw = {
        "kind": "train", "steps": 120, "batch": 4, "optimizer": {"name": "adamw", "lr": 0.02}, "log": {"loggers": []},
        "task": {
            "name": "instruct", "path": str(pairs), "model": str(models / "chat"), "generate": 4, "new_tokens": 40,
        },
    }  # fmt: skip
    run = train_here(TrainRecipe.parse(raw), tmp_path / "run")
    assert run.failure() is None
    last = read_jsonl(run.metrics)[-1]["valid"]
    assert last["loss"] < 0.1
    assert (last["rouge_l"], last["exact_match"]) == (1.0, 1.0)
