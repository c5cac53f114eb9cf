"""Every file that a run leaves, changed at every byte and cut at every place: noticed, by an error of ours.

A checkpoint, a trajectory and a `SeedModel` have checksums: nothing that differs is taken for what was written. Files
that people read or write have none (recipe.toml, failure.json and the rows of metrics, attempts and restarts), nor has
the list of a copy, whose entries are hashes: there, what has another form is refused, or a row left out.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytrain.errors import CheckpointError, RecipeError, TrainingError
from raytrain.json_files import add_checksum
from raytrain.launch.jobs.storage import Entry, dump, measured, parse
from raytrain.recipe import read_toml
from raytrain.run.checkpoint import (
    MANIFEST,
    CheckpointStore,
    checkpoint_errors,
    load_part,
    read_manifest,
    verify_checkpoint,
)
from raytrain.run.directory import RunDirectory
from raytrain.run.rows import read_jsonl
from raytrain.seeds.records import RECORD_DTYPE, TRAJECTORY_MAGIC, read_trajectory
from raytrain.seeds.seed_model import SeedModel
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.testing import train_here
from raytrain.training.build import resolve_recipe
from raytrain.training.kind import KIND
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import progress_from_dict
from raytrain.zeroth.replay import replay_trajectory
from raytrain.zeroth.trajectory import Trajectory


def flips(data: bytes) -> list[bytes]:
    """Return the data with a bit of each byte changed: the first of the first byte, the second of the second."""
    return [data[:place] + bytes([byte ^ (1 << place % 8)]) + data[place + 1 :] for place, byte in enumerate(data)]


def cuts(data: bytes) -> list[bytes]:
    return [data[:place] for place in range(len(data))]


@contextmanager
def holding(file: Path, data: bytes) -> Iterator[None]:
    """Let a file hold something else for a while."""
    good = file.read_bytes()
    file.write_bytes(data)
    yield
    file.write_bytes(good)


def store(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder, 2, ExactAverager(LocalTransport()))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with metrics, and an older one beside it."""
    state = {"w": torch.randn(3, 2), "optimizer": {"lr": 0.1, "betas": [0.9, 0.99], "most": float("inf")}, "name": "x"}
    for step in (1, 2):
        store(tmp_path).save(state, {"step": step, "best_step": 0, "position": 4})
    return store(tmp_path).save_metrics({"step": 2, "best_step": 2, "position": 4}, {"loss": 0.5})


@pytest.mark.parametrize("damage", [flips, cuts])
@pytest.mark.parametrize("name", [MANIFEST, "rank-00000.safetensors"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(checkpoint: Path, name: str, damage: Any) -> None:
    older = read_manifest(checkpoint.with_name("step-00000001"))
    for place, data in enumerate(damage((checkpoint / name).read_bytes())):
        with holding(checkpoint / name, data):
            with pytest.raises(CheckpointError):
                verify_checkpoint(checkpoint)
            if place % 20 == 0:
                with pytest.raises(CheckpointError):
                    load_part(checkpoint, 0)
                assert store(checkpoint.parent).newest() == older
    verify_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "KeyError: 'model'"),
        ({"model": [1]}, "TypeError: 'list' object is not a mapping"),
    ],
)
def test_a_state_of_another_form_is_one_error(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    plan = TrainRecipe.parse({"kind": "train", "task": "raytrain.testing:tiny", "steps": 2, "log": {"loggers": []}})
    run = RunDirectory(tmp_path / "run")
    progress = {"step": 1, "best_step": 0}
    with run.session(resume=False):
        run.prepare("")
        path = store(run.checkpoints).save(state, progress)
    failure = train_here(plan, run.path).failure()
    assert failure is not None
    assert failure.message == (
        f"{path}: what it holds is not the state that this run saves: {message}; use another checkpoint of the run"
    )


@pytest.mark.parametrize(
    ("progress", "message"),
    [
        ({"status": "gone"}, "status: Input should be 'running', 'done', 'stopped early' or 'interrupted'"),
        ({"step": "5"}, "step: Input should be a valid integer"),
        ({"more": 5}, "more: Unexpected keyword argument"),
    ],
)
def test_a_progress_of_another_form_is_one_error(progress: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^step-1: cannot be read: {message}$"):
        progress_from_dict(progress, "step-1")


def test_what_is_wrong_inside_a_checkpoint_keeps_its_own_error() -> None:
    with pytest.raises(CheckpointError, match="^mine$"), checkpoint_errors(Path("x")):
        raise CheckpointError("mine")


ABOUT = {"base": "w0", "directions": "d", "zo": {}, "optimizer": {}}
STEPS = [(0, 0.5, [(2**64 - 1, -1.5), (3, 1.0)]), (1, 0.5, []), (2, 0.25, [(5, 1.0), (6, 2.0)])]


@pytest.fixture
def trajectory(tmp_path: Path) -> Path:
    with Trajectory(tmp_path / "t", ABOUT, 0) as file:
        for step in STEPS:
            file.append(*step)
    return tmp_path / "t"


def test_a_direction_takes_26_bytes(trajectory: Path) -> None:
    assert trajectory.stat().st_size == len(TRAJECTORY_MAGIC + add_checksum(ABOUT) + b"\n") + 5 * 26


def test_a_changed_trajectory_is_refused_and_a_cut_one_is_a_shorter_one(trajectory: Path) -> None:
    good = trajectory.read_bytes()
    about, records = read_trajectory(trajectory)
    for place in range(8):
        for data in flips(good[place:]):
            with holding(trajectory, good[:place] + data), pytest.raises(CheckpointError):
                read_trajectory(trajectory)
    head, lengths = len(good) - records.nbytes, []
    for data in cuts(good):
        with holding(trajectory, data):
            if len(data) < head - 1:  # without the line feed it is as good
                with pytest.raises(CheckpointError):
                    read_trajectory(trajectory)
            else:
                assert read_trajectory(trajectory)[0] == about
                found = read_trajectory(trajectory)[1]
                assert found.tobytes() == records[: len(found)].tobytes()
                lengths.append(len(found))
    assert sorted(set(lengths)) == [0, 2, 3]  # whole steps


def test_records_that_are_missing_moved_or_of_another_trajectory_are_noticed(trajectory: Path, tmp_path: Path) -> None:
    good, size = trajectory.read_bytes(), RECORD_DTYPE.itemsize
    head, lines = good[: -5 * size], [good[len(good) - (5 - place) * size :][:size] for place in range(5)]
    with Trajectory(tmp_path / "other", {**ABOUT, "base": "w1"}, 0) as other:
        other.append(*STEPS[0])
    foreign = (tmp_path / "other").read_bytes()[-2 * size :]
    for records in (
        lines[:1] + lines[2:],
        lines[:2] + lines[3:],
        [lines[1], lines[0], *lines[2:]],
        lines + lines[3:],
        [foreign, *lines[2:]],
        [*lines, b"\0" * size],
    ):
        with (
            holding(trajectory, head + b"".join(records)),
            pytest.raises(CheckpointError, match="changed since it was wri"),
        ):
            read_trajectory(trajectory)


@pytest.mark.parametrize(
    "steps",
    [
        [(0, 0.5, [(1, float("nan"))])],
        [(0, float("inf"), [(1, 1.0)])],
        [(3, 0.5, [(1, 1.0)]), (2, 0.5, [(1, 1.0)])],
        [(0, 0.5, [(1, 1.0), (2, 1.0)]), (0, 0.5, [(1, 1.0)])],
    ],
)
def test_records_that_no_run_writes_are_refused(tmp_path: Path, steps: list[Any]) -> None:
    with Trajectory(tmp_path / "t", ABOUT, 0) as file:
        for step in steps:
            file.append(*step)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/t: the step of record 1|2 changed since it was written"):
        read_trajectory(tmp_path / "t")


def test_a_run_goes_on_from_what_is_intact_of_its_trajectory(trajectory: Path) -> None:
    good = trajectory.read_bytes()
    for data in flips(good)[-3 * RECORD_DTYPE.itemsize + 1 :] + [good + b"\0" * 999]:  # behind the first step
        with holding(trajectory, data):
            with Trajectory(trajectory, ABOUT, 1) as file:
                for step in STEPS[1:]:
                    file.append(*step)
            assert trajectory.read_bytes() == good
    with (
        holding(trajectory, good[:-30] + b"x" + good[-29:]),
        pytest.raises(RecipeError, match=rf"^zo.trajectory: expected step 3 in {trajectory}; it is missing"),
    ):
        Trajectory(trajectory, ABOUT, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"base": 3},
        {"initial": {"nothing": ""}},
        {"initial": {"out.weight": "****"}},
        {"initial": {"out.weight": "AAAA"}},
        {"optimizer": {}},
        {"optimizer": {"name": "os:system"}},
        {"optimizer": {"name": ["zo-sgd"]}},
        {"optimizer": {"name": "zo-sgd", "lr": "x"}},
        {"zo": {"distribution": "x", "sparsity": 0.0, "blockwise": False}},
        {"zo": {"distribution": "rademacher", "sparsity": "0", "blockwise": False}},
        {"more": 1},
    ],
)
def test_a_header_that_no_run_writes_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    fields = {"task": "raytrain.testing:tiny", "steps": 1, "optimizer": "zo-sgd", "log": {"loggers": []}}
    plan = TrainRecipe.parse({"kind": "train", **fields})
    run = train_here(plan, tmp_path / "run")
    about, records = read_trajectory(run.trajectory)
    with Trajectory(tmp_path / "t", {**about, **change}, 0):
        pass
    with pytest.raises(CheckpointError, match="its header does not fit this model"):
        replay_trajectory(tmp_path / "t", resolve_recipe(plan, run)[1].model(0))


def test_a_changed_seed_model_is_refused_or_the_same(tmp_path: Path) -> None:
    file = tmp_path / "model"
    model = SeedModel("base", (5, 2**64 - 1, 7), torch.tensor([0.5, -1e-9, 3.0], dtype=torch.float64), version=4)
    model.save(file)
    good, accepted = file.read_bytes(), 0
    for data in flips(good) + cuts(good) + [good + b"\0"] + [good.replace(b" ", b"\t")]:
        with holding(file, data):
            try:
                found = SeedModel.load(file)
            except CheckpointError:
                continue
            accepted += 1
            assert (found.base, found.seeds, found.distribution, found.version) == (
                "base",
                model.seeds,
                "rademacher",
                4,
            )
            assert torch.equal(found.coefficients, model.coefficients)
    assert accepted <= 1  # blanks at the end of the header
    with holding(file, good.replace(b"seed model 4", b"seed model 3")), pytest.raises(CheckpointError) as caught:
        SeedModel.load(file)
    assert str(caught.value) == (
        f"{file}: expected a file that SeedModel.save wrote, of format 4; this is one of format '3'"
    )


def test_a_list_of_another_form_is_refused() -> None:
    good = dump({"metrics.jsonl": measured([b"x"]), "checkpoints/step-1/a": measured([b"yz"])})
    for data in cuts(good):
        with pytest.raises(TrainingError, match=r"^files.json is damaged: "):
            parse(data)
    for data in flips(good):
        try:
            found = parse(data)
        except TrainingError:
            continue
        assert all(type(entry) is Entry and type(entry.bytes) is int for entry in found.values())
        assert all(entry.bytes >= 0 and len(bytes.fromhex(entry.sha256)) == 32 for entry in found.values())


ROWS: dict[str, list[dict[str, Any]]] = {
    "metrics": [{"step": 1, "samples": 2, "seconds": 0.5, "loss": 1.5}, {"step": 1, "valid": {"loss": None, "x": 2.5}}],
    "attempts": [{"time": 1.5, "from_step": 0, "workers": [{"pid": 1}]}, {"from_step": 3}],
    "restarts": [{"time": 1.5, "workers": {"0": "it died"}}, {"workers": {}}],
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_another_form_is_left_out_and_no_other_and_said_once(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    file: Path = getattr(RunDirectory(tmp_path), name)
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS[name] * 2]
    good = b"".join(lines)
    for place, data in enumerate(flips(good)):
        file.write_bytes(data)
        found, hit = read_jsonl(file), good[:place].count(b"\n")
        lost = 2 if good[place : place + 1] == b"\n" else 1  # the line feed joins two lines
        others = ROWS[name] * 2
        del others[hit : hit + lost]
        assert found[:hit] == others[:hit]
        assert found[len(found) - len(others[hit:]) :] == others[hit:]
        assert len(found) <= len(others) + 1
        assert all(type(row["step"]) is int for row in found if name == "metrics")
    caplog.clear()
    file.write_bytes(b'{"torn": \n\0\0\n' + good)
    assert read_jsonl(file) == read_jsonl(file) == ROWS[name] * 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{file}: 2 line(s) are torn or damaged and are left out"
    ]


def test_a_failure_of_another_form_is_refused(tmp_path: Path) -> None:
    run, file = RunDirectory(tmp_path), tmp_path / "failure.json"
    run.record_failure(TrainingError("the loss is nan\udcff"), 0)
    assert run.failure().message == "the loss is nan?"
    good = file.read_bytes()
    for data in flips(good) + cuts(good) + [b"[" * 9999]:
        with holding(file, data):
            try:
                found = run.failure()
            except TrainingError:
                continue
            assert isinstance(found.message, str)
            assert type(found.exit_status) is int


def parsed(file: Path) -> TrainRecipe | None:
    try:
        return TrainRecipe.parse(read_toml(str(file), [])[0])
    except RecipeError:
        return None


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 9999,
        "x = " + "{a=" * 9999,
        "seed = " + "9" * 9999,
        "seed = 0x" + "f" * 9999,
        "steps = 1e400",
        "task = [1]",
        "kind = []",
        "task = {name = 3}",
        "optimizer = {name = {}}",
        "x = '\udcff'",
        "",
    ],
)
def test_a_recipe_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.toml").write_text(text, errors="surrogateescape")
    assert parsed(tmp_path / "recipe.toml") is None


@given(st.data())
def test_a_changed_recipe_is_refused_or_a_recipe(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    good = (KIND.recipes / "digits.toml").read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    file = tmp_path_factory.getbasetemp() / "changed.toml"
    file.write_bytes(good[:place] + data.draw(st.binary(max_size=2)) + good[place + data.draw(st.integers(0, 3)) :])
    parsed(file)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab.-", max_size=4) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "lr", "0", "every"]), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(TrainRecipe.model_fields)), values, max_size=4), values)
def test_whatever_a_recipe_holds_only_errors_of_ours_come_out(raw: dict[str, Any], value: Any) -> None:
    for field in ("optimizer.name", "optimizer", "task.source.name", "optimizer.groups.0.lr", "log.loggers.0"):
        try:
            TrainRecipe.parse_with({"kind": "train", "task": "digits", **raw}, {field: value})
        except RecipeError:
            continue
