"""What `[search]` can say for sweeps."""

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from raytrain.errors import RecipeError
from raytrain.recipe import AbsolutePath
from search.limits import LimitOptions
from search.options import SearchOptions, rename_field
from search.searchers.grid import POINTS


class SweepOptions(SearchOptions):
    """Options of every sweep. It ends with the first of its budgets.

    `budget` is another word for `trials`, and takes its place.

    Attributes:
        trials: configurations that are tried.
        total_steps: optimizer steps of all trials together; 0: any.
        limits: what candidates have to keep to.
    """

    trials: int = Field(32, ge=1)
    total_steps: int = Field(0, ge=0)
    limits: LimitOptions = LimitOptions()

    @field_validator("trials")
    @classmethod
    def _one_for_each_guess(cls, trials: int, info: ValidationInfo) -> int:
        if trials < len(guesses := info.data.get("first", ())):
            raise ValueError(f"expected at least {len(guesses)}, one for each guess in first; got {trials}")
        return trials

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, raw: Any) -> Any:
        return rename_field(raw, "budget", "trials")


class GridOptions(SweepOptions):
    """Options of a grid.

    Attributes:
        trials: at most; the grid can have fewer points.
        points: values of each dimension of numbers; of others all values.
    """

    trials: int = Field(10_000, ge=1)
    points: int = Field(POINTS, ge=2)


class PriorOptions(SweepOptions):
    """Options of sweeps that learn from earlier searches too.

    Attributes:
        prior: folders of earlier searches over some of the same paths, of other data or another size for example. They
            give the first candidates and a mean function, and lose their say as far as own results disagree.
    """

    prior: tuple[AbsolutePath, ...] = ()


class NARSOptions(SweepOptions):
    """Options of predictor-guided evolution.

    Attributes:
        predictor: "gp", "ridge" or "trees"; "": whichever ranks the results so far best in leave-one-out.
    """

    predictor: Literal["", "gp", "ridge", "trees"] = ""


class PrunerOptions(SweepOptions):
    """Options of sweeps that stop bad trials early.

    Attributes:
        searcher: proposes the configurations: "random", "sobol", "evolution", "mcts", "gp", "nars" or "tpe".
        interval: steps after which a trial is judged for the first time.
    """

    searcher: str = "random"
    interval: int = Field(100, ge=1)

    def check_interval(self, steps: int, field: str = "base.steps") -> None:
        """Check that a trial is judged before its end.

        Raises:
            RecipeError: it is not.
        """
        if self.interval >= steps:
            raise RecipeError(f"search.interval: expected less than {field} = {steps}; got {self.interval}")


class ASHAOptions(PrunerOptions):
    """Options of asynchronous successive halving.

    Attributes:
        eta: of the trials that reach a rung, one in eta goes on, to eta times the steps.
    """

    eta: int = Field(3, ge=2)


class MedianOptions(PrunerOptions):
    """Options of the median rule.

    Attributes:
        least: trials that have to have come as far before one is stopped.
    """

    least: int = Field(5, ge=1)


class ExtrapolationOptions(PrunerOptions):
    """Options of curve extrapolation.

    Attributes:
        law: "power": a power law of the steps; "annealing": of the summed learning rates, less what their decay gains,
            as for language models. Both are one where the learning rate is constant.
        least: scores that a trial has to have before it is stopped.
        grace: share of a training in which no trial is stopped: how a curve begins says little of where it ends.
        chance: that a trial has to have to become the best one.
    """

    law: Literal["power", "annealing"] = "power"
    least: int = Field(4, ge=2)
    grace: float = Field(1 / 3, ge=0, lt=1)
    chance: float = Field(0.05, gt=0, lt=1)
