"""What a trained model is for: predictions for a file, on Ray, and folders that others load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.errors import RecipeError
from raytrain.run.directory import RunDirectory
from raytrain.testing import train_here
from raytrain.training.recipe import TrainRecipe
from raytrain.training.results import load_best, load_recipe

MINE = """
import json
import torch
from torch import nn
from raytrain import Task

def model(seed):
    torch.manual_seed(seed)
    return nn.Linear(2, 1)

def data(split):
    points = torch.randn(60, 2, generator=torch.Generator().manual_seed(len(split)))
    return [(point, point.sum()) for point in points]

def losses(model, batch):
    return (model(batch[0])[:, 0] - batch[1]).square()

def inputs(path):
    return [torch.tensor(json.loads(line)) for line in path.read_text().splitlines()]

def predict(model, examples):
    if any(example.isinf().any() for example in examples):
        raise ZeroDivisionError("no such point")
    return [{"sum": round(float(value), 4)} for value in model(torch.stack(examples))[:, 0]]

plain = Task(model=model, data=data, losses=losses)
sums = Task(model=model, data=data, losses=losses, inputs=inputs, predict=predict)
"""


@pytest.fixture
def run(workplace: Path) -> Path:
    (workplace / "mine.py").write_text(MINE)
    raw = {"kind": "train", "task": "mine:sums", "steps": 20, "workers": 2, "log": {"loggers": []}, "ema": 0.5}
    recipe = TrainRecipe.parse(raw).with_overrides({"resources.cpus": 1, "evaluation.batch": 4})
    train_here(recipe.with_overrides({"workers": 1}), workplace / "run")
    (workplace / "run" / "recipe.toml").write_text(recipe.to_toml())
    return workplace / "run"


def test_predictions_are_in_order_and_those_of_the_best_checkpoint(
    run: Path, ray_cluster: None, raytrain: Callable[..., Any]
) -> None:
    points = torch.randn(31, 2).tolist()
    Path("points.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    ended = raytrain("predict", "run", "--input", "points.jsonl", "--output", "sums.jsonl")
    assert ended.status == 0, ended.err
    assert "31 predictions in sums.jsonl" in ended.err
    best = load_best(run, {})
    with torch.no_grad():
        expected = best.module()(torch.tensor(points))[:, 0].tolist()
    lines = [json.loads(line) for line in Path("sums.jsonl").read_text().splitlines()]
    assert [line["sum"] for line in lines] == pytest.approx(expected, abs=1e-4)


def test_an_error_on_a_worker_keeps_what_was_there(run: Path, ray_cluster: None, raytrain: Callable[..., Any]) -> None:
    Path("points.jsonl").write_text("[1.0, 2.0]\n" * 9 + "[Infinity, 1.0]\n")
    Path("sums.jsonl").write_text("as it was")
    ended = raytrain("predict", "run", "--input", "points.jsonl", "--output", "sums.jsonl")
    assert ended.status == 1
    assert "predicting failed on a worker: ZeroDivisionError: no such point" in ended.err
    assert Path("sums.jsonl").read_text() == "as it was"
    assert not list(run.parent.glob(".sums*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "nothing", "--input", "a", "--output", "b"], "nothing: there is no run here (no recipe.toml)"),
        (["predict", "run", "--input", "a", "--output", "b"], "--input: a: FileNotFoundError: [Errno 2] No such file"),
        (["predict", "run", "--input", "bad", "--output", "b"], "--input: bad: JSONDecodeError: Expecting value: line"),
        (
            ["predict", "run", "--input", "bad", "--output", "b", "task.name=mine:plain"],
            "has no `inputs` and `predict`",
        ),
        (["export", "run", "out"], "task.name: the model of mine:sums has no form to export: Task.export is None"),
        (["export", "run", "run"], "DIR: run exists and is not an empty folder; name another"),
        (["export", "nothing", "out"], "nothing: there is no run here (no recipe.toml)"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    run: Path, raytrain: Callable[..., Any], words: list[str], message: str
) -> None:
    Path("bad").write_text("hello\n")
    before = sorted(path.name for path in run.parent.iterdir())
    ended = raytrain(*words)
    assert message in ended.err
    assert ended.status == 2
    assert sorted(path.name for path in run.parent.iterdir()) == before


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_an_exported_folder_gives_the_logits_of_the_best_checkpoint(
    adapter: str, models: Path, workplace: Path, raytrain: Callable[..., Any]
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    (workplace / "films.tsv").write_text("a good film\tfine\na bad film\tdull\nthe plot is great\tfine\n" * 10)
    raw = {
        "kind": "train",
        "steps": 12,
        "batch": 4,
        "log": {"loggers": []},
        "adapter": adapter,
        "optimizer": {"lr": 0.01},
    }
    task = {"name": "classify", "model": str(models / "bert"), "path": "films.tsv"}
    run = train_here(TrainRecipe.parse({**raw, "task": task}).with_overrides({"ema": 0.9}), workplace / "run")
    assert run.failure() is None
    ended = raytrain("export", "run", "out")
    assert (ended.status, ended.err) == (0, "")
    best = load_best(run.path, {})
    theirs = AutoModelForSequenceClassification.from_pretrained("out").eval()
    assert set(theirs.config.label2id) == {"fine", "dull"}
    batch = AutoTokenizer.from_pretrained("out")(["a good plot", "bad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        ours = best.module().eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(theirs(**batch).logits, ours, rtol=0, atol=1e-6)


FILMS = ["the film is good\tpos", "a good plot\tpos", "the film is bad\tneg", "bad acting\tneg"]


@pytest.fixture
def films(models: Path, workplace: Path) -> RunDirectory:
    """A run that learned to tell "neg" from "pos"."""
    (workplace / "films.tsv").write_text("\n".join(FILMS * 5))
    raw = {"kind": "train", "steps": 30, "batch": 8, "log": {"loggers": []}, "optimizer": {"lr": 0.01}}
    task = {"name": "classify", "model": str(models / "bert"), "path": "films.tsv", "head": "mean"}
    run = train_here(TrainRecipe.parse({**raw, "task": {**task, "head_init": "prototypes"}}), workplace / "run")
    assert run.failure() is None
    assert load_recipe(run.path, {}).task.classes == ("neg", "pos")
    assert load_best(run.path, {}).evaluate()["accuracy"] == 1
    return run


def test_classes_stay_with_the_run_whatever_data_it_is_measured_on(films: RunDirectory, workplace: Path) -> None:
    (workplace / "one.tsv").write_text("\n".join(FILMS[:2]))
    (workplace / "strange.tsv").write_text("a good film\tpos\nno film\tzzz\n")
    (workplace / "folder").mkdir()
    (workplace / "folder" / "test.tsv").write_text("\n".join([*FILMS, "the plot is bad\tpos"]))
    assert load_best(films.path, {"task.path": "one.tsv"}).evaluate()["accuracy"] == 1, (
        "one class, which is not the first"
    )
    assert load_best(films.path, {"task.path": "folder/test.tsv"}).evaluate()["accuracy"] == 0.8, "all of the file"
    assert load_best(films.path, {"task.path": "folder"}).evaluate()["accuracy"] == 0.8, "a test split alone"
    assert load_best(films.path, {"task.held_out": str(workplace / "one.tsv")}).evaluate()["accuracy"] == 1
    with pytest.raises(RecipeError, match=r"^task.label: strange.tsv, line 2: the label 'zzz' is not one of task.clas"):
        load_best(films.path, {"task.path": "strange.tsv"}).evaluate()


def test_a_trained_model_is_used_without_its_data(
    films: RunDirectory, workplace: Path, raytrain: Callable[..., Any]
) -> None:
    (workplace / "films.tsv").unlink()
    (workplace / "new.txt").write_text("a good film\na bad film\n")
    best = load_best(films.path, {})
    found = best.task.predict(best.module().eval(), best.task.inputs(workplace / "new.txt"))
    assert [each["label"] for each in found] == ["pos", "neg"]
    ended = raytrain("export", "run", "out")
    assert ended.status == 0, ended.err
    config = json.loads((workplace / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "neg", "1": "pos"}


def test_a_run_that_goes_on_keeps_its_classes(films: RunDirectory, workplace: Path) -> None:
    more = [f"a story {place}\taaa" for place in range(3)]
    recipe = load_recipe(films.path, {"task.classes": [], "steps": 32})  # as one that was never run
    (workplace / "films.tsv").write_text("\n".join([*FILMS * 5, *more]))
    again = train_here(recipe, films.path)
    assert again.failure().message.startswith("task.label: films.tsv, line 21: the label 'aaa' is not one of task.cla")
    (workplace / "films.tsv").write_text("\n".join(FILMS[:2] * 5 + ["one more\tneg"]))
    again = train_here(recipe, films.path)
    assert again.failure() is None
    assert load_recipe(films.path, {}).task.classes == ("neg", "pos")


def test_an_alphabet_stays_with_the_run(workplace: Path) -> None:
    for name in ("abcd", "wxyz", "dabc"):
        (workplace / f"{name}.txt").write_text(name * 50)
    task = {"name": "text", "tokens": "chars", "path": "abcd.txt", "block": 16, "layers": 1, "heads": 1, "width": 16}
    raw = {"kind": "train", "steps": 20, "batch": 8, "log": {"loggers": []}, "optimizer": {"lr": 0.02}, "task": task}
    run = train_here(TrainRecipe.parse(raw), workplace / "run")
    assert run.failure() is None
    assert load_recipe(run.path, {}).task.alphabet == "abcd"
    assert load_best(run.path, {"task.path": "dabc.txt"}).evaluate()["loss"] < 0.5
    with pytest.raises(RecipeError, match=r"^task.path: wxyz.txt has the character 'w', which is not one of task.alph"):
        load_best(run.path, {"task.path": "wxyz.txt"}).evaluate()
