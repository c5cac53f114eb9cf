"""Every kernel of this machine gives the bits of the reference, whatever the element it starts at."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.cli.main import list_tables
from raytrain.errors import RecipeError
from raytrain.seeds.kernels import native
from raytrain.seeds.kernels import numba_cpu as portable
from raytrain.seeds.kernels.kernel import (
    KERNELS,
    Kernel,
    ScaledDirection,
    fastest_kernel,
    kernel_status,
    load_kernel,
    quantise,
    seeds_tensor,
)
from raytrain.seeds.kernels.native import CannotCompileError
from raytrain.seeds.prng import Distribution, parameter_id

MODES: tuple[Distribution, ...] = ("rademacher", "gaussian")
REFERENCE = load_kernel("reference")


def on_cpu() -> Iterator[Any]:
    for name in ("native", "numba"):
        try:
            yield pytest.param(load_kernel(name), id=name)
        except CannotCompileError as error:
            yield pytest.param(None, id=name, marks=pytest.mark.skip(reason=str(error)))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", list(on_cpu()))
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_sums_are_those_of_the_reference(kernel: Kernel, mode: Distribution, data: st.DataObject) -> None:
    seeds = seeds_tensor(data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=70)))
    models = data.draw(st.integers(1, 3))
    largest = 2**25 - 1
    weight = st.sampled_from([0, 1, largest, -largest]) | st.integers(-largest, largest)
    weights = torch.tensor(
        data.draw(
            st.lists(st.lists(weight, min_size=len(seeds), max_size=len(seeds)), min_size=models, max_size=models)
        ),
        dtype=torch.int32,
    )
    start = data.draw(st.integers(0, 3000) | st.integers(2**32 * 128 - 700, 2**32 * 128))
    before = torch.arange(models * data.draw(st.integers(1, 1500))).view(models, -1)
    expected, found = before.clone(), before.clone()
    REFERENCE.accumulate(mode, seeds, weights, parameter_id("w"), start, expected)
    with threads(data.draw(st.integers(1, 2))):
        kernel.accumulate(mode, seeds, weights, parameter_id("w"), start, found)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kernel", list(on_cpu()))
def test_sums_of_more_seeds_than_fit_before_a_flush(kernel: Kernel) -> None:
    seeds = seeds_tensor(range(5000))
    weights = torch.full((1, 5000), 2**25 - 1, dtype=torch.int32)
    expected, found = torch.zeros(1, 300, dtype=torch.int64), torch.zeros(1, 300, dtype=torch.int64)
    REFERENCE.accumulate("rademacher", seeds, weights, 5, 17, expected)
    kernel.accumulate("rademacher", seeds, weights, 5, 17, found)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", list(on_cpu()))
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_moves_are_those_of_the_reference(kernel: Kernel, mode: Distribution, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(sorted(kernel.dtypes, key=str)))
    rows, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 400))
    start = data.draw(st.integers(0, 2000) | st.integers(2**32 * 128 - 700, 2**32 * 128))
    scale = data.draw(st.floats(-100, 100))
    base = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    chosen = data.draw(st.none() | st.lists(st.integers(0, rows - 1), min_size=1, max_size=5))
    some = None if chosen is None else torch.tensor(chosen)
    expected = torch.empty_like(base if some is None else base[some])
    found = torch.empty_like(expected)
    REFERENCE.axpy(ScaledDirection(mode, 2**64 - 3, scale, 9, start), base, expected, some)
    with threads(data.draw(st.integers(1, 2))):
        kernel.axpy(ScaledDirection(mode, 2**64 - 3, scale, 9, start), base, found, some)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kernel", list(on_cpu()))
def test_a_move_in_place_on_all_threads(kernel: Kernel) -> None:
    base = torch.randn(300_001)
    expected = torch.empty_like(base)
    REFERENCE.axpy(ScaledDirection("rademacher", 1, 0.1, 2, 3), base, expected)
    with threads(2):
        kernel.axpy(ScaledDirection("rademacher", 1, 0.1, 2, 3), base, base)
    assert torch.equal(base, expected)


@given(
    st.lists(st.floats(-1e30, 1e30).filter(lambda x: not x or abs(x) > 1e-30), min_size=1, max_size=30),
    st.sampled_from(MODES),
)
def test_coefficients_are_kept_to_a_part_of_the_largest(values: list[float], mode: Distribution) -> None:
    coefficients = torch.tensor(values, dtype=torch.float64)
    weights, unit = quantise(coefficients, mode)
    plain = float(unit) / {"rademacher": 1, "gaussian": 2.0**-20}[mode]
    assert weights.abs().max() < 2**25
    assert np.log2(plain) == round(np.log2(plain))
    assert ((weights.double() * plain - coefficients).abs() <= coefficients.abs().max() * 2.0**-24).all()


def test_coefficients_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="coefficients: expected finite numbers; got nan"):
        quantise(torch.tensor([1.0, float("nan")], dtype=torch.float64), "rademacher")


def test_one_kernel_is_in_use_on_each_kind_of_device() -> None:
    found = kernel_status()
    assert found.keys() == KERNELS.keys()
    assert [name for name, remark in found.items() if remark == "in use on cpu"] == [fastest_kernel("cpu").name]
    with pytest.raises(RecipeError, match="need a kernel for 'xpu' devices, and none works"):
        fastest_kernel("xpu")


def test_the_command_says_which_kernel_is_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    list_tables("kernels")
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("in use on cpu") == 1


def test_where_nothing_can_be_kept_a_function_is_translated_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []

    def njit(*, cache: bool = False, **_: Any) -> Any:
        kept.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(portable, "njit", njit)
    assert portable._compiled(len) is len
    assert kept == [True, False]


def test_without_its_source_the_kernel_leaves_the_work_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where only files of Python were copied."""
    monkeypatch.setattr(native, "SOURCE", native.SOURCE.with_name("gone.cpp"))
    for cached in (native._library, load_kernel, fastest_kernel):
        cached.cache_clear()
    try:
        with pytest.raises(CannotCompileError, match=r"^its source .*gone.cpp is missing$"):
            native.NativeKernel()
        assert fastest_kernel("cpu").name == "numba"
    finally:
        for cached in (native._library, load_kernel, fastest_kernel):
            cached.cache_clear()


def test_without_a_compiler_the_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    native._library.cache_clear()
    try:
        with pytest.raises(
            CannotCompileError, match=r"no C\+\+ compiler: none of \$CXX, g\+\+ and clang\+\+ was found"
        ):
            native.NativeKernel()
    finally:
        native._library.cache_clear()


PLANTED = """
#include <stdio.h>
__attribute__((constructor)) static void run() { fclose(fopen(PLACE, "w")); }
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that leaves word of having been loaded, beside itself."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.cpp").write_text(PLANTED)
    words = [f'-DPLACE="{folder}/loaded"', "-shared", "-fPIC", "-o", str(folder / "planted.so"), "planted.cpp"]
    subprocess.run([compiler, *words], cwd=folder, check=True)
    return folder / "planted.so"


@pytest.mark.parametrize("mode", ["file", "folder", "link", "owner"])
def test_a_kernel_in_the_cache_that_may_be_anothers_is_not_loaded(
    mode: str, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS[1:], "-O0"))  # compiles sooner
    native._library.cache_clear()
    try:
        native.NativeKernel()
        (tmp_path / "first").rename(tmp_path / "then")  # a library of a path that is loaded is not loaded again
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "then"))
        (kept,) = (tmp_path / "then" / "raytrain").glob("*.so")
        kept.unlink()
        shutil.copy(planted, kept)
        if mode == "link":
            kept.rename(tmp_path / "elsewhere.so")
            kept.symlink_to(tmp_path / "elsewhere.so")
        if mode == "owner":
            if os.geteuid():
                pytest.skip("only root can give a file to another user")
            os.chown(kept, 12345, -1)
        {"file": kept, "folder": kept.parent}.get(mode, planted).chmod(0o775)
        native._library.cache_clear()
        native.NativeKernel()
    finally:
        native._library.cache_clear()
    assert not planted.with_name("loaded").exists()
    assert (f"other users can write to {kept.parent}" in caplog.text) == (mode == "folder")
