"""What `[search]` can say with `name = "pbt"`."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from raytrain.errors import RecipeError
from raytrain.recipe import Options, options_by_name
from search.options import SearchOptions
from search.pbt.exploit import Exploit
from search.pbt.explore import CustomExplore, Explore
from search.tables import EXPLOITS, EXPLORES


def _options_of_explore(found: Any) -> type[Options]:
    return found if isinstance(found, type) and issubclass(found, Explore) else CustomExplore


def _options_of_exploit(found: Any) -> type[Options]:
    if isinstance(found, type) and issubclass(found, Exploit):
        return found
    raise ValueError(f"expected a subclass of search.pbt.exploit.Exploit; got {found!r}")


ExploitField = Annotated[
    SerializeAsAny[Exploit], options_by_name(EXPLOITS, "search.exploit", _options_of_exploit, "truncation")
]
ExploreField = Annotated[
    SerializeAsAny[Explore], options_by_name(EXPLORES, "search.explore", _options_of_explore, "perturb")
]


class PBTOptions(SearchOptions):
    """Options of population based training.

    Attributes:
        population: members.
        interval: steps between two decisions.
        exploit: whom a member inherits from.
        explore: how inherited hyperparameters change.
        inherit: what a member takes from its donor: "weights", "hyperparameters" or "both".
        optimizer_state: of a member that takes a donor's weights: "copy", the donor's, or "reset", a new one.
        other_shapes: of parameters whose shape a dimension changes: "refuse", such a search does not start; "overlap",
            the leading block that both shapes have is inherited, and the rest starts new; all others are inherited by
            name.
        burn_in: steps before the first exploitation.
        synchronous: whether a decision waits for all members; otherwise each is made when its member reports.
        step_matched: without synchronous: compare a member with reports of the same step alone.
        quorum: share of the members that a decision needs. Synchronous: once it has reported, the others are given up
            after timeout_seconds; asynchronous: before it has, nobody exploits.
    """

    population: int = Field(16, ge=2)
    interval: int = Field(100, ge=1)
    exploit: ExploitField = Field(default={}, validate_default=True)
    explore: ExploreField = Field(default={}, validate_default=True)
    inherit: Literal["weights", "hyperparameters", "both"] = "both"
    optimizer_state: Literal["copy", "reset"] = "copy"
    other_shapes: Literal["refuse", "overlap"] = "refuse"
    burn_in: int = Field(0, ge=0)
    synchronous: bool = True
    step_matched: bool = False
    quorum: float = Field(1.0, gt=0, le=1)

    @property
    def multiplies(self) -> bool:
        """Whether the explore rule multiplies."""
        return bool(self.explore.multiplies)

    @property
    def inherits_whole_weights(self) -> bool:
        """Whether members inherit all weights of their donors."""
        return self.inherit != "hyperparameters" and self.other_shapes != "overlap"

    def check_interval(self, steps: int, field: str = "base.steps") -> None:
        """Check that the interval divides the steps.

        Raises:
            RecipeError: it does not.
        """
        if steps % self.interval:
            raise RecipeError(f"search.interval: expected a divisor of {field} = {steps}; got {self.interval}")

    @field_validator("population")
    @classmethod
    def _room_for_guesses(cls, population: int, info: ValidationInfo) -> int:
        if population < len(guesses := info.data.get("first", ())):
            raise ValueError(f"expected at least {len(guesses)}, one for each guess in first; got {population}")
        return population

    @field_validator("exploit")
    @classmethod
    def _comparable(cls, exploit: Exploit, info: ValidationInfo) -> Exploit:
        if "population" in info.data:
            exploit.check(info.data["population"])
        return exploit

    @field_validator("step_matched")
    @classmethod
    def _asynchronous(cls, step_matched: bool, info: ValidationInfo) -> bool:
        if step_matched and info.data.get("synchronous"):
            raise ValueError("expected false with synchronous = true, where all members are at one step")
        return step_matched
