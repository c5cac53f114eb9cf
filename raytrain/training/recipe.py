"""The recipe of a training run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from raytrain.errors import RecipeError
from raytrain.extensions import CALLBACK
from raytrain.models import options as adapter
from raytrain.models.options import ADAPTERS, AdapterOptions
from raytrain.optim.arguments import optimizer_options
from raytrain.optim.options import ALL_OPTIMIZERS, OPTIMIZERS, ZEROTH_ORDER, OptimizerOptions, is_elementwise
from raytrain.optim.schedules import SCHEDULE, SCHEDULES, lr_factor
from raytrain.overrides import as_table
from raytrain.recipe import Options, Recipe, Section, dotted_fields, options_by_name
from raytrain.registry import lazy, resolve
from raytrain.sections import Checkpoint, Evaluation, Logging, Resources
from raytrain.seeds.options import MAX_DIRECTIONS
from raytrain.sync import options as sync
from raytrain.sync.options import (
    ALL_SYNCHRONISERS,
    FsdpOptions,
    LocalUpdateOptions,
    ScalarOptions,
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
    options_by_name(ALL_SYNCHRONISERS, "sync", options_of_synchroniser, "ddp", known=sync.SYNC_OPTIONS.get),
]


class Schedule(Section):
    """Learning-rate schedule.

    Attributes:
        name: shape after the warm-up.
        warmup: steps in which the learning rate rises to optimizer.lr.
        min_lr_ratio: final learning rate over optimizer.lr.
        decay_ratio: share of the steps in which "wsd" decays.
    """

    name: str = Field("cosine", examples=list(SCHEDULES))
    warmup: int = Field(0, ge=0)
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    decay_ratio: float = Field(0.2, gt=0, le=1)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        SCHEDULE.check(SCHEDULES, name)
        return name

    def factor(self, steps: int) -> Callable[[int], float]:
        """Return the function step, counted from 0 -> learning-rate factor.

        Args:
            steps: of the run.
        """
        return partial(
            lr_factor,
            SCHEDULE.load(SCHEDULES, self.name),
            steps=steps,
            warmup=self.warmup,
            min_lr_ratio=self.min_lr_ratio,
            decay_ratio=self.decay_ratio,
        )


class Freeze(Section):
    """Frozen parameters.

    Attributes:
        match: patterns of names of parameters that are frozen, as in "*embeddings*".
        random_half: whether a random half of each block's layers is frozen too (half fine-tuning, HFT).
        every: steps after which another half is drawn; 0: the same half for the whole run.
    """

    match: tuple[str, ...] = ()
    random_half: bool = False
    every: int = Field(0, ge=0)


class Perturbation(Section):
    """Gradient estimates of zeroth-order optimizers, by random perturbations; no others read this section.

    Attributes:
        num_perturbations: directions for each worker in each step.
        eps: step of the finite differences, in multiples of the direction.
        estimator: finite differences: "central", two forward passes for each direction (MeZO), or "forward", one for
            each direction and one more for all.
        distribution: of a direction's elements: "rademacher" or "gaussian".
        sparsity: share of each matrix that is not perturbed: its elements of largest magnitude in the first weights.
        blockwise: whether a direction perturbs one of the model's repeated blocks, or all that is in none.
        train_mode: whether forward passes see the model in training mode, with dropout. Buffers, such as the running
            means of a BatchNorm, stay as they were.
        objective: a value that the task measures, to be maximised in place of minimising the loss: "accuracy", or of
            `classify` "expected_accuracy", the mean probability of the correct class, or "f1"; with a minus before it,
            to be minimised. What is minimised is logged as the loss.
        outlier_threshold: drop projected gradients larger than this many robust standard deviations (median absolute
            value of the last 64, per block); 0 keeps all.
        first_order: patterns of names of the parameters that zo-hybrid trains by their gradients, such as those of the
            last blocks; with one worker, and without a trajectory.
        trajectory: whether the run keeps trajectory.bin, from which it can be replayed.
    """

    num_perturbations: int = Field(1, ge=1)
    eps: float = Field(1e-3, gt=0)
    estimator: Literal["forward", "central"] = "central"
    distribution: Literal["rademacher", "gaussian"] = "rademacher"
    sparsity: float = Field(0.0, ge=0, lt=1)
    blockwise: bool = False
    train_mode: bool = False
    objective: str = ""
    outlier_threshold: float = Field(10.0, ge=0)
    first_order: tuple[str, ...] = ()
    trajectory: bool = True


OF_THE_WHOLE = frozenset(
    {"kind", "name", "workers", "steps", "epochs", "max_failures", "sync", "resources", "log", "checkpoint", "phases"}
)
"""Fields that no phase can change."""


class TrainRecipe(Recipe):
    """How to train a model.

    Attributes:
        workers: data-parallel processes, the world size.
        steps: optimizer steps.
        epochs: passes over the training examples, in place of `steps`, which are counted when the run starts and take
            its place in the run's recipe; 0: as `steps` says.
        batch: examples of each worker in each forward pass, the micro-batch size (per_device_train_batch_size).
        accumulate: micro-batches of each worker in each step, as gradient_accumulation_steps of Hugging Face and
            accumulate_grad_batches of Lightning: it multiplies the effective batch, workers * batch * accumulate. For
            less memory and the same step, divide `batch` by it. Examples are drawn for the whole step and sorted by
            length into micro-batches, so accumulation also saves padding.
        precision: "float32" computes in the type of the parameters, which is float32 unless the task makes others;
            "bfloat16" computes in bfloat16 where that is safe (autocast) and leaves the parameters; "float64" makes
            all float64.
        activation_checkpointing: whether activations in the model's repeated blocks are recomputed in the backward
            pass: less memory for about a third more time, and the same gradients.
        compile: the backend of torch.compile for the model's repeated blocks, or for the whole model if it has none:
            "inductor", which needs a C++ compiler on CPUs, or "aot_eager", which is for debugging; "": none. The first
            step compiles, and must end within sync.timeout_seconds as any other.
        clip: maximal gradient norm (max_grad_norm); on by default; 0: no clipping. Zeroth-order optimizers have no
            gradient to clip: see zo.outlier_threshold.
        ema: decay of an exponential moving average of the weights that is evaluated in their place; 0: none.
        max_failures: restarts after workers died or hung.
        callbacks: functions of the replica ("module:attribute") called on every worker after every step.
        phases: later parts of the training, with changed fields: each a table of `from`, the steps done before it, and
            fields, which keep their values from then on. Weights go on, of a tensor whose shape changes the leading
            block that both have; and so does the state of an optimizer of the same name, unless the table has
            `reset_optimizer = true`.
    """

    kind: Literal["train"] = "train"
    workers: int = Field(1, ge=1)
    steps: int = Field(1000, ge=1)
    epochs: float = Field(0.0, ge=0)
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
    zo: Perturbation = Perturbation()
    schedule: Annotated[Schedule, BeforeValidator(as_table)] = Schedule()
    sync: SyncField = Field(default={}, validate_default=True)
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    resources: Resources = Resources()
    log: Logging = Logging()
    phases: tuple[dict[str, Any], ...] = ()

    @classmethod
    def parse_with(cls, raw: Mapping[str, Any], changes: Mapping[str, Any]) -> Self:
        """Validate nested plain data with dotted fields overridden.

        New `steps` take the place of epochs, and `schedule=NAME` is short for `schedule.name=NAME`.

        Raises:
            RecipeError: as `Recipe.parse_with`.
        """
        named = isinstance(changes.get("schedule"), str)
        changes = {"schedule.name" if named and field == "schedule" else field: changes[field] for field in changes}
        return super().parse_with(raw, {"epochs": 0, **changes} if "steps" in changes else changes)

    @model_validator(mode="before")
    @classmethod
    def _default_synchroniser(cls, raw: Any) -> Any:
        """Default to `scalars` for zeroth-order optimizers."""
        if not isinstance(raw, Mapping) or not _is_zeroth(raw.get("optimizer")):
            return raw
        sync = raw.get("sync", {})
        named = isinstance(sync, str) or (isinstance(sync, Mapping) and "name" in sync) or isinstance(sync, Options)
        return raw if named else {**raw, "sync": {"name": "scalars", **sync}}

    @model_validator(mode="after")
    def _fit_trajectory(self) -> Self:
        if self.workers * self.zo.num_perturbations > MAX_DIRECTIONS and self.zo.trajectory:
            raise ValueError(
                f"zo.num_perturbations: expected at most {MAX_DIRECTIONS} of all workers with a trajectory; "
                f"got {self.workers} times {self.zo.num_perturbations}; set zo.trajectory = false"
            )
        return self

    @field_validator("zo")
    @classmethod
    def _far_out(cls, zo: Perturbation) -> Perturbation:
        if 0 < zo.outlier_threshold < 1:
            raise ValueError(
                "outlier_threshold: expected 0 or at least 1, a standard deviation of projected gradients; got "
                f"{zo.outlier_threshold:g}"
            )
        return zo

    @field_validator("callbacks")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            CALLBACK.check({}, name)
        return names

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.freeze.random_half and self.adapter.name != "none":
            raise ValueError("expected freeze.random_half = false with an adapter, under which the model is frozen")
        if self.ema and self.optimizer.averages:
            raise ValueError(f"expected ema = 0, because {self.optimizer.name} averages by itself; got {self.ema:g}")
        if isinstance(self.sync, LocalUpdateOptions) and (self.ema or self.optimizer.averages):
            raise ValueError(
                f"sync.name: expected ddp or fsdp with an average of the weights "
                f"({'ema' if self.ema else 'optimizer'}), "
                f"which takes workers that are equal after every step; got {self.sync.name}"
            )
        self._fit_zeroth()
        if self.workers > 1 and isinstance(self.sync, FsdpOptions):
            self._fit_shards()
        return self

    @model_validator(mode="after")
    def _fit_phases(self) -> Self:
        if self.phases and self.epochs:
            raise ValueError(f"epochs: expected 0 with phases, which begin at steps; got {self.epochs:g}; set steps")
        recipes = [stage.recipe for stage in self.stages()]
        if len(recipes) > 1 and any(recipe.optimizer.zeroth and recipe.zo.trajectory for recipe in recipes):
            raise ValueError("phases: expected zo.trajectory = false, because a trajectory has one beginning")
        return self

    def stages(self) -> list["Stage"]:
        """Return the parts of the training; without phases it is one.

        Raises:
            RecipeError: a phase begins before the one before it, or its changes do not fit.
        """
        if not self.phases:
            return [Stage(0, self.steps, self)]
        # Laid over the whole recipe, defaults included: as a run's folder has it, so that it repeats the run.
        recipe, begin, stages = self.parse_with(self.to_dict(), {"phases": []}), 0, []
        reset = False
        for place, phase in enumerate(self.phases):
            changes = dict(dotted_fields(phase))
            end, reset_next = changes.pop("from", None), changes.pop("reset_optimizer", False)
            if not isinstance(end, int) or not begin < end < self.steps:
                raise RecipeError(
                    f"phases.{place}.from: expected a step from {begin + 1} to {self.steps - 1}; got {end!r}"
                )
            if fixed := [name for name in changes if name.partition(".")[0] in OF_THE_WHOLE]:
                raise RecipeError(f"phases.{place}.{fixed[0]}: the same for the whole run; set it outside of phases")
            if not isinstance(reset_next, bool):
                raise RecipeError(f"phases.{place}.reset_optimizer: expected true or false; got {reset_next!r}")
            stages.append(Stage(begin, end, recipe, reset))
            try:
                recipe, begin, reset = recipe.with_overrides(changes), end, reset_next
            except RecipeError as error:
                raise RecipeError(f"phases.{place}.{error}") from None
        return [*stages, Stage(begin, self.steps, recipe, reset)]

    def stages_from(self, step: int) -> list["Stage"]:
        """Return the parts of the training that are not done after some steps; of one that is done, the last."""
        stages = self.stages()
        return [stage for stage in stages if step < stage.end] or stages[-1:]

    def _fit_shards(self) -> None:
        name = self.optimizer.name
        if not is_elementwise(name):
            raise ValueError(
                f"sync.name: fsdp cannot shard {name}, whose step depends on whole matrices; expected "
                f"optimizer.name to be one of {', '.join(filter(is_elementwise, OPTIMIZERS))}, or sync.name = ddp"
            )
        for option in ("max_grad_norm", "gradient_noise"):  # for which whole gradients are looked at
            if getattr(self.optimizer, option, 0):
                raise ValueError(
                    f"optimizer.{option}: expected 0 with sync.name = fsdp, because each worker holds only its shard"
                )
        if self.freeze.random_half:
            raise ValueError(
                "freeze.random_half: expected false with sync.name = fsdp, which shards what is frozen once"
            )
        if getattr(self.task, "generate", 0):
            raise ValueError(
                "task.generate: expected 0 with sync.name = fsdp, because answers call the model unequally often"
            )

    def _fit_zeroth(self) -> None:
        zeroth = self.optimizer.zeroth
        if zeroth != isinstance(self.sync, ScalarOptions):
            wanted = "scalars or one-byte" if zeroth else "one of the others"
            raise ValueError(f"sync.name: expected {wanted} with {self.optimizer.name}; got {self.sync.name}")
        hybrid = self.optimizer.hybrid
        if hybrid != bool(self.zo.first_order):
            wanted = "patterns" if hybrid else "none"
            raise ValueError(f"zo.first_order: expected {wanted} with {self.optimizer.name}")
        if hybrid and (self.workers > 1 or self.zo.trajectory or self.zo.objective):
            raise ValueError(
                "optimizer.name: zo-hybrid takes workers = 1, zo.trajectory = false and no "
                "zo.objective: its gradients are neither exchanged nor written down"
            )
        if self.optimizer.selects and self.workers > 1:
            raise ValueError(
                f"workers: expected 1 with zo-sgd-conservative, which decides by a loss; got {self.workers}"
            )
        if not zeroth:
            return
        if self.zo.objective and self.optimizer.exact:
            raise ValueError(f"zo.objective: expected none with {self.optimizer.name}, which differentiates it")
        without = {
            "freeze.random_half": self.freeze.random_half,
            "compile": self.compile,
            "activation_checkpointing": self.activation_checkpointing,
            "optimizer.gradient_noise": self.optimizer.gradient_noise,
        }
        if used := [name for name, value in without.items() if value]:
            raise ValueError(f"{used[0]}: expected none with {self.optimizer.name}, which makes no backward pass")


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a training with one recipe.

    Attributes:
        begin: steps done before it.
        end: step that it trains to.
        recipe: without phases.
        reset_optimizer: whether the optimizer's state starts new here.
    """

    begin: int
    end: int
    recipe: TrainRecipe
    reset_optimizer: bool = False


def _is_zeroth(section: Any) -> bool:
    """Return whether a section of a raw recipe names a zeroth-order optimizer; what is wrong with it is said later."""
    name = section.get("name") if isinstance(section, Mapping) else getattr(section, "name", section)
    if not isinstance(name, str) or name in ALL_OPTIMIZERS or ":" not in name:
        return isinstance(name, str) and name in ZEROTH_ORDER
    return bool(options_of_optimizer(resolve({}, name, "optimizer.name")).zeroth)
