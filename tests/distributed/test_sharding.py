"""Sharded workers against workers that keep everything: the same run, the same checkpoints, a share of the memory."""

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pytest
import torch

from raytrain.overrides import apply_overrides
from raytrain.run.checkpoint import list_checkpoints, load_part
from raytrain.run.directory import RunDirectory
from raytrain.run.rows import read_jsonl
from raytrain.testing import PEER_LOST_STATUS, repeatable_rows, train_each_with_gloo, train_here, train_with_gloo
from raytrain.training.recipe import TrainRecipe
from raytrain.training.results import load_best

BASE = {
    "kind": "train",
    "steps": 12,
    "schedule": {"name": "constant", "warmup": 3},
    "evaluation": {"every": 6},
    "checkpoint": {"every": 6, "keep": 9},
    "log": {"every": 1, "loggers": []},
    "sync": {"timeout_seconds": 100},
}
TINY = BASE | {"task": {"name": "raytrain.testing:tiny"}, "precision": "float64", "batch": 4, "optimizer": {"lr": 0.02}}
LLAMA = BASE | {
    "task": {"name": "text", "path": "text.txt", "model": "llama", "layers": 2, "width": 32, "heads": 2, "block": 32},
    "batch": 8,
    "optimizer": {"lr": 1e-3},
}
GPT = apply_overrides(LLAMA, {"task.model": "gpt"})
WIDER = [{"from": 5, "task.width": 40}]
ODD = BASE | {
    "task": {"name": "probe:odd"},
    "precision": "float64",
    "batch": 2,
    "optimizer": {"name": "sgd", "lr": 0.02},  # Adam would make much of a gradient that is rounding
}

PROBE = '''
"""What the workers of the tests are asked to do beside training, and a model that is hard to shard."""

import gc
import json
from pathlib import Path

import torch
from torch import nn

from raytrain import Task
from raytrain.run.checkpoint import list_checkpoints, load_part
from raytrain.training.replica import load_state, state_of
from raytrain.testing import FaultPlan

HERE = Path(__file__).parent
fails = FaultPlan(HERE).at(1, 3, "fail")
hangs = FaultPlan(HERE).at(1, 8, "hang")


def weigh(replica):
    """Note what this worker keeps after a step, and what it would keep alone."""
    if replica.progress.step != 3:
        return
    gc.collect()
    kept = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and type(thing) in (torch.Tensor, nn.Parameter):
            kept[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    state = [value for entries in replica.optimizer.state.values() for value in entries.values()]
    (HERE / f"weighed-{replica.world_size}-{replica.rank}.json").write_text(json.dumps({
        "model": sum(value.numel() * value.element_size() for value in replica.module.parameters()),
        "parts": sum(value.nbytes for value in replica.local_parameters.parameters()),
        "state": sum(value.nbytes for value in state if value.dim()),
        "alive": sum(kept.values()),
        "types": sorted({str(value.dtype) for value in [*state, *replica.module.parameters()]}),
    }))


def flat(state, path=""):
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{path}/{key}").items()}
    return {path: state} if isinstance(state, torch.Tensor) else {}


def equal(one, other):
    one, other = flat(one), flat(other)
    return len(one) > 10 and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def reload(replica):
    """Put the checkpoint of a run without sharding in, take it out again, and note whether it is the same."""
    if replica.progress.step != 2:
        return
    path = list_checkpoints(HERE / "gpt-ema-one" / "checkpoints")[-1]
    saved = load_part(path, 0)
    load_state(replica, saved, None, path)
    again = state_of(replica)
    if replica.rank == 0:
        for state in (saved, again):
            del state["optimizer"]["groups"]  # what the recipe sets
        (HERE / "reloaded.json").write_text(json.dumps(equal(saved, again)))


class Odd(nn.Module):
    """A number to learn, a layer called twice, tied layers, one that only some examples use, and one that none does."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)) for _ in range(3)
        )
        self.tied = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.tied[1].weight = self.tied[0].weight
        self.some, self.none, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x):
        for layer in [*self.layers, self.layers[0], *self.tied, self.frozen]:
            x = x + self.scale * layer(x)
        if x[0, 0] > 1:
            x = x + self.some(x)
        return x.sum(dim=1)


def model(seed):
    torch.manual_seed(seed)
    return Odd()


def data(split):
    return [(row, row.sin().sum()) for row in torch.randn(3 if split == "valid" else 50, 4, dtype=torch.float64,
                                                          generator=torch.Generator().manual_seed(len(split)))]


odd = Task(model=model, data=data, losses=lambda model, batch: (model(batch[0]) - batch[1]).square())
'''


class Runs:
    """Runs in folders beside each other; one of them hangs while the others go on."""

    hanging: Future[list[int]]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def recipe(self, base: dict[str, Any], **changes: Any) -> TrainRecipe:
        fields = {name.replace("__", "."): value for name, value in changes.items()}
        if "path" in base["task"]:
            fields["task.path"] = str(self.folder / "text.txt")
        return TrainRecipe.parse(apply_overrides(base, fields))

    def sharded(self, base: dict[str, Any], workers: int, **changes: Any) -> TrainRecipe:
        return self.recipe(base, workers=workers, sync__name="fsdp", **changes)

    def one(self, name: str, base: dict[str, Any], **changes: Any) -> None:
        train_here(self.recipe(base, **changes), self.folder / name)

    def failure(self, name: str) -> Any:
        return RunDirectory(self.folder / name).failure()

    def final(self, name: str) -> dict[str, torch.Tensor]:
        """Return all tensors of the last checkpoint: of the model, of the optimizer and of the average."""
        saved = load_part(list_checkpoints(self.folder / name / "checkpoints")[-1], 0)
        state = saved["optimizer"]["state"]
        entries = {f"{of} {key}": value for of in state for key, value in state[of].items()}
        averages = {f"{of} average": value for of, value in saved["ema"].items()}
        return saved["model"] | entries | averages

    def history(self, name: str) -> list[dict[str, Any]]:
        return [row | row.pop("valid", {}) for row in repeatable_rows(self.metrics(name))]

    def metrics(self, name: str) -> Path:
        return self.folder / name / "metrics.jsonl"

    def check_equal(self, one: str, other: str, atol: float) -> None:
        assert self.failure(one) is None, self.failure(one)
        assert self.failure(other) is None, self.failure(other)
        first, second = self.final(one), self.final(other)
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=atol, msg=partial("{}: {}".format, name))
        for row, again in zip(self.history(one), self.history(other), strict=True):
            assert row == pytest.approx(again, rel=0, abs=10 * atol)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """All sharded runs: with four processes one after the other, and then with two."""
    made = Runs(tmp_path_factory.mktemp("sharding"))
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(2000)]
    (made.folder / "text.txt").write_text(" ".join(words))
    (made.folder / "probe.py").write_text(PROBE)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as beside:
        patch.setenv("PYTHONPATH", f"{made.folder}:{os.environ.get('PYTHONPATH', '')}")
        patch.syspath_prepend(str(made.folder))
        made.one("gpt-ema-one", GPT, clip=0.1, ema=0.9)
        four = {
            "llama-four": made.sharded(LLAMA, 4, batch=2, callbacks=["probe:weigh"]),
            "tiny": made.sharded(TINY, 4, task__norm=True, batch=2, accumulate=2, ema=0.9, evaluation__batch=3),
            "tiny-whole": made.recipe(
                TINY, workers=4, task__norm=True, batch=2, accumulate=2, ema=0.9, evaluation__batch=3
            ),
            "odd": made.sharded(ODD, 4, activation_checkpointing=True),
            "odd-whole": made.recipe(ODD, workers=4),
            "mixed": made.sharded(LLAMA, 4, batch=2, steps=6),
        }
        assert train_each_with_gloo([(recipe, made.folder / name) for name, recipe in four.items()]) == [0] * 4
        hanging = made.sharded(TINY, 2, callbacks=["probe:hangs"], sync__timeout_seconds=40)
        made.hanging = beside.submit(train_with_gloo, hanging, made.folder / "hanging")
        copytree(made.folder / "mixed", made.folder / "mixed-unsharded")
        two = {
            "failing": made.sharded(TINY, 2, callbacks=["probe:fails"]),
            "unbroken": made.sharded(TINY, 2),
            "llama-two": made.sharded(LLAMA, 2, batch=4, activation_checkpointing=True, compile="aot_eager"),
            "gpt-ema-two": made.sharded(GPT, 2, batch=2, accumulate=2, clip=0.1, ema=0.9),
            "gpt-bfloat16": made.sharded(GPT, 2, batch=4, precision="bfloat16", callbacks=["probe:weigh"]),
            "reloaded": made.sharded(GPT, 2, batch=4, ema=0.9, callbacks=["probe:reload"]),
            "mixed": made.sharded(LLAMA, 2, batch=4),
            "mixed-unsharded": made.recipe(LLAMA, workers=2, batch=4),
            "adapted": made.sharded(LLAMA, 2, batch=4, adapter__name="lora"),
            "adapted-whole": made.recipe(LLAMA, workers=2, batch=4, adapter__name="lora"),
            "averaging": made.sharded(TINY, 2, optimizer__name="schedulefree"),
            "averaging-whole": made.recipe(TINY, workers=2, optimizer__name="schedulefree"),
            "reshaped": made.sharded(LLAMA, 2, batch=4, ema=0.9, phases=WIDER),
            "reshaped-whole": made.recipe(LLAMA, workers=2, batch=4, ema=0.9, phases=WIDER),
            "odd-bfloat16": made.sharded(ODD, 2, precision="bfloat16", activation_checkpointing=True),
        }
        assert train_each_with_gloo([(recipe, made.folder / name) for name, recipe in two.items()]) == [0] * 2
        yield made


@pytest.fixture(scope="module")
def llama_one(runs: Runs) -> str:
    runs.one("llama-one", LLAMA)
    return "llama-one"


def test_four_sharded_workers_equal_one_with_four_times_the_batch(runs: Runs, llama_one: str) -> None:
    runs.check_equal("llama-four", llama_one, atol=1e-5)


def test_two_sharded_workers_that_recompute_compiled_blocks_equal_one(runs: Runs, llama_one: str) -> None:
    runs.check_equal("llama-two", llama_one, atol=1e-5)


def test_tied_weights_clipping_averages_and_micro_batches_change_nothing(runs: Runs) -> None:
    runs.check_equal("gpt-ema-two", "gpt-ema-one", atol=1e-5)
    assert "lm_head.weight" not in runs.final("gpt-ema-two")


@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_sharded_workers_equal_workers_that_keep_everything(runs: Runs, name: str) -> None:
    """Uneven weights, buffers that move, and parameters that are frozen, shared, without dimensions or not used."""
    runs.check_equal(name, f"{name}-whole", atol=1e-10)


def test_adapters_are_sharded_with_what_they_stand_beside(runs: Runs) -> None:
    runs.check_equal("adapted", "adapted-whole", atol=1e-5)
    assert all("lora_" in name for name in runs.final("adapted"))


def test_shards_of_another_shape_inherit_what_whole_parameters_do(runs: Runs) -> None:
    runs.check_equal("reshaped", "reshaped-whole", atol=1e-5)


def test_an_optimizer_that_averages_by_itself_averages_parts(runs: Runs) -> None:
    runs.check_equal("averaging", "averaging-whole", atol=1e-10)
    assert any(name.endswith(" average") for name in runs.final("averaging"))


def test_a_worker_keeps_its_share_only(runs: Runs) -> None:
    kept = [json.loads((runs.folder / f"weighed-4-{rank}.json").read_text()) for rank in range(4)]
    model = kept[0]["model"]
    assert sum(one["parts"] for one in kept) == model
    for one in kept:
        assert one["parts"] <= 1.05 * model / 4
        assert one["state"] == 2 * one["parts"]
        assert one["alive"] < 1.25 * 3 * model / 4
        assert one["types"] == ["torch.float32"]


def test_a_checkpoint_goes_on_with_any_number_of_workers_sharded_or_not(runs: Runs, llama_one: str) -> None:
    copytree(runs.folder / "mixed-unsharded", runs.folder / "mixed-one")
    for path in list_checkpoints(runs.folder / "mixed-one" / "checkpoints")[1:]:
        rmtree(path)
    runs.one("mixed-one", LLAMA)
    for name in ("mixed", "mixed-unsharded", "mixed-one"):
        runs.check_equal(name, llama_one, atol=1e-5)
        assert [row["from_step"] for row in read_jsonl(runs.folder / name / "attempts.jsonl")][:2] == [0, 6]


def test_a_checkpoint_is_loaded_and_gathered_to_the_bit(runs: Runs) -> None:
    assert runs.failure("reloaded") is None
    assert json.loads((runs.folder / "reloaded.json").read_text()) is True


def test_a_sharded_run_is_evaluated_by_one_process(runs: Runs) -> None:
    measured = load_best(runs.folder / "gpt-ema-two", {}).evaluate()
    last = [row for row in runs.history("gpt-ema-two") if "bits_per_byte" in row][-1]
    assert measured["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-6)


def test_bfloat16_is_for_computing_only(runs: Runs) -> None:
    runs.one("gpt-bfloat16-one", GPT, precision="bfloat16")
    for name in ("gpt-bfloat16", "odd-bfloat16"):
        assert runs.failure(name) is None, runs.failure(name)
        assert {value.dtype for value in runs.final(name).values() if value.is_floating_point()} == {torch.float32}
    for row, one in zip(runs.history("gpt-bfloat16"), runs.history("gpt-bfloat16-one"), strict=True):
        assert row["loss"] == pytest.approx(one["loss"], rel=3e-3)
    assert runs.history("gpt-bfloat16")[-1]["loss"] < 0.95 * runs.history("gpt-bfloat16")[0]["loss"]
    assert json.loads((runs.folder / "weighed-2-0.json").read_text())["types"] == ["torch.float32"]


def test_an_error_of_one_worker_ends_the_others_at_once(runs: Runs) -> None:
    """Not after the timeout of 100 s: the processes live on, and the connections close although FSDP keeps groups."""
    failure = runs.folder / "failing" / "failure.json"
    assert runs.failure("failing").message == "worker 1: RuntimeError: a fault on purpose at rank 1, step 3"
    following = read_jsonl(runs.folder / "unbroken" / "attempts.jsonl")[0]["time"]
    assert following - failure.stat().st_mtime < 80


def test_a_worker_that_hangs_ends_and_the_other_learns_of_it(runs: Runs) -> None:
    """The watchdog ends the one that hangs, and not the one that waits for it in a gathering of FSDP."""
    assert runs.hanging.result() == [PEER_LOST_STATUS, 1]
    assert "testing.py" in (runs.folder / "hanging" / "hang-1.txt").read_text()
