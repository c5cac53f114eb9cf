"""The training loop: one page, without Ray."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from raytrain.errors import TrainingError
from raytrain.optim.gradient_noise import add_gradient_noise
from raytrain.sync.synchroniser import StepTotals
from raytrain.tasks.losses import loss_weights
from raytrain.tasks.task import Batch, Task
from raytrain.tensors import seed_everything_at, to_device, weighted_sum
from raytrain.training.loader import BatchLoader
from raytrain.training.replica import Progress, Replica, Status
from raytrain.zeroth.objective import make_closure

if TYPE_CHECKING:
    from raytrain.zeroth.step import ZeroOrderStep


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """Configuration of the training loop; counts are in optimizer steps.

    Attributes:
        steps: total.
        seed: of all random draws in a step.
        batch: examples in a micro-batch.
        accumulate: micro-batches of each replica in a step.
        clip: maximal gradient norm; 0: no clipping.
        autocast: type of the forward pass, or None for that of the parameters.
        lr_factor: step, counted from 0 -> learning-rate factor.
        evaluate_every: 0: at the end only.
        checkpoint_every: 0: at the end only.
        patience: evaluations without a better metric after which training stops early; 0: never.
        gradient_noise, gradient_noise_decay: variance of Gaussian gradient noise, and its decay.
    """

    steps: int
    seed: int
    batch: int
    accumulate: int
    clip: float
    autocast: torch.dtype | None
    lr_factor: Callable[[int], float]
    evaluate_every: int
    checkpoint_every: int
    patience: int
    gradient_noise: float = 0.0
    gradient_noise_decay: float = 0.55

    @property
    def local_batch(self) -> int:
        """Return the examples of each replica in a step, batch * accumulate."""
        return self.batch * self.accumulate


class LoopCallbacks(Protocol):
    """Callbacks of the loop. Every replica calls the same methods in the same order."""

    def stop_requested(self) -> bool:
        """Return whether this replica should stop after the current step."""
        ...

    def on_step(self, replica: Replica, values: dict[str, float]) -> None:
        """Handle a completed step and its values for the log."""
        ...

    def evaluate(self, replica: Replica) -> dict[str, float]:
        """Return metrics over the whole held-out split, equal on every replica."""
        ...

    def save(self, replica: Replica) -> None:
        """Write a checkpoint."""
        ...

    def save_metrics(self, replica: Replica, metrics: dict[str, float]) -> None:
        """Add metrics to the checkpoint of this step."""
        ...


def train(replica: Replica, task: Task, loader: BatchLoader, config: LoopConfig, callbacks: LoopCallbacks) -> None:
    """Train to the last step, an early stop, or a request to stop; the last state is always checkpointed.

    Raises:
        TrainingError: the loss or the gradient is not a finite number.
    """
    progress, optimizer, sync = replica.progress, replica.optimizer, replica.sync
    began, before = time.perf_counter(), replace(progress)
    was, progress.status = progress.status, run_status(progress, config, stop=False)
    sync.attach(replica.module)
    if progress.step and (progress.status != was or evaluation_due(progress, config)):
        # The configuration has changed, or the process died in an evaluation.
        checkpoint_and_evaluate(replica, task, config, callbacks)
    while progress.status == "running":
        if replica.half_freezing:
            replica.half_freezing.select(progress.step, optimizer)

        stop = callbacks.stop_requested()
        if replica.zero_order:
            totals, figures = zero_order_step(replica, replica.zero_order, task, loader, config, stop)
        else:
            totals, figures = gradient_step(replica, task, loader, config, stop)
        sync.after_step(config.lr_factor(progress.step))

        progress.step += 1
        progress.position += config.local_batch * replica.world_size
        progress.seconds = before.seconds + time.perf_counter() - began
        progress.bytes_sent = before.bytes_sent + sync.bytes_sent
        progress.communication_seconds = before.communication_seconds + sync.exchange_seconds
        progress.waited_seconds = before.waited_seconds + sync.waited_seconds
        progress.status = run_status(progress, config, totals.stop)
        if replica.ema:
            replica.ema.update(progress.step)
        loss, lr = totals.loss / (totals.weight or 1.0), optimizer.param_groups[0]["lr"]
        callbacks.on_step(replica, {"loss": loss, "lr": lr, **figures, **sync.metrics()})
        checkpoint_and_evaluate(replica, task, config, callbacks)


def gradient_step(
    replica: Replica, task: Task, loader: BatchLoader, config: LoopConfig, stop: bool
) -> tuple[StepTotals, dict[str, float]]:
    """Run forward and backward passes over this replica's batch, and step with the averaged gradient."""
    own_loss = backward(replica, task, loader, config)
    totals = replica.sync.before_step(own_loss, stop)
    norm = clip_gradients(replica, config.clip)
    if config.gradient_noise:
        add_gradient_noise(
            replica.module, config.seed, replica.progress.step, config.gradient_noise, config.gradient_noise_decay
        )
    _set_lr(replica, config)
    replica.optimizer.step()
    replica.optimizer.zero_grad()
    return totals, {"gradient_norm": norm} if config.clip else {}


def zero_order_step(
    replica: Replica, zeroth: "ZeroOrderStep", task: Task, loader: BatchLoader, config: LoopConfig, stop: bool
) -> tuple[StepTotals, dict[str, float]]:
    """Estimate projected gradients on this replica's batch, and step with those of all replicas."""
    progress = replica.progress
    batches = _load_batches(replica, task, loader, progress.position + replica.rank * config.local_batch, config)
    weight = replica.sync.set_weight(sum(weights.sum().item() for _, weights in batches))
    loss = make_closure(
        task, replica.module, batches, (config.seed, replica.rank, progress.step), config.autocast, zeroth.objective
    )
    _set_lr(replica, config)
    place = (progress.step, replica.rank)
    figures = zeroth.step(loss, replica.module, config.seed, place, config.lr_factor(progress.step))
    return replica.sync.before_step(weight * figures.pop("loss"), stop), figures


def _set_lr(replica: Replica, config: LoopConfig) -> None:
    rate = config.lr_factor(replica.progress.step)
    for group in replica.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rate


def checkpoint_and_evaluate(replica: Replica, task: Task, config: LoopConfig, callbacks: LoopCallbacks) -> None:
    """Checkpoint and evaluate if due; checkpoint first, so that a failing evaluation loses no training."""
    progress = replica.progress
    saved = progress.status != "running" or every_n(progress.step, config.checkpoint_every)
    if progress.status not in ("running", "interrupted"):  # an interrupted run resumes in the middle of a round
        replica.sync.finish()
    if saved:
        callbacks.save(replica)
    if not evaluation_due(progress, config):
        return
    metrics = callbacks.evaluate(replica)
    update_best(progress, task, metrics)
    if progress.status == "running":
        progress.status = run_status(progress, config, stop=False)
        if progress.status != "running":
            replica.sync.finish()
            saved = False
    if not saved and (progress.status != "running" or progress.best_step == progress.step):
        callbacks.save(replica)
        saved = True
    if saved:
        callbacks.save_metrics(replica, metrics)


def backward(replica: Replica, task: Task, loader: BatchLoader, config: LoopConfig) -> float:
    """Accumulate gradients over this replica's micro-batches; return the sum of weight * loss."""
    progress = replica.progress
    position = progress.position + replica.rank * config.local_batch
    batches = _load_batches(replica, task, loader, position, config)
    seed_everything_at(config.seed, replica.rank, progress.step)  # after the loader, which seeds for itself
    divisor = replica.sync.set_weight(sum(weights.sum().item() for _, weights in batches))
    total = 0.0
    for place, (batch, weights) in enumerate(batches, start=1):
        with torch.autocast(replica.device.type, dtype=config.autocast, enabled=config.autocast is not None):
            losses = task.losses(replica.module, batch)
        loss = weighted_sum(losses, weights)
        total += loss.item()
        if not math.isfinite(total):
            more = "" if config.clip else " or clip = 1"
            raise TrainingError(
                f"the loss is {total} in step {progress.step + 1} on worker {replica.rank}, over "
                f"{loader.describe(position, config.local_batch)}; a lower optimizer.lr, a longer schedule.warmup"
                f"{more} may help"
            )
        if place == len(batches):
            replica.sync.before_backward()
        (loss / (divisor or 1.0)).backward()
    return total


def _load_batches(
    replica: Replica, task: Task, loader: BatchLoader, position: int, config: LoopConfig
) -> list[tuple[Batch, Tensor]]:
    """Return this replica's micro-batches of the step, each with its loss weights, on its device."""
    began = time.perf_counter()
    batches = []
    for raw, examples in loader.load(position, config.local_batch, config.accumulate):
        batch = to_device(raw, replica.device, replica.dtype)
        batches.append((batch, loss_weights(task, batch, examples, replica.device)))
    replica.progress.data_wait_seconds += time.perf_counter() - began
    return batches


def clip_gradients(replica: Replica, limit: float) -> float:
    """Clip the gradient to the norm `limit`, and return its norm before; with limit 0 do nothing."""
    if not limit:
        return 0.0
    parameters = list(replica.local_parameters.parameters())
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


def update_best(progress: Progress, task: Task, metrics: dict[str, float]) -> None:
    """Update best value, best step and the early-stopping counter."""
    progress.evaluated = progress.step
    if task.improves(metrics[task.metric], progress.best):
        progress.best, progress.best_step, progress.stale = metrics[task.metric], progress.step, 0
    else:
        progress.stale += 1


def run_status(progress: Progress, config: LoopConfig, stop: bool) -> Status:
    """Return "running", or the reason to end training."""
    if progress.step >= config.steps:
        return "done"
    if config.patience and progress.stale >= config.patience:
        return "stopped early"
    return "interrupted" if stop else "running"


def evaluation_due(progress: Progress, config: LoopConfig) -> bool:
    """Return whether an evaluation is due at this step and has not been done."""
    wanted = progress.status == "done" or every_n(progress.step, config.evaluate_every)
    return wanted and progress.evaluated < progress.step


def every_n(step: int, every: int) -> bool:
    """Return whether step is a multiple of every; 0: never."""
    return every > 0 and step % every == 0
