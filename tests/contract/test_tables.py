"""Every entry of every name table against the interface it is there for."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.errors import RecipeError
from raytrain.kinds import load_kinds
from raytrain.recipe import options_parameter, read_toml
from raytrain.registry import resolve, summary
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.options import SYNCHRONISERS
from raytrain.tasks.losses import loss_weights
from raytrain.tasks.task import TASKS, Task, make_task, task_options
from raytrain.testing import ThreadGroup, ThreadTransport, TinyModel, TinyOptions
from raytrain.training.evaluation import measure_batch


def entries() -> Iterator[Any]:
    for kind in load_kinds().values():
        for title in kind.tables:
            table = kind.table(title)
            for name in table:
                yield pytest.param(table, name, id=f"{title}-{name}")


@pytest.mark.parametrize(("table", "name"), list(entries()))
def test_every_name_stands_for_something_described(table: Mapping[str, str], name: str) -> None:
    line = summary(table, name)
    assert line.endswith((".", ")"))
    assert not line.startswith("This is the configuration class")


@pytest.mark.parametrize("name", list(load_kinds()))
def test_what_every_kind_names_is_there(name: str) -> None:
    kind = load_kinds()[name]
    for target in filter(None, (kind.run, kind.load, kind.panels, kind.check, *kind.remarks.values())):
        assert callable(resolve({}, target, "kind"))
    for file in kind.shipped():
        raw, _ = read_toml(str(file), [])
        recipe = kind.recipe_class().parse(raw)
        assert recipe.name == file.stem
        assert file.read_text().startswith("# "), "`raytrain list` prints a recipe's first comment"


@pytest.fixture(scope="session")
def small(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Options that make each task small, with the models and the data that it needs."""
    folder = tmp_path_factory.mktemp("records")
    lines = [{"text": f"the film was {'good' if place % 2 else 'bad'}", "label": place % 2} for place in range(40)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = [{"prompt": f"what of {place}", "answer": "very good"} for place in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    texts = {"path": str(folder / "texts.jsonl")}
    return {
        "text": {"layers": 1, "heads": 2, "width": 16, "block": 32},
        "classify": {**texts, "model": str(models / "bert")},
        "causal-lm": {**texts, "model": str(models / "llama"), "fresh": True, "length": 8},
        "instruct": {"path": str(folder / "pairs.jsonl"), "model": str(models / "chat"), "fresh": True, "generate": 2},
    }


@pytest.fixture
def task(name: str, small: dict[str, dict[str, Any]]) -> Task:
    factory = resolve(TASKS, name, "task.name")
    return make_task(factory, task_options(factory)(name=name, **small.get(name, {})))


@pytest.mark.parametrize("name", TASKS)
def test_tasks(task: Task) -> None:
    one, same, other = task.model(0), task.model(0), task.model(1)
    assert all(map(torch.equal, one.parameters(), same.parameters()))
    assert not all(map(torch.equal, one.parameters(), other.parameters()))
    for split in ("train", "valid"):
        examples = task.data(split)
        assert len(examples) > 0
        assert isinstance(examples.domain(0), str)
        assert isinstance(examples.label(len(examples) - 1), int)
        batch = task.collate([examples[place] for place in range(3)])
        losses, weights = task.losses(one, batch), loss_weights(task, batch, 3, torch.device("cpu"))
        assert losses.shape == weights.shape
        assert losses.dtype == torch.float32
        assert (weights >= 0).all()
        losses.sum().backward()
        assert all(parameter.grad is not None for parameter in one.parameters())
    with torch.no_grad():
        measured = measure_batch(task, one.eval(), batch, 3)
        losses = task.losses(one, batch)
    assert task.metric in measured
    assert all(count > 0 for _, count in measured.values())
    assert measured["loss"][0] == pytest.approx(float(losses @ weights), rel=1e-4)
    assert all(value > 0 for value in task.references().values())


@pytest.mark.parametrize("name", TASKS)
def test_what_tasks_settle_makes_the_same_model_where_there_is_no_data(
    name: str, task: Task, small: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    factory = resolve(TASKS, name, "task.name")
    options = task_options(factory)(name=name, **small.get(name, {}))
    kept = options.model_validate(json.loads(json.dumps(options.model_dump(mode="json"))) | dict(task.infer_options()))
    again = make_task(factory, kept)
    assert again.infer_options() == {}
    gone = kept.model_copy(update={"path": str(tmp_path / "gone.jsonl")} if "path" in small.get(name, {}) else {})
    without = make_task(factory, gone)
    one, other = task.model(0), without.model(0)
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    if task.predict is None:
        return
    (tmp_path / "in.txt").write_text("the film was great\n")
    examples = without.inputs(tmp_path / "in.txt")
    assert without.predict(other.eval(), examples) == task.predict(one.eval(), task.inputs(tmp_path / "in.txt"))
    without.export(other, tmp_path / "out")
    for use in (without.infer_options, lambda: without.data("train")):
        with pytest.raises(RecipeError, match=r"^task.path: no such file or folder: .*gone.jsonl$"):
            use()


HUGGING_FACE = {"classify": "AutoModelForSequenceClassification"} | dict.fromkeys(
    ("causal-lm", "instruct"), "AutoModelForCausalLM"
)


@pytest.mark.parametrize("name", TASKS)
def test_tasks_that_predict_take_a_file_and_give_json(name: str, task: Task, tmp_path: Path) -> None:
    if task.predict is None:
        assert task.inputs is None
        assert name not in HUGGING_FACE
        return
    (tmp_path / "in.txt").write_text("the film was great\n\nwhat of it?\n")
    examples = task.inputs(tmp_path / "in.txt")
    predicted = task.predict(task.model(0).eval(), [examples[place] for place in range(len(examples))])
    assert len(predicted) == 2
    assert json.loads(json.dumps(predicted)) == list(predicted)
    (tmp_path / "in.txt").write_text(" \n")
    with pytest.raises(RecipeError, match=r"in.txt has no records$"):
        task.inputs(tmp_path / "in.txt")
    with pytest.raises(RecipeError, match=r"^no such file or folder: .*gone.txt$"):
        task.inputs(tmp_path / "gone.txt")
    (tmp_path / "in.jsonl").write_text('{"text": "a", "prompt": "a"}\n{"text": 1, "prompt": 1}')
    with pytest.raises(RecipeError, match=r"in.jsonl, line 2: expected text in column '(text|prompt)'; got 1$"):
        task.inputs(tmp_path / "in.jsonl")


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_tasks_export_what_hugging_face_loads(name: str, task: Task, tmp_path: Path) -> None:
    import transformers

    module = task.model(1).eval()
    task.export(module, tmp_path / "out")
    loaded = getattr(transformers, HUGGING_FACE[name]).from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("the film was a question", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, module(input_ids=ids).logits)


@pytest.mark.parametrize("name", [name for name in SYNCHRONISERS if name != "fsdp"])  # which takes processes
def test_synchronisers_keep_replicas_equal(name: str) -> None:
    """At the end; what they share is equal at any time, and they stop together."""
    factory = resolve(SYNCHRONISERS, name, "sync.name")
    kind = options_parameter(factory)
    options = kind(name=name, **({"every": 2} if "every" in kind.model_fields else {}))

    def replica(transport: ThreadTransport) -> tuple[list[bool], list[torch.Tensor]]:
        module = TinyModel(TinyOptions(name="tiny", norm=True))
        sync = factory(ExactAverager(transport), options)
        sync.attach(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        stops, shared = [], []
        for step in range(9):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step * 10 + transport.rank))
            sync.set_weight(5.0)
            sync.before_backward()
            loss = module(x).square().mean()
            loss.backward()
            stops.append(sync.before_step(5 * loss.item(), stop=step == 3 and transport.rank == 1).stop)
            optimizer.step()
            optimizer.zero_grad()
            sync.after_step(1.0)
            with sync.synced_parameters():
                shared += [value.detach().clone() for value in module.parameters()]
        sync.state_dict()
        sync.finish()
        assert sync.bytes_sent > 0
        return stops, [*shared, *(value.detach() for value in module.state_dict().values())]

    (stops, first), *others = ThreadGroup(3).run(replica)
    assert stops[:3] == [False] * 3
    assert any(stops)
    for stops_there, other in others:
        assert stops_there == stops
        assert all(map(torch.equal, first, other))
