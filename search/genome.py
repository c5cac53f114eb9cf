"""Genomes: what a search space decided, as data."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from search.domains import Domain


@dataclass(frozen=True, slots=True)
class Decision:
    """One value that a space asked for.

    Attributes:
        path: its name, unique in the genome; in a table of dimensions, the dotted field of the recipe.
        domain: what it could have been.
        value: what it is.
    """

    path: str
    domain: Domain
    value: Any


@dataclass(frozen=True, slots=True)
class Genome:
    """All decisions of one run of a search space, in order: replayed, they give the same configuration."""

    decisions: tuple[Decision, ...]

    def values(self) -> dict[str, Any]:
        """Return path -> value."""
        return {decision.path: decision.value for decision in self.decisions}

    def version(self) -> str:
        """Return a hash of the paths and domains: genomes of one version mean the same by the same values."""
        asked = [[decision.path, decision.domain.model_dump(mode="json")] for decision in self.decisions]
        return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Configuration:
    """One point of a search space.

    Attributes:
        genome: the decisions.
        changes: dotted field of the base recipe -> value.
    """

    genome: Genome
    changes: Mapping[str, Any]
