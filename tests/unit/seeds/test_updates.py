"""What is built from sums of directions: laws of both ways to apply seeds, and of models that are coefficients."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from raytrain.errors import CheckpointError, RecipeError
from raytrain.seeds.directions import Directions
from raytrain.seeds.kernels.kernel import fastest_kernel, load_kernel, quantise
from raytrain.seeds.kernels.reference import ReferenceKernel
from raytrain.seeds.prng import Distribution, noise, parameter_id
from raytrain.seeds.seed_model import SeedModel, linear_combination, materialise_all
from raytrain.seeds.updates import SeedUpdate, apply_updates, materialise
from raytrain.tensors import round_once

MODES: tuple[Distribution, ...] = ("rademacher", "gaussian")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (37, 11), "a.bias": (37,), "b.weight": (5, 300)}
    return {name: (torch.randn(shape, generator=generator) * 0.02).to(dtype) for name, shape in shapes.items()}


def coefficients(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1e-4


@pytest.mark.parametrize("kernel", ["reference", "numba"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_at_once_rounds_the_exact_sum_once(dtype: torch.dtype, mode: Distribution, kernel: str) -> None:
    named, count = parameters(dtype), 1024 if kernel == "numba" else 50
    weights = coefficients(count)
    space = Directions.of(named, mode, kernel=load_kernel(kernel))
    found = materialise(space, weights, range(count))
    kept, unit = quantise(weights, "rademacher")
    for (name, base), got in zip(named.items(), found, strict=True):
        exact = base.double().flatten()
        for seed, weight in enumerate(kept.tolist()):
            exact += weight * unit * torch.from_numpy(noise(mode, seed, parameter_id(name), 0, base.numel())).double()
        wide = exact.to(dtype).double()
        nearer = [wide.to(dtype).nextafter(torch.full_like(got.flatten(), way)).double() for way in (-1e4, 1e4)]
        best = torch.stack([(exact - one).abs() for one in (wide, *nearer)]).min(0).values
        assert ((exact - got.double().flatten()).abs() <= best * (1 + 1e-9)).all()


@given(st.integers(0, 99), st.sampled_from([1e-30, 1e-4, 1e20]), st.sampled_from(MODES))
def test_coefficients_count_to_two_to_the_minus_25_of_the_largest(seed: int, size: float, mode: Distribution) -> None:
    wanted = coefficients(200, seed) * size
    found = materialise(Directions.of({"w": torch.zeros(100, dtype=torch.float64)}, mode), wanted, range(200))[0]
    drawn = np.stack([noise(mode, place, parameter_id("w"), 0, 100) for place in range(200)]).astype(float)
    bound = float(wanted.abs().max()) * 2.0**-26 * np.abs(drawn).sum(0) * 2  # half a unit, which is up to twice that
    assert (np.abs(found.numpy() - wanted.numpy() @ drawn) <= bound).all()


@given(st.floats(-60000, 60000), st.sampled_from([torch.bfloat16, torch.float16]))
def test_rounding_once_is_to_the_nearest(value: float, dtype: torch.dtype) -> None:
    tensor = torch.tensor(value, dtype=torch.float64)
    near = round_once(tensor, dtype)
    others = [near.nextafter(torch.tensor(way, dtype=dtype)) for way in (-float("inf"), float("inf"))]
    assert all((near.double() - tensor).abs() <= (other.double() - tensor).abs() for other in others)


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None, max_examples=20)
@given(st.permutations(range(40)))
def test_the_order_of_seeds_changes_no_bit(mode: Distribution, order: list[int]) -> None:
    space, weights = Directions.of(parameters(), mode), coefficients(40)
    straight = materialise(space, weights, range(40))
    assert all(map(torch.equal, straight, materialise(space, weights[order], order)))


@pytest.mark.parametrize("mode", MODES)
def test_kernels_agree_on_every_bit(mode: Distribution) -> None:
    found = [
        materialise(Directions.of(parameters(), mode, kernel=load_kernel(name)), coefficients(33), range(33))
        for name in ("reference", "numba")
    ]
    assert all(map(torch.equal, *found))
    assert all(map(torch.equal, found[0], materialise(Directions.of(parameters(), mode), coefficients(33), range(33))))


@pytest.mark.parametrize("models", [1, 3])
def test_a_kernel_gets_enough_at_once_for_all_threads(models: int) -> None:
    sizes = []

    class Noting(ReferenceKernel):
        def accumulate(self, *arguments: Any) -> None:
            sizes.append(arguments[-1].shape)

    space = Directions.of({"w": torch.zeros(3_000_000)}, kernel=Noting())
    materialise(space, torch.ones(models, 1, dtype=torch.float64), [1])
    assert sum(width for _, width in sizes) == 3_000_000
    assert all(count == models and models * width > 2_000_000 for count, width in sizes[:-1])


def test_what_does_not_fit_is_said() -> None:
    space, one = Directions.of({"w": torch.zeros(4, 5)}), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"coefficients: expected shape \(1,\) or \(models, 1\), one for each"):
        materialise(space, one, [1])
    for out in (torch.zeros(5, 4).T, torch.zeros(4, 5).half(), torch.zeros(20)):
        with pytest.raises(ValueError, match=r"out: expected a contiguous tensor of torch.float32 and shape \(4, 5\)"):
            materialise(space, one, [1, 2], [out])
    for coefficients_of in (torch.ones(2, 2, 1), torch.ones(0, 1)):
        with pytest.raises(ValueError, match=r"coefficients: expected shape \(1,\) or \(models, 1\), one for each"):
            materialise(space, coefficients_of, [1])
    for scale in (float("nan"), 1e39):
        with pytest.raises(ValueError, match="coefficient: expected a finite float32; got "):
            SeedUpdate(1, scale)
    for seed in (-1, 2**64):
        for use in (
            lambda seed: SeedUpdate(seed, 1.0),
            lambda seed: materialise(space, one[:1], [seed]),
            lambda seed: SeedModel.from_pool("x", seed, 2),
            lambda seed: SeedModel("x", (seed, 5), one),
        ):
            with pytest.raises(ValueError, match=f"seed: expected an integer from 0 to 2\\^64 - 1; got {seed}; "):
                use(seed)


@given(st.sampled_from([*DTYPES, torch.float64]), st.floats(0.0, 308.0))
def test_a_sum_beyond_the_type_is_refused_and_what_was_infinite_before_is_not(dtype: torch.dtype, power: float) -> None:
    space, far = Directions.of({"w": torch.tensor([0.0, -torch.inf, 0.0], dtype=dtype)}), 10.0**power
    scale = torch.tensor([far], dtype=torch.float64)
    if torch.finfo(dtype).max < far:
        with pytest.raises(ValueError, match=re.escape(f"the largest, {far:g}, takes w beyond {dtype}")):
            materialise(space, scale, [1])
    else:
        [found] = materialise(space, scale, [1])
        assert found.isfinite().tolist() == [True, False, True]
        torch.testing.assert_close(found.abs().double()[::2], scale.expand(2), rtol=0.01, atol=0)


def test_a_model_that_could_not_be_read_again_is_not_made() -> None:
    numbers = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected different seeds, one for each coefficient; got 1 different"):
        SeedModel("x", (5, 5), numbers)
    with pytest.raises(ValueError, match="expected different seeds, one for each coefficient; got 3 different"):
        SeedModel("x", (5, 6, 7), numbers)
    for odd, told in ((float("inf"), "inf"), (float("nan"), "nan"), (-1e39, "1e\\+39")):
        with pytest.raises(ValueError, match=f"coefficients that are finite in float32; the largest is {told}"):
            SeedModel("x", (5, 6), numbers * odd)
    with pytest.raises(
        ValueError, match="expected a distribution of rademacher, gaussian and float64 coefficients; got"
    ):
        SeedModel("x", (5, 6), numbers, "x")  # type: ignore[arg-type]
    model = SeedModel("x", (5, 6), numbers)
    with pytest.raises(RecipeError, match="models: expected one or more, and a weight for each; got 2 and 1 weights"):
        linear_combination([model, model], [1.0])


def test_sums_are_linear() -> None:
    named = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters().items()}
    space = Directions.of(named)
    a, b = (torch.randint(-1000, 1000, (20,), generator=torch.Generator().manual_seed(k)).double() for k in (1, 2))
    of_a, of_b, of_both = (materialise(space, weights, range(20)) for weights in (a, b, 2 * a - 3 * b))
    assert all(torch.equal(2 * x - 3 * y, z) for x, y, z in zip(of_a, of_b, of_both, strict=True))


def test_several_models_at_once_are_each_of_them() -> None:
    space, weights = Directions.of(parameters()), coefficients(60).view(3, 20)
    weights[2] *= 1e9
    together = materialise(space, weights, range(20))
    for place in range(3):
        alone = materialise(space, weights[place], range(20))
        assert all(torch.equal(all_of_them[place], one) for all_of_them, one in zip(together, alone, strict=True))


def test_moves_one_by_one_are_those_of_the_arithmetic_in_its_own_order() -> None:
    moves = [SeedUpdate(seed, 0.1 / (seed + 1)) for seed in range(5)]
    for dtype in DTYPES:
        named = parameters(dtype)
        expected = {name: value.clone() for name, value in named.items()}
        apply_updates(Directions.of(named), moves)
        for name, value in expected.items():
            for move in moves:
                drawn = torch.from_numpy(noise("rademacher", move.seed, parameter_id(name), 0, value.numel()))
                value.copy_(value.float() + torch.tensor(move.coefficient) * drawn.view_as(value))
            assert torch.equal(named[name], value)


def test_what_is_frozen_small_or_in_another_block_stands_still() -> None:
    named = parameters()
    space = Directions.of(named, scales={"a.bias": 0.0, "b.weight": 2.0}, sparsity=0.75, blocks={"b.weight": 1})
    before = {name: value.clone() for name, value in named.items()}
    at_once = materialise(space, torch.tensor([0.5, 0.25], dtype=torch.float64), [2, 5])
    apply_updates(space, [SeedUpdate(2, 0.5)])
    assert torch.equal(named["b.weight"], before["b.weight"])
    apply_updates(space, [SeedUpdate(5, 0.25)])
    assert torch.equal(named["a.bias"], before["a.bias"])
    for name, far in (("a.weight", 0.5), ("b.weight", 0.5)):
        moved = named[name] != before[name]
        small = before[name].abs() <= before[name].abs().flatten().sort().values[round(0.25 * moved.numel()) - 1]
        assert torch.equal(moved, small)
        torch.testing.assert_close(
            (named[name] - before[name]).abs()[moved], torch.tensor(far).expand(int(moved.sum()))
        )
    assert all(torch.equal(named[part.name], made) for part, made in zip(space.slices, at_once, strict=True))


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(MODES),
    st.sampled_from([*DTYPES, torch.float64]),
    st.lists(st.integers(0, 1500), min_size=1, max_size=4),
)
def test_shards_of_a_parameter_move_as_the_whole(mode: Distribution, dtype: torch.dtype, cuts: list[int]) -> None:
    whole, moves = parameters()["b.weight"].to(dtype).flatten(), [SeedUpdate(3, 0.01), SeedUpdate(2**64 - 1, -0.5)]
    edges = sorted({0, *cuts, 1500})
    shards = [
        Directions.of({"b.weight": whole[first:last].clone()}, mode, offsets={"b.weight": first})
        for first, last in zip(edges[:-1], edges[1:], strict=True)
    ]
    space = Directions.of({"b.weight": whole}, mode)
    at_once = [materialise(one, coefficients(9), range(9))[0] for one in (space, *shards)]
    assert torch.equal(at_once[0], torch.cat(at_once[1:]))
    for one in (space, *shards):
        apply_updates(one, moves)
    assert torch.equal(whole, torch.cat([one.slices[0].tensor for one in shards]))


@pytest.mark.parametrize("kernel", ["reference", "numba", "native"])
def test_rows_of_a_shard_are_those_of_the_whole(kernel: str) -> None:
    drawn = fastest_kernel("cpu") if kernel == "native" else load_kernel(kernel)  # which is Numba's without a compiler
    table = torch.randn(40, 7)
    for dtype in (torch.float32, torch.float64):
        whole, rows = Directions.of({"w": table.to(dtype)}), torch.tensor([3, 0, 9])
        shard = Directions.of({"w": table[20:].to(dtype).contiguous()}, offsets={"w": 140}, kernel=drawn)
        found, wanted = torch.empty(3, 7, dtype=dtype), torch.empty(3, 7, dtype=dtype)
        shard.write_perturbed(shard.slices[0], 5, 0.1, found, rows)
        whole.write_perturbed(whole.slices[0], 5, 0.1, wanted, rows + 20)
        assert torch.equal(found, wanted)


def test_a_tied_parameter_is_moved_once() -> None:
    shared = torch.zeros(300)
    space = Directions.of({"first": shared, "second": shared.view(300)})
    space.add_direction(3, 1.0)
    assert torch.equal(shared, torch.from_numpy(noise("rademacher", 3, parameter_id("first"), 0, 300)))


def test_a_space_says_what_it_cannot_take() -> None:
    with pytest.raises(RecipeError, match="expected contiguous parameters; w is not"):
        Directions.of({"w": torch.zeros(4, 5).T})
    shared = torch.zeros(20)
    assert len(Directions.of({"a": shared[:10], "b": shared[10:], "none": shared[5:5]}).slices) == 3
    for other in (shared.view(4, 5), shared[19:]):
        with pytest.raises(RecipeError, match="directions: a and b overlap in memory without being one tensor"):
            Directions.of({"a": shared, "b": other})
    with pytest.raises(RecipeError, match="zo.sparsity: expected 0 with shards of parameters"):
        Directions.of({"w": torch.zeros(4, 5)}, sparsity=0.5, offsets={"w": 20})


def test_a_model_saved_loaded_and_advanced_in_any_order_is_the_same(tmp_path: Path) -> None:
    space = Directions.of(parameters())
    first = SeedModel.from_pool(space.digest(), 11, 32)
    moves = [SeedUpdate(first.seeds[place % 32], 1e-3 * place) for place in range(50)] + [SeedUpdate(7, 0.5)]
    first.save(tmp_path / "first")
    later = SeedModel.load(tmp_path / "first").updated(moves)
    straight = first.updated(moves)
    later.save(tmp_path / "later")
    later = SeedModel.load(tmp_path / "later")
    assert (later.seeds, later.version, later.base) == (straight.seeds, 1, first.base)
    assert torch.equal(later.coefficients, straight.coefficients)
    assert all(map(torch.equal, later.weights(space), straight.weights(space)))
    assert (tmp_path / "later").stat().st_size < 33 * 16 + 1000


def test_arithmetic_on_models_is_that_on_their_weights() -> None:
    named = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters().items()}
    space = Directions.of(named)
    empty = SeedModel(space.digest(), (), torch.zeros(0, dtype=torch.float64))
    a = empty.updated([SeedUpdate(1, 0.5), SeedUpdate(2, -0.25)])
    b = empty.updated([SeedUpdate(2, 1.0), SeedUpdate(3, 0.125)])
    mean = linear_combination([a, b], [0.5, 0.5]).weights(space)
    both = materialise_all([a, b], space)
    assert all(torch.equal(one, two.mean(0)) for one, two in zip(mean, both, strict=True))
    ahead = linear_combination([b, a], [1.5, -0.5]).weights(space)
    assert all(torch.equal(one, 1.5 * two[1] - 0.5 * two[0]) for one, two in zip(ahead, both, strict=True))


def test_a_model_of_other_weights_is_refused(tmp_path: Path) -> None:
    space, other = Directions.of(parameters()), Directions.of(parameters(seed=1))
    model = SeedModel.from_pool(space.digest(), 1, 2)
    with pytest.raises(RecipeError, match="expected the parameters and directions with digest"):
        model.weights(other)
    named = parameters()
    others = ({"sparsity": 0.5}, {"blocks": {"a.weight": 1}}, {"scales": {"a.bias": 2.0}}, {"distribution": "gaussian"})
    for meaning in others:
        with pytest.raises(RecipeError, match="expected the parameters and directions with digest"):
            SeedModel.from_pool(Directions.of(named).digest(), 1, 2).weights(Directions.of(named, **meaning))
    assert (
        Directions.of({"w": torch.zeros(2).half()}).digest() != Directions.of({"w": torch.zeros(2).bfloat16()}).digest()
    )
    with pytest.raises(RecipeError, match="expected all with base"):
        linear_combination([model, SeedModel.from_pool(other.digest(), 1, 2)], [1, 1])
    (tmp_path / "no").write_bytes(b"no such thing")
    with pytest.raises(CheckpointError, match="expected a file that SeedModel.save wrote"):
        SeedModel.load(tmp_path / "no")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_weights_in_a_mapped_file_are_read_and_never_written(dtype: torch.dtype, tmp_path: Path) -> None:
    module = Directions.of(parameters(dtype), sparsity=0.5, scales={"a.bias": 2.0})
    save_file(parameters(dtype), tmp_path / "w0")
    mapped = module.with_tensors(load_file(tmp_path / "w0"), read_only=True)
    assert mapped.digest() == module.digest()
    model = SeedModel(mapped.digest(), tuple(range(20)), coefficients(20))
    found = model.weights(mapped, [torch.empty_like(part.tensor) for part in mapped.slices])
    assert all(map(torch.equal, found, model.weights(module)))
    for write in (
        lambda: mapped.add_direction(3, 0.5),
        lambda: apply_updates(mapped, [SeedUpdate(3, 0.5)]),
        lambda: model.weights(mapped, [part.tensor for part in mapped.slices]),
    ):
        with pytest.raises(ValueError, match=r"^out: expected another tensor than a.weight, which is read-only$"):
            write()
    with pytest.raises(RecipeError, match=r"^parameters: expected a.bias of .*, contiguous; got None$"):
        module.with_tensors({"a.weight": parameters(dtype)["a.weight"]})
    with pytest.raises(RecipeError, match=r"^parameters: expected b.weight of .*\(5, 300\)\), .*; got .*\(300, 5\)"):
        module.with_tensors({**parameters(dtype), "b.weight": parameters(dtype)["b.weight"].T})


def test_a_digest_that_the_caller_knows_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Directions.of(parameters())
    digest = space.digest()
    model = SeedModel(digest, tuple(range(5)), coefficients(5))
    wanted = model.weights(space)
    monkeypatch.setattr(Directions, "digest", None)  # to call it would fail
    assert all(map(torch.equal, wanted, model.weights(space, digest=digest)))
    with pytest.raises(RecipeError, match="expected the parameters and directions with digest"):
        model.weights(space, digest="other")
