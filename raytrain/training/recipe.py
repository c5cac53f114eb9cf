"""The recipe of a training run."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from raytrain.extensions import CALLBACK
from raytrain.models import options as adapter
from raytrain.models.options import ADAPTERS, AdapterOptions
from raytrain.optim.arguments import optimizer_options
from raytrain.optim.options import ALL_OPTIMIZERS, OPTIMIZERS, ZEROTH_ORDER, OptimizerOptions, is_elementwise
from raytrain.optim.schedules import SCHEDULE, SCHEDULES
from raytrain.recipe import Options, Recipe, Section, options_by_name
from raytrain.registry import lazy, resolve
from raytrain.sections import Checkpoint, Evaluation, Logging, Resources
from raytrain.seeds.options import MAX_DIRECTIONS
from raytrain.sync import options as sync
from raytrain.sync.options import (
    NUMBERS,
    SYNCHRONISERS,
    LocalOptions,
    NumberOptions,
    SyncOptions,
    options_of_synchroniser,
)
from raytrain.tasks import options as task
from raytrain.tasks.task import TASKS, TaskOptions, task_options

options_of_adapter = lazy("raytrain.models.adapters:options_from_peft")
options_of_optimizer = lazy("raytrain.optim.optimizers:options_from_constructor")
"""Those of the user's own import torch; all others are declared where that is not needed."""

TaskField = Annotated[
    SerializeAsAny[TaskOptions], options_by_name(TASKS, "task", task_options, known=task.TASK_OPTIONS.get)
]
AdapterField = Annotated[
    SerializeAsAny[AdapterOptions],
    options_by_name(ADAPTERS, "adapter", options_of_adapter, "none", known=adapter.ADAPTER_OPTIONS.get),
]
OptimizerField = Annotated[
    SerializeAsAny[OptimizerOptions],
    options_by_name(ALL_OPTIMIZERS, "optimizer", options_of_optimizer, "adamw", known=optimizer_options),
]
SyncField = Annotated[
    SerializeAsAny[SyncOptions],
    options_by_name(SYNCHRONISERS | NUMBERS, "sync", options_of_synchroniser, "gradients", known=sync.OPTIONS.get),
]


class Schedule(Section):
    """How the learning rate goes.

    Attributes:
        name: its shape after the warm-up.
        warmup: steps in which it rises to optimizer.lr.
        floor: share of optimizer.lr that it ends at.
        decay: share of the steps in which "wsd" falls.
    """

    name: str = "cosine"
    warmup: int = Field(0, ge=0)
    floor: float = Field(0.0, ge=0, le=1)
    decay: float = Field(0.2, gt=0, le=1)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        SCHEDULE.check(SCHEDULES, name)
        return name


class Freeze(Section):
    """What of the model does not move.

    Attributes:
        match: patterns of names of parameters that stay as they are, as in "*embeddings*".
        half: whether a random half of each block's layers stands still too (half fine-tuning).
        every: steps after which another half does; 0: the same for the whole run.
    """

    match: tuple[str, ...] = ()
    half: bool = False
    every: int = Field(0, ge=0)


class Directions(Section):
    """How zeroth-order optimizers probe the loss; no others look at this.

    Attributes:
        count: directions that each worker probes in each step.
        eps: how far a probe goes along one.
        sides: 2 takes central differences, 1 forward ones: half the forward passes for many directions.
        mode: what directions consist of: "rademacher" or "gaussian" numbers.
        sparsity: share of each matrix, its elements of largest magnitude at the start, that stands still.
        blocks: whether a direction moves one of the model's repeated blocks, or all that is in none, and not all.
        training: whether probes see the model in training mode, with dropout. They leave its buffers, as the means of a
            BatchNorm, as they were.
        objective: a value that the task measures, to be raised in place of lowering the loss: "accuracy", or of
            `classify` "expected_accuracy", the mean probability of the right class, or "f1"; with a minus before it, to
            be lowered. What is lowered is what the log calls loss.
        outlier: slopes beyond so many standard deviations, as the median of recent ones has it, are left out; 0: none.
        first_order: patterns of names of the parameters that zo-hybrid moves by their gradients, as those of the last
            blocks; with one worker, and without a trajectory.
        trajectory: whether the run keeps trajectory.bin, from which it can be replayed.
    """

    count: int = Field(1, ge=1)
    eps: float = Field(1e-3, gt=0)
    sides: Literal[1, 2] = 2
    mode: Literal["rademacher", "gaussian"] = "rademacher"
    sparsity: float = Field(0.0, ge=0, lt=1)
    blocks: bool = False
    training: bool = False
    objective: str = ""
    outlier: float = Field(10.0, ge=0)
    first_order: tuple[str, ...] = ()
    trajectory: bool = True


class TrainRecipe(Recipe):
    """How to train a model.

    Attributes:
        workers: replicas, one process each.
        steps: optimizer steps.
        batch: examples of each worker in each step, so a step takes workers * batch.
        accumulate: micro-batches that `batch` is cut into, for less memory, and where texts are filled up to
            the longest one beside them, for less time; the step stays the same, unless the model takes statistics over
            what it sees at once, as BatchNorm does.
        precision: "float32" computes in the type of the parameters, which is float32 unless the task makes others;
            "bfloat16" computes in bfloat16 where that is safe, and leaves the parameters; "float64" makes all float64.
        activation_checkpointing: whether each repeated block of the model forgets what it computed and computes it
            again in the backward pass: less memory for about a third more time, and the same gradients.
        compile: the backend of torch.compile for the model's repeated blocks, or for the whole model if it has none:
            "inductor", which needs a C++ compiler on CPUs, or "aot_eager", which is for finding faults; "": none. The
            first step compiles, and must end within sync.timeout_seconds as any other.
        clip: the largest norm of the gradient; 0: any. Zeroth-order optimizers have none to clip: see
            directions.outlier.
        ema: decay of an average of the weights that is evaluated in their place; 0: none.
        max_failures: how often workers that die or hang are started again.
        callbacks: functions of the replica ("module:attribute") called on every worker after every step.
    """

    kind: Literal["train"] = "train"
    workers: int = Field(1, ge=1)
    steps: int = Field(1000, ge=1)
    batch: int = Field(32, ge=1)
    accumulate: int = Field(1, ge=1)
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    activation_checkpointing: bool = False
    compile: Literal["", "inductor", "aot_eager"] = ""
    clip: float = Field(1.0, ge=0)
    ema: float = Field(0.0, ge=0, lt=1)
    max_failures: int = Field(3, ge=0)
    callbacks: tuple[str, ...] = ()
    task: TaskField
    adapter: AdapterField = Field(default={}, validate_default=True)
    freeze: Freeze = Freeze()
    optimizer: OptimizerField = Field(default={}, validate_default=True)
    directions: Directions = Directions()
    schedule: Schedule = Schedule()
    sync: SyncField = Field(default={}, validate_default=True)
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    resources: Resources = Resources()
    log: Logging = Logging()

    @model_validator(mode="before")
    @classmethod
    def _share_numbers(cls, raw: Any) -> Any:
        """Choose how to exchange what the optimizer has to exchange, where the recipe does not."""
        if not isinstance(raw, Mapping) or not _is_zeroth(raw.get("optimizer")):
            return raw
        sync = raw.get("sync", {})
        named = isinstance(sync, str) or (isinstance(sync, Mapping) and "name" in sync) or isinstance(sync, Options)
        return raw if named else {**raw, "sync": {"name": "numbers", **sync}}

    @model_validator(mode="after")
    def _fit_trajectory(self) -> Self:
        if self.workers * self.directions.count > MAX_DIRECTIONS and self.directions.trajectory:
            raise ValueError(
                f"directions.count: expected at most {MAX_DIRECTIONS} of all workers with a trajectory; "
                f"got {self.workers} times {self.directions.count}; set directions.trajectory = false"
            )
        return self

    @field_validator("directions")
    @classmethod
    def _far_out(cls, directions: Directions) -> Directions:
        if 0 < directions.outlier < 1:
            raise ValueError(
                f"outlier: expected 0 or at least 1, a standard deviation of slopes; got {directions.outlier:g}"
            )
        return directions

    @field_validator("callbacks")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            CALLBACK.check({}, name)
        return names

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.accumulate > self.batch:
            raise ValueError(f"expected accumulate of at most batch = {self.batch}; got {self.accumulate}")
        if self.freeze.half and self.adapter.name != "none":
            raise ValueError("expected freeze.half = false with an adapter, beside which nothing else moves")
        if self.ema and self.optimizer.averages:
            raise ValueError(f"expected ema = 0, because {self.optimizer.name} averages by itself; got {self.ema:g}")
        if isinstance(self.sync, LocalOptions) and (self.ema or self.optimizer.averages):
            raise ValueError(
                f"sync.name: expected gradients with an average of the weights ({'ema' if self.ema else 'optimizer'}), "
                f"which takes workers that are equal after every step; got {self.sync.name}"
            )
        self._fit_zeroth()
        if self.workers > 1 and getattr(self.sync, "shard", False):
            self._fit_shards()
        return self

    def _fit_shards(self) -> None:
        name = self.optimizer.name
        if not is_elementwise(name):
            raise ValueError(
                f"sync.shard: {name} is not known to step a part of a matrix as it steps the whole; expected "
                f"optimizer.name to be one of {', '.join(filter(is_elementwise, OPTIMIZERS))}, or sync.shard = false"
            )
        for option in ("max_grad_norm", "gradient_noise"):  # for which whole gradients are looked at
            if getattr(self.optimizer, option, 0):
                raise ValueError(
                    f"sync.shard: expected optimizer.{option} = 0, because each worker knows only its share"
                )
        if self.freeze.half:
            raise ValueError("sync.shard: expected freeze.half = false, because what is frozen is cut once")
        if getattr(self.task, "generate", 0):
            raise ValueError("sync.shard: expected task.generate = 0, because answers call the model unequally often")

    def _fit_zeroth(self) -> None:
        zeroth = self.optimizer.zeroth
        if zeroth != isinstance(self.sync, NumberOptions):
            wanted = "numbers or one-byte" if zeroth else "one of the others"
            raise ValueError(f"sync.name: expected {wanted} with {self.optimizer.name}; got {self.sync.name}")
        hybrid = self.optimizer.hybrid
        if hybrid != bool(self.directions.first_order):
            wanted = "patterns" if hybrid else "none"
            raise ValueError(f"directions.first_order: expected {wanted} with {self.optimizer.name}")
        if hybrid and (self.workers > 1 or self.directions.trajectory or self.directions.objective):
            raise ValueError(
                "optimizer.name: zo-hybrid takes workers = 1, directions.trajectory = false and no "
                "directions.objective: its gradients are neither exchanged nor written down"
            )
        if self.optimizer.selects and self.workers > 1:
            raise ValueError(
                f"workers: expected 1 with zo-sgd-conservative, which decides by a loss; got {self.workers}"
            )
        if not zeroth:
            return
        if self.directions.objective and self.optimizer.exact:
            raise ValueError(f"directions.objective: expected none with {self.optimizer.name}, which differentiates it")
        without = {
            "freeze.half": self.freeze.half,
            "compile": self.compile,
            "activation_checkpointing": self.activation_checkpointing,
            "optimizer.gradient_noise": self.optimizer.gradient_noise,
        }
        if used := [name for name, value in without.items() if value]:
            raise ValueError(f"{used[0]}: expected none with {self.optimizer.name}, which makes no backward pass")


def _is_zeroth(section: Any) -> bool:
    """Return whether a section of a raw recipe names a zeroth-order optimizer; what is wrong with it is said later."""
    name = section.get("name") if isinstance(section, Mapping) else getattr(section, "name", section)
    if not isinstance(name, str) or name in ALL_OPTIMIZERS or ":" not in name:
        return isinstance(name, str) and name in ZEROTH_ORDER
    return bool(options_of_optimizer(resolve({}, name, "optimizer.name")).zeroth)
