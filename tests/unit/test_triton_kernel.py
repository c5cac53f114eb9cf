"""The GPU kernel, bit for bit the reference: in Triton's interpreter, and where there is a GPU, on it."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raytrain.seeds import gpu
from raytrain.seeds.gpu import NoGPUError, TritonKernel
from raytrain.seeds.kernels import WEIGHT_BITS, ReferenceKernel, seeds_tensor
from raytrain.seeds.stream import Mode

KERNELS = "raytrain.seeds.gpu_kernels"
REFERENCE = ReferenceKernel()
LIMIT = 2**WEIGHT_BITS - 1
both_modes = pytest.mark.parametrize("mode", ["rademacher", "gaussian"])


@pytest.fixture(scope="module", params=["interpreter", "gpu"])
def kernel(request: pytest.FixtureRequest) -> Iterator[TritonKernel]:
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "interpreter":
            patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, KERNELS, raising=False)  # it is interpreted, or not, from its import on
        yield TritonKernel()
        sys.modules.pop(KERNELS, None)


@pytest.fixture
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
    mode: Mode, start: int, size: int, models: int, count: int, kernel: TritonKernel, device: str
) -> None:
    random = np.random.default_rng([start, size])
    seeds = seeds_tensor([int(seed) for seed in random.integers(0, 2**64, count, np.uint64)])
    weights = torch.from_numpy(random.integers(-LIMIT, LIMIT + 1, (models, count), np.int32))
    parameter = int(random.integers(0, 2**64, dtype=np.uint64))
    check_sums(mode, seeds, weights, parameter, start, size, kernel, device)


@both_modes
def test_pieces_of_the_seeds_add_up(
    mode: Mode, kernel: TritonKernel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds, weights = seeds_tensor(range(7)), torch.arange(-8, 6, dtype=torch.int32).view(2, 7)
    monkeypatch.setattr(kernel._kernels, "CHUNK", 2)
    for programs in (1, 8):  # all pieces in one program, or each in its own
        monkeypatch.setattr(gpu, "PROGRAMS", programs)
        check_sums(mode, seeds, weights, 5, 3, 40, kernel, device)


def test_the_largest_weights_do_not_overflow(
    kernel: TritonKernel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = kernel._kernels.CHUNK + 2
    monkeypatch.setattr(gpu, "PROGRAMS", 1)
    weights = torch.tensor([[LIMIT], [-LIMIT]], dtype=torch.int32).expand(2, count)
    check_sums("rademacher", seeds_tensor([2**64 - 1] * count), weights, 2**64 - 1, 0, 128, kernel, device)


def check_sums(
    mode: Mode,
    seeds: Tensor,
    weights: Tensor,
    parameter: int,
    start: int,
    size: int,
    kernel: TritonKernel,
    device: str,
) -> None:
    expected = torch.arange(len(weights) * (size + 1)).view(size + 1, len(weights)).T[:, 1:]  # sums are added to it
    out = expected.to(device, copy=True)
    kernel.sums(mode, seeds.to(device), weights.to(device), parameter, start, out)
    REFERENCE.sums(mode, seeds, weights, parameter, start, expected)
    assert torch.equal(out.cpu(), expected)


@both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("start", "size", "scale"), [(0, 1, 1.0), (3, 2500, -0.001), (2**40 + 4095, 70, 1e-40), (32, 64, 0.0)]
)
def test_moves_are_those_of_the_reference(
    mode: Mode, dtype: torch.dtype, start: int, size: int, scale: float, kernel: TritonKernel, device: str
) -> None:
    base = numbers(size, dtype)
    expected, out = torch.empty_like(base), base.to(device, copy=True)
    REFERENCE.move(mode, 2**64 - 3, scale, 2**63 + 1, start, base, expected)
    kernel.move(mode, 2**64 - 3, scale, 2**63 + 1, start, out, out)
    assert torch.equal(bits(out.cpu()), bits(expected))


@both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("start", "shape"), [(5, (6, 7)), (0, (5, 3, 100)), (31, (9, 1))])
def test_rows_are_those_of_the_whole(
    mode: Mode, dtype: torch.dtype, start: int, shape: tuple[int, ...], kernel: TritonKernel, device: str
) -> None:
    base = numbers(int(np.prod(shape)), dtype).view(shape)
    for rows in (torch.tensor([4, 0, 4, 3]), torch.tensor([], dtype=torch.int64)):
        expected = torch.empty((len(rows), *shape[1:]), dtype=dtype)
        out = torch.empty_like(expected, device=device)
        REFERENCE.move(mode, 7, 0.3, 8, start, base, expected, rows)
        kernel.move(mode, 7, 0.3, 8, start, base.to(device), out, rows.to(device))
        assert torch.equal(bits(out.cpu()), bits(expected))


def numbers(size: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers, with zeros and with what has the largest and the smallest exponents among them."""
    base = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    info = torch.finfo(dtype)
    odd = [0.0, -0.0, info.max / 2, -info.max / 2, info.tiny, -info.smallest_normal / 2, float("inf"), float("-inf")]
    base[1::5] = torch.tensor(odd, dtype=dtype).repeat(size)[: len(base[1::5])]
    return base


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("name", ["add_normals", "move_normals", "move_signs"])
def test_no_operation_is_fused_or_approximate(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(sys.modules, KERNELS, raising=False)
    from raytrain.seeds import gpu_kernels

    try:
        function = getattr(gpu_kernels, name)
    finally:
        sys.modules.pop(KERNELS, None)
    pointers = {"seeds": "*i64", "weights": "*i32", "out": "*fp16", "base": "*fp16", "rows": "*i64"}
    if name == "add_normals":
        pointers["out"] = "*i64"
    constants = {"blocks": 128, "models": 2, "words": 64}
    types = {p.name: pointers.get(p.name) or p.annotation_type or "i64" for p in function.params}
    values = {place: constants[at] for place, at in enumerate(function.arg_names) if at in constants}
    types |= {at: "constexpr" for at in constants if at in types}
    source: Any = triton.compiler.ASTSource(function, types, {(place,): value for place, value in values.items()})
    assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=gpu.UNFUSED).asm["ptx"]
    assert re.findall(r"\b(?:fma|mad)\.\S*f32|\S+\.(?:ftz|approx)\S*", assembly) == []
    assert assembly.count("sqrt.rn.f32") == (0 if name == "move_signs" else assembly.count("sqrt."))


def test_a_machine_without_triton_or_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "find_spec", lambda name: name)
    with pytest.raises(NoGPUError, match="no GPU"):
        TritonKernel()
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    with pytest.raises(NoGPUError, match="not installed"):
        TritonKernel()
