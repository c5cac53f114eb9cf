"""The training loop: one page, without Ray."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from raytrain.errors import TrainingError
from raytrain.optim.gradient_noise import add_gradient_noise
from raytrain.sync.synchroniser import Totals
from raytrain.tasks.losses import loss_weights
from raytrain.tasks.task import Batch, Task
from raytrain.tensors import seed_everything_at, to_device, weighted_sum
from raytrain.training.loader import Feed
from raytrain.training.replica import Progress, Replica, Status
from raytrain.zeroth.step import ZeroOrderStep, make_closure


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train; all counts are in optimizer steps.

    Attributes:
        steps: where training ends.
        seed: of everything that a step draws.
        batch: examples per replica and step.
        accumulate: micro-batches that they are cut into; this changes the memory, not the step.
        clip: the largest norm of the gradient; 0: any.
        autocast: the type that the forward pass computes in, or None for that of the parameters.
        rate: step, counted from 0 -> factor of the learning rate.
        evaluate_every: 0: at the end only.
        checkpoint_every: 0: at the end only.
        patience: evaluations without a better metric after which training stops early; 0: never.
        noise, noise_decay: variance of what is added to the gradient, and how it falls; see `add_gradient_noise`.
    """

    steps: int
    seed: int
    batch: int
    accumulate: int
    clip: float
    autocast: torch.dtype | None
    rate: Callable[[int], float]
    evaluate_every: int
    checkpoint_every: int
    patience: int
    noise: float = 0.0
    noise_decay: float = 0.55


class Watch(Protocol):
    """What surrounds the loop. Every replica calls the same methods in the same order."""

    def stop_requested(self) -> bool:
        """Return whether this replica was asked to stop after the current step."""
        ...

    def stepped(self, replica: Replica, values: dict[str, float]) -> None:
        """Learn that a step is done, and what there is to log of it."""
        ...

    def evaluate(self, replica: Replica) -> dict[str, float]:
        """Return the measured values over the whole held-out split, equal on every replica."""
        ...

    def save(self, replica: Replica) -> None:
        """Write a checkpoint."""
        ...

    def note(self, replica: Replica, metrics: dict[str, float]) -> None:
        """Add to the checkpoint of this step what was measured since it was written."""
        ...


def train(replica: Replica, task: Task, feed: Feed, plan: Plan, watch: Watch) -> None:
    """Train to the end of the plan, to an early stop, or until asked to stop; a checkpoint is always there at the end.

    Raises:
        TrainingError: the loss or the gradient is not a finite number.
    """
    progress, optimizer, sync = replica.progress, replica.optimizer, replica.sync
    began, before = time.perf_counter(), replace(progress)
    was, progress.status = progress.status, status(progress, plan, stop=False)
    sync.start(replica.module)
    if progress.step and (progress.status != was or unmeasured(progress, plan)):
        settle(replica, task, plan, watch)  # the plan is another than it was, or the process died in an evaluation
    while progress.status == "running":
        if replica.half:
            replica.half.select(progress.step, optimizer)

        stop = watch.stop_requested()
        if replica.zeroth:
            totals, figures = zeroth_step(replica, replica.zeroth, task, feed, plan, stop)
        else:
            totals, figures = gradient_step(replica, task, feed, plan, stop)
        sync.after_step(plan.rate(progress.step))

        progress.step += 1
        progress.position += plan.batch * replica.members
        progress.seconds = before.seconds + time.perf_counter() - began
        progress.bytes_sent = before.bytes_sent + sync.bytes_sent
        progress.exchange_seconds = before.exchange_seconds + sync.exchange_seconds
        progress.waited_seconds = before.waited_seconds + sync.waited_seconds
        progress.status = status(progress, plan, totals.stop)
        if replica.ema:
            replica.ema.update(progress.step)
        loss, lr = totals.loss / (totals.weight or 1.0), optimizer.param_groups[0]["lr"]
        watch.stepped(replica, {"loss": loss, "lr": lr, **figures, **sync.figures()})
        settle(replica, task, plan, watch)


def gradient_step(replica: Replica, task: Task, feed: Feed, plan: Plan, stop: bool) -> tuple[Totals, dict[str, float]]:
    """Go forward and backward over this replica's share of the step, and step by the mean gradient of the replicas."""
    own_loss = backward(replica, task, feed, plan)
    totals = replica.sync.before_step(own_loss, stop)
    norm = clip(replica, plan.clip)
    if plan.noise:
        add_gradient_noise(replica.module, plan.seed, replica.progress.step, plan.noise, plan.noise_decay)
    _set_rate(replica, plan)
    replica.optimizer.step()
    replica.optimizer.zero_grad()
    return totals, {"gradient_norm": norm} if plan.clip else {}


def zeroth_step(
    replica: Replica, zeroth: ZeroOrderStep, task: Task, feed: Feed, plan: Plan, stop: bool
) -> tuple[Totals, dict[str, float]]:
    """Probe the loss of this replica's share of the step, and move by what all replicas found."""
    progress = replica.progress
    batches = _take(replica, task, feed, progress.position + replica.rank * plan.batch, plan)
    weight = replica.sync.begin(sum(weights.sum().item() for _, weights in batches))
    loss = make_closure(
        task, replica.module, batches, (plan.seed, replica.rank, progress.step), plan.autocast, zeroth.objective
    )
    _set_rate(replica, plan)
    place = (progress.step, replica.rank)
    figures = zeroth.step(loss, replica.module, plan.seed, place, plan.rate(progress.step))
    return replica.sync.before_step(weight * figures.pop("loss"), stop), figures


def _set_rate(replica: Replica, plan: Plan) -> None:
    rate = plan.rate(replica.progress.step)
    for group in replica.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rate


def settle(replica: Replica, task: Task, plan: Plan, watch: Watch) -> None:
    """Save and evaluate, where this is due after a step; first save, so that an evaluation that fails costs nothing."""
    progress = replica.progress
    saved = progress.status != "running" or due(progress.step, plan.checkpoint_every)
    if progress.status not in ("running", "interrupted"):  # an interrupted run goes on as if it had not been
        replica.sync.finish()
    if saved:
        watch.save(replica)
    if not unmeasured(progress, plan):
        return
    metrics = watch.evaluate(replica)
    judge(progress, task, metrics)
    if progress.status == "running":
        progress.status = status(progress, plan, stop=False)
        if progress.status != "running":
            replica.sync.finish()
            saved = False
    if not saved and (progress.status != "running" or progress.best_step == progress.step):
        watch.save(replica)
        saved = True
    if saved:
        watch.note(replica, metrics)


def backward(replica: Replica, task: Task, feed: Feed, plan: Plan) -> float:
    """Add the gradient of the weighted mean loss over this replica's share of the step; return sum of weight * loss."""
    progress = replica.progress
    position = progress.position + replica.rank * plan.batch
    batches = _take(replica, task, feed, position, plan)
    seed_everything_at(plan.seed, replica.rank, progress.step)  # after the feed, which may have drawn elsewhere
    divisor = replica.sync.begin(sum(weights.sum().item() for _, weights in batches))
    total = 0.0
    for place, (batch, weights) in enumerate(batches, start=1):
        with torch.autocast(replica.device.type, dtype=plan.autocast, enabled=plan.autocast is not None):
            losses = task.losses(replica.module, batch)
        loss = weighted_sum(losses, weights)
        total += loss.item()
        if not math.isfinite(total):
            more = "" if plan.clip else " or clip = 1"
            raise TrainingError(
                f"the loss is {total} in step {progress.step + 1} on worker {replica.rank}, over "
                f"{feed.named(position, plan.batch)}; a lower optimizer.lr, a longer schedule.warmup{more} may help"
            )
        if place == len(batches):
            replica.sync.before_backward()
        (loss / (divisor or 1.0)).backward()
    return total


def _take(replica: Replica, task: Task, feed: Feed, position: int, plan: Plan) -> list[tuple[Batch, Tensor]]:
    """Return the micro-batches of this replica's share of the step, each with its weights, where the model is."""
    began = time.perf_counter()
    batches = []
    for raw, examples in feed.take(position, plan.batch, plan.accumulate):
        batch = to_device(raw, replica.device, replica.dtype)
        batches.append((batch, loss_weights(task, batch, examples, replica.device)))
    replica.progress.stalled_seconds += time.perf_counter() - began
    return batches


def clip(replica: Replica, limit: float) -> float:
    """Scale the gradient down to the norm `limit`, if it is longer, and return the norm it had; 0: measure nothing."""
    if not limit:
        return 0.0
    parameters = list(replica.parts.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = replica.shards.norm() if replica.shards else get_total_norm(gradients)
    clip_grads_with_norm_(parameters, limit, total)
    norm = float(total)
    if not math.isfinite(norm):
        raise TrainingError(
            f"the norm of the gradient is {norm} in step {replica.progress.step + 1}, although the loss is finite; "
            "a lower optimizer.lr or precision = 'float32' may help"
        )
    return norm


def judge(progress: Progress, task: Task, metrics: dict[str, float]) -> None:
    """Note whether these are the best metrics so far."""
    progress.evaluated = progress.step
    if task.improves(metrics[task.metric], progress.best):
        progress.best, progress.best_step, progress.stale = metrics[task.metric], progress.step, 0
    else:
        progress.stale += 1


def status(progress: Progress, plan: Plan, stop: bool) -> Status:
    """Return "running", or why training ends here."""
    if progress.step >= plan.steps:
        return "done"
    if plan.patience and progress.stale >= plan.patience:
        return "stopped early"
    return "interrupted" if stop else "running"


def unmeasured(progress: Progress, plan: Plan) -> bool:
    """Return whether an evaluation is due at this step, and has not been made."""
    wanted = progress.status == "done" or due(progress.step, plan.evaluate_every)
    return wanted and progress.evaluated < progress.step


def due(step: int, every: int) -> bool:
    """Return whether something done every so many steps is due after step `step`; 0: never."""
    return every > 0 and step % every == 0
