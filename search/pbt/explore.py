"""Explore rules: how a member changes hyperparameters.

A rule is a section of the recipe and a function: `rule.propose(member, population, rng)`. A user's own is
"module:function" of the same arguments, which returns path -> value for all that should change.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field

from raytrain.errors import TrainingError
from raytrain.recipe import Options
from raytrain.registry import error_location, resolve, suggest
from search.chooser import Configuration, perturbing, replaying, sampling
from search.domains import FACTOR
from search.pbt.population import Population
from search.scheduling.segments import SegmentReport


class Explore(Options, ABC):
    """An explore rule."""

    @property
    def multiplies(self) -> bool:
        """Whether the rule changes numbers by factors, from which there is no way out of 0."""
        return False

    @property
    def memory(self) -> int:
        """How many earlier reports the rule learns from."""
        return 0

    @abstractmethod
    def propose(self, member: SegmentReport, population: Population, rng: np.random.Generator) -> Configuration:
        """Return hyperparameters to go on with.

        Args:
            member: the report whose hyperparameters are explored: the donor's, where they are inherited.
            population: what else is known.
            rng: of this decision.
        """


class Perturb(Explore):
    """Each hyperparameter is perturbed, or with some probability drawn anew.

    Source: Jaderberg et al. 2017, section 4.1.2 (perturb, resample).

    Attributes:
        factor: what numbers are multiplied or divided by.
        resample: probability of drawing a hyperparameter anew.
    """

    factor: float = Field(FACTOR, gt=1, lt=2)
    resample: float = Field(0.0, ge=0, le=1)

    @property
    def multiplies(self) -> bool:
        """Whether nothing but factors changes numbers."""
        return self.resample == 0

    def propose(self, member: SegmentReport, population: Population, rng: np.random.Generator) -> Configuration:
        """Return the perturbed hyperparameters."""
        return population.space.run(perturbing(member.values, rng, self.factor, self.resample))


class Resample(Explore):
    """Each hyperparameter is drawn anew, with some probability.

    Source: Jaderberg et al. 2017, section 4.1.2 (resample).

    Attributes:
        probability: of drawing it anew.
    """

    probability: float = Field(0.25, gt=0, le=1)

    def propose(self, member: SegmentReport, population: Population, rng: np.random.Generator) -> Configuration:
        """Return the hyperparameters, some of them drawn anew."""
        kept = {path: value for path, value in member.values.items() if rng.random() >= self.probability}
        return population.space.run(replaying(kept, sampling(rng)))


class NoExplore(Explore):
    """Inherited hyperparameters stay as they are."""

    def propose(self, member: SegmentReport, population: Population, rng: np.random.Generator) -> Configuration:  # noqa: ARG002
        """Return the hyperparameters."""
        return member.segment.configuration


class CustomExplore(Explore):
    """A user's own function."""

    def propose(self, member: SegmentReport, population: Population, rng: np.random.Generator) -> Configuration:
        """Return the hyperparameters with what the function changes.

        Raises:
            TrainingError: the function raises an error, or returns what is no value of the space.
        """
        function = resolve({}, self.name, "search.explore")
        try:
            changes = function(member, population, rng)
        except Exception as error:
            raise TrainingError(
                f"search.explore: {self.name} raised {type(error).__name__}: {error}{error_location(error)}"
            ) from error
        found = population.space.run(replaying({**member.values, **self._checked(changes, member)}, sampling(rng)))
        for decision in found.genome.decisions:
            if not decision.domain.contains(decision.value):
                raise TrainingError(
                    f"search.explore: {self.name} returned {decision.value!r} for {decision.path}, which is "
                    f"{decision.domain.summary()}"
                )
        return found

    def _checked(self, changes: Any, member: SegmentReport) -> Mapping[str, Any]:
        if not isinstance(changes, Mapping):
            raise TrainingError(
                f"search.explore: {self.name} returned {changes!r}; expected a mapping of paths to values"
            )
        for path in changes.keys() - member.values.keys():
            raise TrainingError(
                f"search.explore: {self.name} returned a value for {path!r}, which is no hyperparameter of the member; "
                f"{suggest(path, member.values)}"
            )
        return changes
