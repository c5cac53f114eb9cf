"""The GPU kernel, bit for bit the reference: in Triton's interpreter, and where there is a GPU, on it."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raytrain.seeds.directions import Directions
from raytrain.seeds.kernels import triton_gpu as gpu
from raytrain.seeds.kernels.kernel import WEIGHT_BITS, ScaledDirection, seeds_tensor
from raytrain.seeds.kernels.reference import ReferenceKernel
from raytrain.seeds.kernels.triton_gpu import NoGPUError, TritonKernel
from raytrain.seeds.prng import Distribution
from raytrain.seeds.updates import SeedUpdate, apply_updates, materialise

KERNELS = "raytrain.seeds.kernels.triton_programs"
REFERENCE = ReferenceKernel()
LIMIT = 2**WEIGHT_BITS - 1
both_modes = pytest.mark.parametrize("mode", ["rademacher", "gaussian"])


@pytest.fixture
def fresh() -> Iterator[None]:
    """Have the functions imported anew: whether they are interpreted is settled then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, KERNELS, raising=False)
        yield
        sys.modules.pop(KERNELS, None)


@pytest.fixture(params=["interpreter", "gpu"] if torch.cuda.is_available() else ["interpreter"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fresh: None) -> TritonKernel:
    pytest.importorskip("triton")
    if request.param == "interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return TritonKernel()


def device(kernel: TritonKernel) -> str:
    return "cpu" if kernel._kernels.INTERPRETED else "cuda"


@both_modes
@pytest.mark.parametrize(
    ("start", "size", "models", "count"),
    [
        (0, 1, 1, 2),
        (1, 130, 3, 3),
        (127, 4200, 2, 1),  # several programs
        (2**31 - 5, 300, 5, 2),
        (2**45 + 2**32 * 128 - 66, 134, 9, 2),  # the number of a block has more than 32 bits
        (6, 0, 1, 1),
        (6, 9, 1, 0),
    ],
)
def test_sums_are_those_of_the_reference(
    mode: Distribution, start: int, size: int, models: int, count: int, kernel: TritonKernel
) -> None:
    random = np.random.default_rng([start, size])
    seeds = seeds_tensor([int(seed) for seed in random.integers(0, 2**64, count, np.uint64)])
    weights = torch.from_numpy(random.integers(-LIMIT, LIMIT + 1, (models, count), np.int32))
    parameter = int(random.integers(0, 2**64, dtype=np.uint64))
    check_sums(kernel, mode, seeds, weights, parameter=parameter, start=start, size=size)


@both_modes
@pytest.mark.parametrize("programs", [1, 8], ids=["one after the other", "at once"])
def test_pieces_of_the_seeds_add_up(
    mode: Distribution, programs: int, kernel: TritonKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "PROGRAMS", programs)
    monkeypatch.setattr(kernel._kernels, "CHUNK", 2)
    weights = torch.arange(-5, 5, dtype=torch.int32).view(2, 5)
    check_sums(kernel, mode, seeds_tensor(range(5)), weights, parameter=5, start=3, size=40)


def test_the_largest_weights_do_not_overflow(kernel: TritonKernel) -> None:
    count = kernel._kernels.CHUNK
    weights = torch.tensor([[LIMIT], [-LIMIT]], dtype=torch.int32).expand(2, count)
    check_sums(kernel, "rademacher", seeds_tensor([2**64 - 1] * count), weights, parameter=2**64 - 1, start=0, size=128)


def check_sums(
    kernel: TritonKernel, mode: Distribution, seeds: Tensor, weights: Tensor, *, parameter: int, start: int, size: int
) -> None:
    whole = torch.arange(len(weights) * (size + 1)).view(size + 1, len(weights))
    expected = whole.T[:, 1:]  # sums are added to what is there, wherever in memory
    out = whole.to(device(kernel), copy=True).T[:, 1:]
    kernel.accumulate(mode, seeds.to(device(kernel)), weights.to(device(kernel)), parameter, start, out)
    REFERENCE.accumulate(mode, seeds, weights, parameter, start, expected)
    assert torch.equal(out.cpu(), expected)


@both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("start", "size", "scale"), [(3, 2500, -0.001), (2**40 + 4095, 70, 1e-40), (0, 1, 0.0)])
def test_moves_are_those_of_the_reference(
    mode: Distribution, dtype: torch.dtype, start: int, size: int, scale: float, kernel: TritonKernel
) -> None:
    base = numbers(size, dtype)
    expected, out = torch.empty_like(base), base.to(device(kernel), copy=True)
    REFERENCE.axpy(ScaledDirection(mode, 2**64 - 3, scale, 2**63 + 1, start), base, expected)
    kernel.axpy(ScaledDirection(mode, 2**64 - 3, scale, 2**63 + 1, start), out, out)
    assert torch.equal(bits(out.cpu()), bits(expected))


@both_modes
@pytest.mark.parametrize(
    ("start", "shape", "rows"), [(5, (6, 7), [5, 1]), (0, (5, 3, 800), [4, 0, 4]), (31, (9, 1), [8]), (3, (2, 2), [])]
)
def test_rows_are_those_of_the_whole(
    mode: Distribution, start: int, shape: tuple[int, ...], rows: list[int], kernel: TritonKernel
) -> None:
    base, named = numbers(int(np.prod(shape)), torch.bfloat16).view(shape), torch.tensor(rows, dtype=torch.int64)
    expected = torch.empty((len(rows), *shape[1:]), dtype=base.dtype)
    out = torch.empty_like(expected, device=device(kernel))
    REFERENCE.axpy(ScaledDirection(mode, 7, 0.3, 8, start), base, expected, named)
    kernel.axpy(ScaledDirection(mode, 7, 0.3, 8, start), base.to(device(kernel)), out, named.to(device(kernel)))
    assert torch.equal(bits(out.cpu()), bits(expected))


def numbers(size: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers, and among them zeros, infinities and those with the largest and the smallest exponents."""
    base = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    info = torch.finfo(dtype)
    odd = [0.0, -0.0, info.max / 2, -info.max / 2, info.tiny, -info.tiny / 2, info.tiny * info.eps, np.inf, -np.inf]
    base[1::5] = torch.tensor(odd, dtype=dtype).repeat(size)[: len(base[1::5])]
    return base


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("name", ["add_normals", "axpy_normals"])
def test_no_operation_is_fused_or_approximate(
    name: str, tmp_path: Path, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compile for a GPU, which need not be here."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    function = getattr(importlib.import_module(KERNELS), name)
    constants = {"blocks": 128, "models": 2}
    types = {"seeds": "*i64", "weights": "*i32", "out": "*fp32", "base": "*fp32", "rows": "*i64"}
    if name == "add_normals":
        types["out"] = "*i64"
    types |= dict.fromkeys(constants, "constexpr")
    source: Any = triton.compiler.ASTSource(
        function,
        {each.name: types.get(each.name) or each.annotation_type or "i64" for each in function.params},
        {(place,): constants[each] for place, each in enumerate(function.arg_names) if each in constants},
    )
    assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=gpu.UNFUSED).asm["ptx"]
    assert re.search(r"(add|sub)\.rn\.f32", assembly)
    assert not re.search(r"(fma|mad)\.\S*f32|\.ftz|\.approx", assembly)


@both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_to_apply_seeds_give_the_bits_of_the_reference(
    mode: Distribution, dtype: torch.dtype, kernel: TritonKernel
) -> None:
    options = {"scales": {"a.bias": 0.5}, "sparsity": 0.5, "blocks": {"b": 1}}
    seeds, weights = [2**64 - 1, 6, 0], torch.tensor([1e-3, -0.25, 0.1], dtype=torch.float64)
    found = []
    for here, drawn in (("cpu", REFERENCE), (device(kernel), kernel)):
        named = {"a": numbers(300, dtype).view(15, 20), "a.bias": numbers(20, dtype), "b": numbers(140, dtype)}
        space = Directions.of({name: value.to(here) for name, value in named.items()}, mode, kernel=drawn, **options)
        made = [*materialise(space, weights, seeds), *materialise(space, torch.stack([weights, -weights]), seeds)]
        digest = space.digest()
        apply_updates(space, [SeedUpdate(seed, scale) for seed, scale in zip(seeds, weights.tolist(), strict=True)])
        found.append([digest, space.digest(), *(bits(one.cpu()).tolist() for one in made)])
    assert found[0] == found[1]


def test_a_machine_without_triton_or_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "find_spec", lambda name: name)
    with pytest.raises(NoGPUError, match="no GPU"):
        TritonKernel()
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    with pytest.raises(NoGPUError, match="not installed"):
        TritonKernel()
