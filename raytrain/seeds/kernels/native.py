"""The fast CPU kernel in C++, compiled on first use, for CPUs with AVX2 and F16C."""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from raytrain.errors import RaytrainError
from raytrain.files import is_private
from raytrain.seeds.kernels.kernel import ScaledDirection
from raytrain.seeds.prng import COS, LOG, SIN, Distribution

SOURCE = Path(__file__).with_name("native.cpp")
# -ffp-contract=off: a fused multiply-add would round once where prng.py rounds twice.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared", "-nostartfiles")
COMPILE_SECONDS = 120
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

logger = logging.getLogger(__name__)

_U64, _I64, _INT, _FLOAT, _POINTER = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_void_p


class CannotCompileError(RaytrainError):
    """There is no compiler, it fails, or the CPU lacks an instruction set that the kernel needs."""


class NativeKernel:
    """Philox and table look-ups with AVX2, on as many threads as torch uses.

    Raises:
        CannotCompileError: it cannot be compiled or run here; the message says why.
    """

    name = "native"
    device = "cpu"
    dtypes = frozenset(TYPES)

    def __init__(self) -> None:
        self._library = _library()

    def accumulate(
        self, distribution: Distribution, seeds: Tensor, weights: Tensor, parameter_id: int, offset: int, out: Tensor
    ) -> None:
        """Accumulate into `out`; see `Kernel.accumulate`."""
        terms = (seeds.data_ptr(), len(seeds), weights.data_ptr(), len(weights))
        span = (parameter_id, offset, out.shape[1])
        self._library.seeds_sums(
            int(distribution == "gaussian"), *terms, *span, out.data_ptr(), torch.get_num_threads()
        )

    def axpy(self, direction: ScaledDirection, base: Tensor, out: Tensor, rows: Tensor | None = None) -> None:
        """Write to `out`; see `Kernel.axpy`."""
        if not out.numel():
            return
        if rows is not None and rows.dtype != torch.int64:
            raise TypeError(f"rows: expected torch.int64; got {rows.dtype}")
        distribution, *rest = direction
        self._library.seeds_move(
            int(distribution == "gaussian"),
            TYPES[base.dtype],
            *rest,
            base.numel() if rows is None else base[0].numel(),
            None if rows is None else rows.data_ptr(),
            0 if rows is None else len(rows),
            base.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )


@cache
def _library() -> ctypes.CDLL:
    """Return the compiled kernel, cached per user by source, compiler and CPU."""
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise CannotCompileError("no C++ compiler: none of $CXX, g++ and clang++ was found")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise CannotCompileError("the processor has no AVX2")
    command = [compiler, *FLAGS, *_defined("LOG", LOG), *_defined("SIN", SIN), *_defined("COS", COS)]
    if not SOURCE.is_file():  # for example where only Python files were copied
        raise CannotCompileError(f"its source {SOURCE} is missing")
    key = [_version(compiler), _processor(), *command, SOURCE.read_text()]
    name = f"seeds-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    try:
        return _typed(_loaded(command, name))
    except (OSError, RuntimeError) as error:  # the latter where there is no home folder
        raise CannotCompileError(f"the compiled kernel cannot be cached or loaded: {error}") from error


def _loaded(command: Sequence[str], name: str) -> ctypes.CDLL:
    """Load the kernel from the cache, unless another user can write there and so run code here."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raytrain"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_private(folder):
        logger.warning(
            "other users can write to %s, so the kernel cached there is not used; run chmod go-w on it", folder
        )
        with tempfile.TemporaryDirectory() as own:
            return _compiled(command, Path(own) / name)
    kept = folder / name
    return ctypes.CDLL(str(kept)) if kept.is_file() and is_private(kept) else _compiled(command, kept)


def _compiled(command: Sequence[str], target: Path) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        try:
            subprocess.run(
                [*command, "-o", str(made), str(SOURCE)],
                check=True,
                capture_output=True,
                text=True,
                timeout=COMPILE_SECONDS,
            )
        except subprocess.CalledProcessError as error:
            raise CannotCompileError(f"{command[0]} refuses {SOURCE.name}: {error.stderr.strip()[:400]}") from error
        except subprocess.TimeoutExpired as error:
            raise CannotCompileError(f"{command[0]} took more than {COMPILE_SECONDS} s") from error
        made.chmod(0o700)
        made.replace(target)  # atomic: another process may load it at the same time
    return ctypes.CDLL(str(target))


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare argument types; without them ctypes would truncate 64-bit integers."""
    span = [_U64, _I64, _I64]
    library.seeds_sums.argtypes = [_INT, _POINTER, _I64, _POINTER, _I64, *span, _POINTER, _INT]
    library.seeds_move.argtypes = [_INT, _INT, _U64, _FLOAT, *span, _POINTER, _I64, _POINTER, _POINTER, _INT]
    library.seeds_sums.restype = library.seeds_move.restype = None
    return library


def _defined(name: str, coefficients: Sequence[float]) -> list[str]:
    return [f"-D{name}_COEFFICIENTS={','.join(f'{value!r}f' for value in coefficients)}"]


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], check=False, capture_output=True, text=True).stdout


def _processor() -> str:
    """Return the CPU's features: machines with different CPUs may share a cache in a home folder."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line for line in lines if line.startswith("flags")), "")
