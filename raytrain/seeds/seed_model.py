"""A model as what it started from and how far it went along each of some directions: kilobytes, whatever its size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from raytrain.errors import CheckpointError, RecipeError
from raytrain.files import write_atomic
from raytrain.json_files import add_checksum, parse_json, verify_checksum
from raytrain.seeds.directions import Directions
from raytrain.seeds.kernels.kernel import seeds_tensor
from raytrain.seeds.prng import UNITS, Distribution, fold_in, validate_seed
from raytrain.seeds.updates import FLOAT32_MAX, SeedUpdate, materialise
from raytrain.tensors import tensor_digest

SEED_MODEL_NAME = "raytrain seed model "
SEED_MODEL_FORMAT = 3


class _About(BaseModel, frozen=True, extra="forbid"):
    """What the file of a `SeedModel` says beside its tensors, whose hash it has."""

    base: str
    distribution: Distribution
    version: Annotated[int, Field(ge=0)]
    tensors: str


@dataclass(frozen=True, slots=True, eq=False)
class SeedModel:
    """w0 + sum over k of coefficients[k] * direction(seeds[k]).

    Models of the same w0 are a vector space: sums, means, averages over time and crossovers are arithmetic on the
    coefficients.

    Attributes:
        base: what w0 and its directions are known by, from `Directions.digest`.
        seeds: of the directions, all different.
        coefficients: float64, shape (k,).
        distribution: what directions consist of.
        version: how often it was advanced.

    Raises:
        ValueError: its seeds are not one for each coefficient and all different, or a coefficient is not finite in
            float32.
    """

    base: str
    seeds: tuple[int, ...]
    coefficients: Tensor
    distribution: Distribution = "rademacher"
    version: int = 0

    def __post_init__(self) -> None:
        """Refuse what would mean something else, or could be saved and never read again."""
        if self.distribution not in UNITS or self.coefficients.dtype != torch.float64:
            raise ValueError(
                f"expected a mode of {', '.join(UNITS)} and float64 coefficients; "
                f"got {self.distribution!r} and {self.coefficients.dtype}"
            )
        if self.coefficients.shape != (len(self.seeds),) or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(
                f"expected different seeds, one for each coefficient; got {len(set(self.seeds))} different ones of "
                f"{len(self.seeds)}, and coefficients of shape {tuple(self.coefficients.shape)}"
            )
        for seed in self.seeds:
            validate_seed(seed)
        largest = self.coefficients.abs().max().item() if self.seeds else 0.0
        if not largest <= FLOAT32_MAX:  # nor if it is nan
            raise ValueError(f"expected coefficients that are finite in float32; the largest is {largest:g}")

    @classmethod
    def from_pool(cls, base: str, master: int, size: int, distribution: Distribution = "rademacher") -> Self:
        """Return w0 with a pool of directions that one seed names."""
        return cls(
            base,
            tuple(fold_in(master, place) for place in range(size)),
            torch.zeros(size, dtype=torch.float64),
            distribution,
        )

    def updated(self, updates: Sequence[SeedUpdate]) -> Self:
        """Return the model after some moves; a seed that it does not have is added to those that it has."""
        places = {seed: place for place, seed in enumerate(self.seeds)}
        for move in updates:
            places.setdefault(move.seed, len(places))
        coefficients = torch.zeros(len(places), dtype=torch.float64)
        coefficients[: len(self.seeds)] = self.coefficients
        for move in updates:
            coefficients[places[move.seed]] += move.coefficient
        return replace(self, seeds=tuple(places), coefficients=coefficients, version=self.version + 1)

    def weights(
        self, directions: Directions, out: Sequence[Tensor] | None = None, *, digest: str | None = None
    ) -> Sequence[Tensor]:
        """Return its parameters, in the order of the parts of a space that holds w0; see `materialise`.

        Args:
            directions: holds w0.
            out: where to.
            digest: what `space.digest()` returned, for a caller who asks often: it reads all of w0.

        Raises:
            RecipeError: the space holds something else.
        """
        return materialise_all([self], directions, out, stacked=False, digest=digest)

    def save(self, path: Path) -> None:
        """Write it to a file."""
        tensors = {"coefficients": self.coefficients, "seeds": seeds_tensor(self.seeds)}
        about = {
            "base": self.base,
            "mode": self.distribution,
            "version": self.version,
            "tensors": tensor_digest(tensors.items()),
        }
        write_atomic(
            path,
            save(tensors, {"format": f"{SEED_MODEL_NAME}{SEED_MODEL_FORMAT}", "about": add_checksum(about).decode()}),
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return what `save` wrote.

        Raises:
            CheckpointError: the file is something else, or damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                named = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("coefficients", "seeds")}
                about = _about(path, named)
            if tensor_digest(tensors.items()) != about.tensors or tensors["seeds"].dtype != torch.int64:
                raise CheckpointError(f"{path}: its seeds or coefficients changed since it was written")
            seeds = tuple(seed % 2**64 for seed in tensors["seeds"].tolist())
            return cls(about.base, seeds, tensors["coefficients"], about.distribution, about.version)
        except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: expected a file that SeedModel.save wrote: {error}") from error


def _about(path: Path, named: Mapping[str, str]) -> _About:
    """Return what is said of a `SeedModel` in its file's metadata."""
    form = named.get("format", "")
    if form != f"{SEED_MODEL_NAME}{SEED_MODEL_FORMAT}":
        found = (
            f"one of format {form.removeprefix(SEED_MODEL_NAME)!r}"
            if form.startswith(SEED_MODEL_NAME)
            else "another one"
        )
        raise CheckpointError(
            f"{path}: expected a file that SeedModel.save wrote, of format {SEED_MODEL_FORMAT}; this is {found}"
        )
    data = verify_checksum(named["about"].encode(), str(path), CheckpointError)
    return parse_json(data, _About, str(path), CheckpointError)


def linear_combination(models: Sequence[SeedModel], weights: Sequence[float]) -> SeedModel:
    """Return the sum of weight * (model - w0), added to w0.

    With weights that add up to 1 this is a mean or, of two models, an interpolation; (decay, 1 - decay) of an average
    and a model is the next average; (1 + m, -m) of a model and the one before it is a step with momentum m.

    Raises:
        RecipeError: they do not start from the same w0, or draw other numbers, or have not a weight each.
    """
    if not models or len(models) != len(weights):
        raise RecipeError(
            f"models: expected one or more, and a weight for each; got {len(models)} and {len(weights)} weights"
        )
    first = models[0]
    for model in models:
        if (model.base, model.distribution) != (first.base, first.distribution):
            raise RecipeError(
                f"models: expected all with base {first.base[:12]} and {first.distribution} directions; "
                f"got one with base {model.base[:12]} and {model.distribution} directions"
            )
    table = dict.fromkeys((seed for model in models for seed in model.seeds), 0.0)
    for model, weight in zip(models, weights, strict=True):
        for seed, coefficient in zip(model.seeds, model.coefficients.tolist(), strict=True):
            table[seed] += weight * coefficient
    values = torch.tensor(list(table.values()), dtype=torch.float64)
    return replace(first, seeds=tuple(table), coefficients=values, version=max(model.version for model in models))


def materialise_all(
    models: Sequence[SeedModel],
    directions: Directions,
    out: Sequence[Tensor] | None = None,
    *,
    stacked: bool = True,
    digest: str | None = None,
) -> Sequence[Tensor]:
    """Return the parameters of several models, shape (models, *shape) for each part: each direction is drawn once.

    See `SeedModel.weights`.

    Raises:
        RecipeError: the space holds another w0 than theirs, or other directions.
    """
    if not models:
        raise RecipeError("models: expected one or more; got none")
    here = directions.digest() if digest is None else digest
    for model in models:
        if (model.base, model.distribution) != (here, directions.distribution):
            raise RecipeError(
                f"space: expected the parameters and directions with digest {model.base[:12]}, {model.distribution} ones; "
                f"got {here[:12]} and {directions.distribution} directions"
            )
    table = {seed: place for place, seed in enumerate(dict.fromkeys(seed for model in models for seed in model.seeds))}
    coefficients = torch.zeros(len(models), len(table), dtype=torch.float64)
    for row, model in zip(coefficients, models, strict=True):
        row[[table[seed] for seed in model.seeds]] = model.coefficients
    return materialise(directions, coefficients if stacked else coefficients[0], list(table), out)
