"""The loop against laws, and against the loop that anyone would write by hand."""

import threading
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from raytrain.data.sampler import Sampler
from raytrain.errors import TrainingError
from raytrain.optim.schedules import linear, lr_factor
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.tasks.task import Task
from raytrain.tensors import seed_everything_at
from raytrain.testing import ThreadGroup, ThreadTransport, TinyOptions, tiny
from raytrain.training.build import build_replica
from raytrain.training.evaluation import evaluate
from raytrain.training.loader import IndexedLoader
from raytrain.training.loop import LoopConfig, every_n, run_status, train
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import Progress, Replica

PLAN = LoopConfig(
    steps=12,
    seed=3,
    batch=6,
    accumulate=1,
    clip=0.5,
    autocast=None,
    lr_factor=partial(lr_factor, linear, steps=12, warmup=2, min_lr_ratio=0.0, decay_ratio=0.2),
    evaluate_every=0,
    checkpoint_every=0,
    patience=0,
)


class Watching:
    """A watch that remembers what it was told."""

    def __init__(self, task: Task, stop_at: int = 0) -> None:
        self._measure = partial(evaluate, task, examples=task.data("valid"), batch=5)
        self._stop_at = stop_at
        self.averager = ExactAverager(LocalTransport())
        self.rows: list[dict[str, float]] = []
        self.evaluated: list[int] = []
        self.saved: list[tuple[int, str]] = []
        self.noted: list[tuple[int, str, float]] = []

    def stop_requested(self) -> bool:
        return len(self.rows) + 1 == self._stop_at

    def on_step(self, replica: Replica, values: dict[str, float]) -> None:
        self.rows.append(values)

    def evaluate(self, replica: Replica) -> dict[str, float]:
        self.evaluated.append(replica.progress.step)
        return self._measure(module=replica.module, averager=self.averager)

    def save(self, replica: Replica) -> None:
        self.saved.append((replica.progress.step, replica.progress.status))

    def save_metrics(self, replica: Replica, metrics: dict[str, float]) -> None:
        assert self.saved[-1][0] == replica.progress.step
        self.noted.append((replica.progress.step, replica.progress.status, metrics["loss"]))


def recipe(**changes: Any) -> TrainRecipe:
    base = {"kind": "train", "task": "raytrain.testing:tiny", "precision": "float64", "seed": 3}
    return TrainRecipe.parse(base).with_overrides({"optimizer.lr": 0.02, **changes})


def run(plan: LoopConfig = PLAN, watch_with: Any = None, **changes: Any) -> tuple[Replica, Watching]:
    settings = recipe(**changes)
    task = tiny(settings.task)
    watch = Watching(task, **(watch_with or {}))
    replica = build_replica(settings, task, watch.averager)
    train(replica, task, IndexedLoader(task, task.data("train"), PLAN.seed), plan, watch)
    return replica, watch


def weights(replica: Replica) -> list[torch.Tensor]:
    return [value.detach().clone() for value in replica.module.parameters()]


def test_it_is_the_loop_one_would_write_by_hand() -> None:
    task = tiny(TinyOptions(name="tiny", dropout=0.3))
    module = task.model(3).double()
    decayed = [value for value in module.parameters() if value.requires_grad and value.dim() > 1]
    others = [value for value in module.parameters() if value.requires_grad and value.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.02, weight_decay=0.1
    )
    examples = task.data("train")
    for step in range(PLAN.steps):
        seed_everything_at(3, 0, step)
        batch = task.collate([examples[i] for i in Sampler(len(examples), 3).indices(step * 6, 6)])
        loss = torch.dot(task.losses(module, batch), batch["weight"]) / batch["weight"].sum().item()
        loss.backward()
        clip_grad_norm_(module.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * PLAN.lr_factor(step)
        optimizer.step()
        optimizer.zero_grad()
    ours, watch = run(**{"task.dropout": 0.3, "optimizer.weight_decay": 0.1})
    assert all(map(torch.equal, weights(ours), module.parameters()))
    assert [row["lr"] for row in watch.rows] == [0.02 * PLAN.lr_factor(step) for step in range(12)]


@pytest.mark.parametrize("pieces", [2, 3, 6])
def test_micro_batches_do_not_change_the_step(pieces: int) -> None:
    whole, _ = run()
    cut, watch = run(replace(PLAN, batch=PLAN.batch // pieces, accumulate=pieces))
    for one, other in zip(weights(whole), weights(cut), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert len(watch.rows) == 12


@pytest.mark.parametrize("members", [2, 3])
def test_replicas_take_the_step_of_one_with_all_the_examples(members: int) -> None:
    settings = recipe()
    task = tiny(settings.task)
    replicas: dict[int, Replica] = {}
    one_at_a_time = threading.Lock()  # threads share the generator that draws the first weights

    def replica(transport: ThreadTransport) -> None:
        with one_at_a_time:
            replicas[transport.rank] = build_replica(settings, task, ExactAverager(transport))
        watch = Watching(task)
        watch.averager = ExactAverager(transport)
        train(
            replicas[transport.rank],
            task,
            IndexedLoader(task, task.data("train"), PLAN.seed),
            replace(PLAN, batch=6 // members),
            watch,
        )

    ThreadGroup(members).run(replica)
    alone, _ = run()
    for rank in range(members):
        assert all(map(torch.equal, weights(replicas[0]), weights(replicas[rank])))
    for one, other in zip(weights(alone), weights(replicas[0]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert replicas[0].progress.position == alone.progress.position == 72


def test_two_runs_are_equal_to_the_bit_and_another_seed_is_not() -> None:
    first, second, other = (
        run(**{"task.dropout": 0.5})[0],
        run(**{"task.dropout": 0.5})[0],
        run(replace(PLAN, seed=4))[0],
    )
    assert all(map(torch.equal, weights(first), weights(second)))
    assert not all(map(torch.equal, weights(first), weights(other)))


def test_what_is_not_measured_is_not_logged() -> None:
    _, watch = run(replace(PLAN, clip=0.0))
    assert watch.rows[0].keys() == {"loss", "lr"}


def test_gradients_are_clipped() -> None:
    _, free = run(replace(PLAN, clip=1e9))
    replica, _ = run(replace(PLAN, clip=1e-6, steps=1), **{"optimizer.name": "sgd", "optimizer.lr": 1.0})
    before = build_replica(recipe(), tiny(recipe().task), ExactAverager(LocalTransport())).module
    moved = torch.cat(
        [(new - old).flatten() for new, old in zip(replica.module.parameters(), before.parameters(), strict=True)]
    )
    assert free.rows[0]["gradient_norm"] > 0.01
    assert moved.norm().item() == pytest.approx(1e-6 * PLAN.lr_factor(0), rel=1e-3)


def test_evaluations_and_checkpoints_come_when_they_are_due() -> None:
    _, watch = run(replace(PLAN, evaluate_every=5, checkpoint_every=4, lr_factor=lambda step: 0.0))
    assert watch.evaluated == [5, 10, 12]
    # Step 5 is the first and, as nothing learns, the best evaluation; the last step is always saved.
    assert watch.saved == [(4, "running"), (5, "running"), (8, "running"), (12, "done")]
    assert [(step, state) for step, state, _ in watch.noted] == [(5, "running"), (12, "done")]


def test_what_is_done_is_saved_before_it_is_evaluated() -> None:
    settings = recipe()
    task = replace(tiny(settings.task), measure=lambda *_: {"lost": (1.0, 1.0)})
    watch = Watching(task)
    with pytest.raises(TrainingError, match="measured lost, but the task's metric is 'loss'"):
        train(
            build_replica(settings, task, watch.averager),
            task,
            IndexedLoader(task, task.data("train"), PLAN.seed),
            PLAN,
            watch,
        )
    assert watch.saved == [(12, "done")]


def test_an_evaluation_that_was_cut_off_is_made_up_for() -> None:
    settings = recipe()
    task = tiny(settings.task)
    watch = Watching(task)
    replica = build_replica(settings, task, watch.averager)
    replica.progress = Progress(step=4, position=24, evaluated=2)
    train(replica, task, IndexedLoader(task, task.data("train"), PLAN.seed), replace(PLAN, evaluate_every=2), watch)
    assert watch.evaluated == [4, 6, 8, 10, 12]


@pytest.mark.parametrize(
    ("change", "progress", "status"),
    [
        ({"steps": 4}, Progress(step=4, position=24, evaluated=2, status="running"), "done"),
        ({"steps": 3}, Progress(step=4, position=24, evaluated=2, status="interrupted"), "done"),
        ({"patience": 1}, Progress(step=4, position=24, evaluated=4, stale=1, status="interrupted"), "stopped early"),
    ],
)
def test_a_plan_that_is_already_fulfilled_ends_with_a_checkpoint_that_says_so(
    change: dict[str, int], progress: Progress, status: str
) -> None:
    settings = recipe()
    task = tiny(settings.task)
    watch = Watching(task)
    replica = build_replica(settings, task, watch.averager)
    replica.progress = progress
    train(replica, task, IndexedLoader(task, task.data("train"), PLAN.seed), replace(PLAN, **change), watch)
    assert watch.rows == []
    assert watch.saved == [(4, status)]
    assert watch.evaluated == ([4] if status == "done" else [])


def test_a_metric_that_is_not_a_number_is_never_the_best() -> None:
    settings = recipe()
    values = iter([float("nan"), 2.0, float("inf"), 1.0])
    task = replace(tiny(settings.task), measure=lambda *_: {"loss": (next(values), 1.0)})
    watch = Watching(task)
    watch._measure = partial(evaluate, task, examples=task.data("valid"), batch=13)
    replica = build_replica(settings, task, watch.averager)
    train(replica, task, IndexedLoader(task, task.data("train"), PLAN.seed), replace(PLAN, evaluate_every=3), watch)
    assert (replica.progress.best, replica.progress.best_step) == (1.0, 12)
    assert [step for step, _ in watch.saved] == [6, 12]


def test_a_model_may_keep_what_it_computed_in_an_evaluation() -> None:
    class Keeping(torch.nn.Linear):
        table: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.table is None and not self.training:
                self.table = x.new_ones(4, 4)
            return super().forward(x if self.table is None else x @ self.table)[:, 0]

    settings = recipe()
    task = replace(tiny(settings.task), model=lambda _: Keeping(4, 1))
    watch = Watching(task)
    train(
        build_replica(settings, task, watch.averager),
        task,
        IndexedLoader(task, task.data("train"), PLAN.seed),
        replace(PLAN, evaluate_every=3),
        watch,
    )
    assert watch.evaluated == [3, 6, 9, 12]


def test_micro_batches_count_when_they_are_one_object() -> None:
    settings = recipe(batch=3, accumulate=2)
    base = tiny(settings.task)
    same = base.collate([base.data("train")[index] for index in range(3)])
    task = replace(base, collate=lambda _: same)

    def first_norm(transport: Any) -> float:
        watch = Watching(base)
        watch.averager = ExactAverager(transport)
        replica = build_replica(settings, task, watch.averager)
        train(
            replica,
            task,
            IndexedLoader(task, base.data("train"), PLAN.seed),
            replace(PLAN, steps=1, batch=3, accumulate=2, clip=9.0),
            watch,
        )
        return watch.rows[0]["gradient_norm"]

    alone = first_norm(LocalTransport())
    assert ThreadGroup(2).run(first_norm) == pytest.approx([alone, alone])


def test_training_stops_early_when_nothing_improves() -> None:
    replica, watch = run(replace(PLAN, evaluate_every=2, patience=2, lr_factor=lambda step: 0.0))
    assert watch.evaluated == [2, 4, 6]
    assert replica.progress.status == "stopped early"
    assert replica.progress.best_step == 2
    assert watch.saved[-1][:2] == (6, "stopped early")


def test_a_request_to_stop_saves_and_ends() -> None:
    replica, watch = run(watch_with={"stop_at": 5})
    assert replica.progress.status == "interrupted"
    assert watch.saved == [(5, "interrupted")]
    assert watch.evaluated == []


def test_a_finished_run_trains_no_further() -> None:
    settings = recipe()
    task = tiny(settings.task)
    watch = Watching(task)
    replica = build_replica(settings, task, watch.averager)
    replica.progress = Progress(step=12, position=72, evaluated=12, status="done")
    train(replica, task, IndexedLoader(task, task.data("train"), PLAN.seed), PLAN, watch)
    assert replica.progress.status == "done"
    assert watch.rows == watch.saved == []


def test_a_loss_that_is_not_a_number_stops_before_it_spoils_the_weights() -> None:
    settings = recipe()
    task = tiny(settings.task)
    examples = task.data("train")
    fourth = Sampler(len(examples), 3).indices(18, 6).tolist()
    examples[fourth[2]]["y"] = torch.tensor(float("nan"), dtype=torch.float64)
    watch = Watching(task)
    replica = build_replica(settings, task, watch.averager)
    first = next(step for step in range(9) if fourth[2] in Sampler(50, 3).indices(step * 6, 6))
    with pytest.raises(TrainingError) as caught:
        train(replica, task, IndexedLoader(task, examples, PLAN.seed), PLAN, watch)
    assert f"the loss is nan in step {first + 1} on worker 0, over the training examples " in str(caught.value)
    assert str(Sampler(50, 3).indices(first * 6, 6).tolist()) in str(caught.value)
    assert all(torch.isfinite(value).all() for value in weights(replica))
    assert replica.progress.step == first


def test_a_gradient_that_is_not_a_number_stops_too() -> None:
    task = replace(tiny(recipe().task), losses=lambda module, batch: (module(batch["x"]) * 0).sqrt() + 1)
    watch = Watching(task)
    replica = build_replica(recipe(), task, watch.averager)
    with pytest.raises(TrainingError, match=r"^the norm of the gradient is nan in step 1, although the loss is finite"):
        train(replica, task, IndexedLoader(task, task.data("train"), PLAN.seed), PLAN, watch)


def test_losses_must_match_the_weights() -> None:
    task = replace(tiny(recipe().task), losses=lambda module, batch: module(batch["x"]).mean())
    with pytest.raises(TrainingError, match=r"Task.losses returned shape \(\) where \(6,\) was expected"):
        train(
            build_replica(recipe(), task, ExactAverager(LocalTransport())),
            task,
            IndexedLoader(task, task.data("train"), PLAN.seed),
            PLAN,
            Watching(task),
        )


def test_bfloat16_computes_in_bfloat16_and_keeps_float32() -> None:
    seen = []
    base = tiny(recipe().task)

    def losses(module: Any, batch: Any) -> torch.Tensor:
        errors = module(batch["x"])
        seen.append(errors.dtype)
        return (errors - batch["y"]).square()

    task = replace(base, losses=losses)
    replica = build_replica(recipe(precision="bfloat16"), task, ExactAverager(LocalTransport()))
    train(
        replica,
        task,
        IndexedLoader(task, task.data("train"), PLAN.seed),
        replace(PLAN, autocast=torch.bfloat16),
        Watching(base),
    )
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in replica.module.parameters()} == {torch.float32}


def test_status_and_due() -> None:
    assert run_status(Progress(step=12), PLAN, stop=True) == "done"
    assert run_status(Progress(step=3), PLAN, stop=True) == "interrupted"
    assert run_status(Progress(step=3, stale=9), PLAN, stop=False) == "running"
    assert [step for step in range(1, 10) if every_n(step, 3)] == [3, 6, 9]
    assert not every_n(4, 0)
