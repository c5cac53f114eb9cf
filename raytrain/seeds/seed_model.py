"""A model as the digest of its initial weights, seeds and coefficients: kilobytes at any size."""

import os
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
SEED_MODEL_FORMAT = 4


class _About(BaseModel, frozen=True, extra="forbid"):
    """The metadata in the file of a `SeedModel`; `tensors` is the digest of its tensors."""

    base: str
    distribution: Distribution
    version: Annotated[int, Field(ge=0)]
    tensors: str


@dataclass(frozen=True, slots=True, eq=False)
class SeedModel:
    """A model as w = w0 + sum over k of coefficients[k] * z(seeds[k]).

    Models with the same w0 form a vector space: sums, means, moving averages and crossovers are arithmetic on the
    coefficients.

    Attributes:
        base: digest of w0 and its directions, from `Directions.digest`.
        seeds: of the k directions, distinct.
        coefficients: float64, shape (k,), finite in float32.
        distribution: of the noise.
        version: number of calls of `updated`.

    Raises:
        ValueError: seeds are not distinct or not one for each coefficient, or a coefficient is not finite in float32.

    >>> model = SeedModel.from_pool("", master=0, size=0).updated([SeedUpdate(7, 0.5), SeedUpdate(7, 0.25)])
    >>> model.seeds, model.coefficients.tolist(), model.version
    ((7,), [0.75], 1)
    """

    base: str
    seeds: tuple[int, ...]
    coefficients: Tensor
    distribution: Distribution = "rademacher"
    version: int = 0

    def __post_init__(self) -> None:
        """Refuse values that could be saved but not loaded."""
        if self.distribution not in UNITS or self.coefficients.dtype != torch.float64:
            raise ValueError(
                f"expected a distribution of {', '.join(UNITS)} and float64 coefficients; "
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
        if not largest <= FLOAT32_MAX:  # also refuses nan
            raise ValueError(f"expected coefficients that are finite in float32; the largest is {largest:g}")

    @classmethod
    def from_pool(cls, base: str, master: int, size: int, distribution: Distribution = "rademacher") -> Self:
        """Return w0 with a pool of directions whose seeds derive from a master seed, and coefficients of 0."""
        return cls(
            base,
            tuple(fold_in(master, place) for place in range(size)),
            torch.zeros(size, dtype=torch.float64),
            distribution,
        )

    def updated(self, updates: Sequence[SeedUpdate]) -> Self:
        """Return the model after some updates; new seeds are appended."""
        index = {seed: place for place, seed in enumerate(self.seeds)}
        for update in updates:
            index.setdefault(update.seed, len(index))
        coefficients = torch.zeros(len(index), dtype=torch.float64)
        coefficients[: len(self.seeds)] = self.coefficients
        for update in updates:
            coefficients[index[update.seed]] += update.coefficient
        return replace(self, seeds=tuple(index), coefficients=coefficients, version=self.version + 1)

    def weights(
        self, directions: Directions, out: Sequence[Tensor] | None = None, *, digest: str | None = None
    ) -> Sequence[Tensor]:
        """Return its parameters, in the order of the directions' slices; see `materialise`.

        Args:
            directions: over w0.
            out: as in `materialise`.
            digest: a cached `directions.digest()`, which reads all of w0.

        Raises:
            RecipeError: the directions are others, or over other initial weights.
        """
        return materialise_all([self], directions, out, stacked=False, digest=digest)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a file."""
        tensors = {"coefficients": self.coefficients, "seeds": seeds_tensor(self.seeds)}
        about = {
            "base": self.base,
            "distribution": self.distribution,
            "version": self.version,
            "tensors": tensor_digest(tensors.items()),
        }
        write_atomic(
            Path(path),
            save(tensors, {"format": f"{SEED_MODEL_NAME}{SEED_MODEL_FORMAT}", "about": add_checksum(about).decode()}),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a model that `save` wrote.

        Raises:
            CheckpointError: the file is of another kind or format, or damaged.
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


def _about(path: str | os.PathLike[str], named: Mapping[str, str]) -> _About:
    """Return the metadata in the file of a `SeedModel`, checked."""
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
    """Return w0 + sum over i of weights[i] * (models[i] - w0).

    Weights that sum to 1 give a mean or, of two models, an interpolation. (decay, 1 - decay) of a moving average and a
    model give the next average. (1 + m, -m) of a model and its predecessor give a step with momentum m.

    Raises:
        RecipeError: the models differ in w0 or distribution, or there is not one weight for each.
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
    """Return the parameters of several models, (models, *shape) for each slice, generating noise once.

    See `SeedModel.weights`.

    Args:
        models: of the same w0 and directions.
        directions: over w0.
        out: as in `materialise`.
        stacked: False for one model, whose parameters then lack the dimension of models.
        digest: a cached `directions.digest()`.

    Raises:
        RecipeError: the directions are others, or over other initial weights.
    """
    if not models:
        raise RecipeError("models: expected one or more; got none")
    here = directions.digest() if digest is None else digest
    for model in models:
        if (model.base, model.distribution) != (here, directions.distribution):
            raise RecipeError(
                f"directions: expected the parameters and directions with digest {model.base[:12]}, "
                f"{model.distribution} ones; got {here[:12]} and {directions.distribution} directions"
            )
    table = {seed: place for place, seed in enumerate(dict.fromkeys(seed for model in models for seed in model.seeds))}
    coefficients = torch.zeros(len(models), len(table), dtype=torch.float64)
    for row, model in zip(coefficients, models, strict=True):
        row[[table[seed] for seed in model.seeds]] = model.coefficients
    return materialise(directions, coefficients if stacked else coefficients[0], list(table), out)
