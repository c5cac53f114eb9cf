import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from raytrain.errors import CheckpointError
from raytrain.json_files import add_checksum
from raytrain.run.checkpoint import (
    MANIFEST,
    CheckpointStore,
    list_checkpoints,
    load_part,
    read_manifest,
    verify_checkpoint,
)
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.tasks.task import make_task
from raytrain.testing import ThreadGroup, ThreadTransport, tiny
from raytrain.training.build import build_replica
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import load_state, state_of


def store(folder: Path, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(folder, keep, ExactAverager(LocalTransport()))


def progress(step: int, best_step: int = 0) -> dict[str, Any]:
    return {"step": step, "best_step": best_step}


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state = {"model": {"w": torch.randn(3, 2)}, "plain": [1, 2.5, "x", None, True], "empty": {}}
    path = store(tmp_path).save(state, progress(7))
    found = load_part(path, 0)
    assert torch.equal(found["model"]["w"], state["model"]["w"])
    assert found["plain"] == state["plain"]
    assert read_manifest(path).metrics == {}
    assert store(tmp_path).save_metrics({**progress(7), "best": 0.5}, {"loss": 0.5}) == path
    verify_checkpoint(path)
    manifest = read_manifest(path)
    assert manifest.progress["best"] == 0.5
    assert (manifest.step, manifest.metrics, manifest.world_size) == (7, {"loss": 0.5}, 1)
    assert store(tmp_path).newest() == manifest


def test_each_replica_saves_its_own_part(tmp_path: Path) -> None:
    def replica(transport: ThreadTransport) -> Path:
        own = {"own": torch.tensor(transport.rank)} if transport.rank != 1 else {"plain": 1}
        return CheckpointStore(tmp_path, 2, ExactAverager(transport)).save(own, progress(3))

    path, *_ = ThreadGroup(3).run(replica)
    assert [load_part(path, 0)["own"].item(), load_part(path, 1), load_part(path, 2)["own"].item()] == [
        0,
        {"plain": 1},
        2,
    ]
    assert sorted(file.name for file in path.iterdir()) == [
        MANIFEST,
        "rank-00000.safetensors",
        "rank-00002.safetensors",
    ]


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step in range(1, 7):
        store(tmp_path).save({"w": torch.ones(1)}, progress(step, best_step=2 if step > 1 else 0))
    assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]


def test_what_a_run_that_went_back_left_is_removed_and_never_what_it_writes(tmp_path: Path) -> None:
    for step in (20, 40):
        path = store(tmp_path, keep=1).save({"w": torch.ones(1)}, progress(step, best_step=20))
    cut_short(path / "rank-00000.safetensors")
    assert store(tmp_path).newest().step == 20
    store(tmp_path, keep=1).save({"w": torch.ones(1)}, progress(30, best_step=20))
    assert names(tmp_path) == ["step-00000020", "step-00000030"]


def test_a_note_that_cannot_be_written_is_an_error_on_every_replica(tmp_path: Path) -> None:
    def replica(transport: ThreadTransport) -> str:
        with pytest.raises(CheckpointError) as caught:
            CheckpointStore(tmp_path, 2, ExactAverager(transport)).save_metrics(progress(5), {})
        return str(caught.value)

    first, second = ThreadGroup(2).run(replica)
    assert first == second
    assert "checkpoint step-00000005 could not be written" in first


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def move_out(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def mkfifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def rewrite(path: Path, **fields: Any) -> None:
    """Change a manifest as somebody who gets its checksum right does."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    del manifest["sha256"]
    (path / MANIFEST).write_bytes(add_checksum({**manifest, **fields}))


def rewrite_part(path: Path, **fields: Any) -> None:
    (part,) = json.loads((path / MANIFEST).read_bytes())["parts"]
    rewrite(path, parts=[{**part, **fields}])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: cut_short(path / "rank-00000.safetensors"),
            r"rank-00000.safetensors: has \d+ bytes where \d+ bytes were",
        ),
        (
            lambda path: flip(path / "rank-00000.safetensors"),
            r"rank-00000.safetensors: its contents changed since it was",
        ),
        (
            lambda path: (path / "rank-00000.safetensors").unlink(),
            r"rank-00000.safetensors: is missing where \d+ bytes",
        ),
        (
            lambda path: move_out(path / "rank-00000.safetensors"),
            r"rank-00000.safetensors: is missing where \d+ bytes",
        ),
        (
            lambda path: save_file({"v": torch.ones(5)}, path / "rank-00000.safetensors"),
            r"rank-00000.safetensors: its contents changed since it was",
        ),
        (lambda path: cut_short(path / MANIFEST), r"manifest.json: its contents changed since it was written"),
        (lambda path: (path / MANIFEST).unlink(), r"manifest.json: cannot be read: .*No such file"),
        (lambda path: mkfifo(path / MANIFEST), r"manifest.json: cannot be read: it is not a regular file"),
        (
            lambda path: (path / MANIFEST).write_text('{"format": 1, "metrics": {}}'),
            r"manifest.json: expected a checkpoint of format 3; this one has format 1, of another version of raytrain: "
            r"resume the run with that version, or start another$",
        ),
        (lambda path: rewrite(path, format="3"), r"manifest.json: cannot be read: format: Input should be a valid int"),
        (lambda path: rewrite(path, parts=[]), r"manifest.json: cannot be read: parts: List should have at least 1"),
        (lambda path: rewrite(path, progress={}), r"manifest.json: cannot be read: progress.step: Field required"),
        (lambda path: rewrite(path, more=1), r"manifest.json: cannot be read: more: Extra inputs are not permitted"),
        (lambda path: rewrite_part(path, file="../x"), r"manifest.json: cannot be read: parts.0.file: String should m"),
        (lambda path: rewrite_part(path, file="/dev/zero"), r"manifest.json: cannot be read: parts.0.file: String sho"),
        (
            lambda path: rewrite_part(path, state={"w": "tensor:v"}),
            r"its manifest and its files name different tensors",
        ),
        (lambda path: rewrite_part(path, state={}), r"its manifest and its files name different tensors"),
        (lambda path: rewrite_part(path, bytes=-1.5), r"manifest.json: cannot be read: parts.0.bytes: Input should be"),
    ],
)
def test_damage_is_noticed_and_the_one_before_is_used(tmp_path: Path, damage: Any, message: str) -> None:
    first = store(tmp_path).save({"w": torch.ones(5)}, progress(1))
    second = store(tmp_path).save({"w": torch.ones(5)}, progress(2))
    damage(second)
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(second)
    with pytest.raises(CheckpointError, match=message):
        load_part(second, 0)
    assert store(tmp_path).newest() == read_manifest(first)
    store(tmp_path).save({"w": torch.ones(5)}, progress(2))  # the run gets there again
    verify_checkpoint(second)
    shutil.rmtree(first)
    damage(second)
    with pytest.raises(CheckpointError, match=f"^no checkpoint of this run can be read:\n.*{message}"):
        store(tmp_path).newest()


def test_a_half_written_one_is_none(tmp_path: Path) -> None:
    path = store(tmp_path).save({"w": torch.ones(5)}, progress(1))
    path.rename(tmp_path / ".step-00000001.partial")
    assert store(tmp_path).newest() is None
    store(tmp_path).clean()
    assert list(tmp_path.iterdir()) == []


class KilledError(BaseException):
    """Where a process is killed."""


@pytest.mark.parametrize("files", ["rename", "rmtree", "unlink"])
@pytest.mark.parametrize("survived", [0, 1, 2])
def test_a_kill_while_a_step_is_saved_again_loses_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: str, survived: int
) -> None:
    first = store(tmp_path, keep=1).save({"w": torch.zeros(5)}, progress(1))
    calls = []

    def killed(real: Any) -> Any:
        def call(*given: Any, **more: Any) -> Any:
            calls.append(given)
            if len(calls) > survived:
                raise KilledError
            return real(*given, **more)

        return call

    with monkeypatch.context() as patch:
        where: Any = shutil if files == "rmtree" else Path
        patch.setattr(where, files, killed(getattr(where, files)))
        try:
            store(tmp_path, keep=1).save({"w": torch.ones(5)}, progress(1))
        except KilledError:
            pass
        else:
            assert len(calls) <= survived
    store(tmp_path).clean()
    assert store(tmp_path).newest() == read_manifest(first)
    assert set(load_part(first, 0)["w"].tolist()) in ({0.0}, {1.0})
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_a_kill_while_an_old_one_is_removed_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path, keep=1).save({"w": torch.ones(5)}, progress(1))

    def killed(path: Path, **_: Any) -> None:
        if path.name.endswith(".removed") and path.exists():
            (path / MANIFEST).unlink()
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KilledError):
            store(tmp_path, keep=1).save({"w": torch.ones(5)}, progress(2))
    assert names(tmp_path) == ["step-00000002"]
    store(tmp_path).clean()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_if_one_replica_cannot_write_none_has_a_checkpoint(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / ".step-00000005.partial").mkdir()
    (blocked / ".step-00000005.partial" / "rank-00001.safetensors").mkdir()  # where a file should go

    def replica(transport: ThreadTransport) -> str:
        with pytest.raises(CheckpointError) as caught:
            CheckpointStore(blocked, 2, ExactAverager(transport)).save({"w": torch.ones(2)}, progress(5))
        return str(caught.value)

    first, second = ThreadGroup(2).run(replica)
    assert first == second
    assert first.startswith(f"checkpoint step-00000005 could not be written to {blocked}: worker 1: ")
    assert list(blocked.iterdir()) == []


def test_a_replica_is_restored_to_the_bit_and_another_model_is_refused(tmp_path: Path) -> None:
    base = {"kind": "train", "task": {"name": "raytrain.testing:tiny", "norm": True}, "ema": 0.9}
    recipe = TrainRecipe.parse(base)
    task = make_task(tiny, recipe.task)
    averager = ExactAverager(LocalTransport())

    def trained(seed: int) -> Any:
        replica = build_replica(recipe.with_overrides({"seed": seed}), task, averager)
        for step in range(3):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            replica.module(x).square().sum().backward()
            replica.optimizer.step()
            replica.optimizer.zero_grad()
            replica.ema.update(step + 1)
        return replica

    one, other = trained(0), trained(1)
    path = store(tmp_path).save(state_of(one), progress(3))
    load_state(other, load_part(path, 0), load_part(path, 0), path)
    assert json.dumps(_listed(state_of(one)), sort_keys=True) == json.dumps(_listed(state_of(other)), sort_keys=True)
    held = [value for entries in other.optimizer.state.values() for value in entries.values()]
    assert held
    assert all(value.data_ptr() % 64 == 0 for value in held), "not memory of the file, in which sums round otherwise"

    lion = build_replica(recipe.with_overrides({"optimizer.name": "lion"}), task, averager)
    with pytest.raises(
        CheckpointError, match=r"optimizer is adamw, and the recipe's is lion; set optimizer.name=adamw"
    ):
        load_state(lion, load_part(path, 0), None, path)
    wider = build_replica(
        recipe.with_overrides({"task.norm": False}),
        make_task(tiny, recipe.with_overrides({"task.norm": False}).task),
        averager,
    )
    with pytest.raises(
        CheckpointError, match=r"of another model: norm.bias is \(8,\) in the checkpoint and absent in the model"
    ):
        load_state(wider, load_part(path, 0), None, path)


def _listed(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {key: _listed(value) for key, value in state.items()}
    return [_listed(value) for value in state] if isinstance(state, list | tuple) else state
