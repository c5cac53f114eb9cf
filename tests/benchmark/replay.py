"""How fast many seeds are added up: w0 + sum over k of a_k z(seed_k), against the loops that others have.

    python tests/benchmark/replay.py

16.8M parameters, 4,096 seeds. What is too slow to run whole is timed on a slice, which the table names: kernels on a
slice of the parameters with all the seeds, since each element is made of all seeds at once; torch's loops on all
parameters with some of the seeds, since each seed is one pass over memory. Rates are element-seeds per second, the
median of interleaved rounds. With a GPU the same runs there, beside the share of what its arithmetic could do.

* materialise: a whole model of such a slice by the fastest kernel, which is read, added to, rounded and written.
* torch best: z.normal_() into a buffer that is kept, w.add_(z, alpha=a), the faster of one thread and all.
* papers: for each tensor and seed a new torch.normal, times the number, added.
"""

import statistics
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from bench import finish, parse, parser_of

from raytrain.errors import RaytrainError
from raytrain.seeds.directions import Directions
from raytrain.seeds.kernels.kernel import Kernel, load_kernel, quantise, seeds_tensor
from raytrain.seeds.prng import Distribution, parameter_id
from raytrain.seeds.updates import materialise

PARAMETERS = 1 << 24
SEEDS = 4096
TENSORS = 16
MODES: tuple[Distribution, ...] = ("rademacher", "gaussian")
PARTS: dict[str, dict[Distribution, int]] = {
    "native": {"rademacher": 4, "gaussian": 64},
    "numba": {"rademacher": 16, "gaussian": 64},
}
"""Which part of the parameters a kernel of the CPU is timed on."""

GPU_OPERATIONS = 64  # 32-bit integer operations of a multiprocessor and cycle, as of Hopper
SIGN_OPERATIONS = 1.5 + 60 / 128  # of one sign: a masked add for each weight, and its share of a Philox block

Run = Callable[[], None]
Case = tuple[dict[str, Any], float, Run]
"""(what it is, element-seeds, what makes them)."""


def sums(kernel: Kernel, mode: Distribution, count: int, device: str, seeds: int = SEEDS) -> Case:
    """Return the case of a kernel."""
    drawn = seeds_tensor(range(seeds), device)
    weights = quantise(torch.randn(1, seeds, dtype=torch.float64), mode)[0].to(device)
    out = torch.zeros(1, count, dtype=torch.int64, device=device)

    def run() -> None:
        kernel.accumulate(mode, drawn, weights, parameter_id("w"), 0, out)
        if device != "cpu":
            torch.cuda.synchronize()

    about = {"what": f"{kernel.name} {mode}", "parameters": count, "seeds": seeds}
    return about, count * seeds, run


def models(kernel: Kernel, mode: Distribution, count: int, device: str, seeds: int = SEEDS) -> Case:
    """Return the case of a model that is made of its coefficients."""
    space = Directions.of({"w": torch.zeros(count, device=device)}, mode, kernel=kernel)
    coefficients, out = torch.randn(seeds, dtype=torch.float64), [torch.empty(count, device=device)]

    def run() -> None:
        materialise(space, coefficients, range(seeds), out)
        if device != "cpu":
            torch.cuda.synchronize()

    return {"what": f"materialise {mode}", "parameters": count, "seeds": seeds}, count * seeds, run


def torch_loop(parameters: int, seeds: int, device: str) -> Case:
    """Return the case of the best loop of plain torch."""
    w, z = torch.zeros(parameters, device=device), torch.empty(parameters, device=device)
    generator = torch.Generator(device)

    def run() -> None:
        for seed in range(seeds):
            z.normal_(generator=generator.manual_seed(seed))
            w.add_(z, alpha=0.1)
        if device != "cpu":
            torch.cuda.synchronize()

    return {"what": "torch, in place", "parameters": parameters, "seeds": seeds}, parameters * seeds, run


def papers_loop(parameters: int, seeds: int, device: str) -> Case:
    """Return the case of the loop that the papers' code has."""
    tensors = [torch.zeros(parameters // TENSORS, device=device) for _ in range(TENSORS)]

    def run() -> None:
        for seed in range(seeds):
            torch.manual_seed(seed)
            for place, w in enumerate(tensors):
                z = torch.normal(mean=0, std=1, size=w.shape, dtype=w.dtype, device=device)
                tensors[place] = w - 0.1 * (0.3 * z + 0.0 * w)
        if device != "cpu":
            torch.cuda.synchronize()

    return {"what": "torch, as the papers", "parameters": parameters, "seeds": seeds}, parameters * seeds, run


def timed(cases: list[tuple[Case, int]], rounds: int) -> list[dict[str, Any]]:
    """Return a row for each case with its threads: rates in billions per second."""
    seconds: list[list[float]] = [[] for _ in cases]
    for turn in range(rounds + 1):
        for ((_, _, run), threads), found in zip(cases, seconds, strict=True):
            torch.set_num_threads(threads)
            started = time.perf_counter()
            run()
            if turn:  # the first one compiles and allocates
                found.append(time.perf_counter() - started)
    rows = []
    for ((about, work, _), threads), found in zip(cases, seconds, strict=True):
        rates = [work / one / 1e9 for one in found]
        spread = {"G/s": statistics.median(rates), "low": min(rates), "high": max(rates)}
        rows.append({**about, "threads": threads, **spread})
    return rows


def megahertz() -> float:
    """Return the highest clock of the first GPU."""
    ask = ["nvidia-smi", "--id=0", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    return float(subprocess.run(ask, capture_output=True, text=True, check=True).stdout)


def kernels(device: str) -> list[Kernel]:
    """Return the kernels that are here for a device."""
    found = []
    for name in ("native", "numba") if device == "cpu" else ("triton",):
        try:
            found.append(load_kernel(name))
        except RaytrainError as error:
            print(f"{name} is not here: {error}")
    return found


def cases_of(device: str, found: list[Kernel], quick: int) -> list[tuple[Case, int]]:
    """Return what is timed on one kind of device, `quick` times less of it, each with a number of threads."""
    gpu = device != "cpu"
    cases: list[tuple[Case, int]] = []
    for count in [1] if gpu else sorted({1, torch.get_num_threads()}):
        for kernel, mode in product(found, MODES):
            size = PARAMETERS // (1 if gpu else PARTS[kernel.name][mode]) // quick
            cases.append((sums(kernel, mode, size, device), count))
            if kernel is found[0]:
                cases.append((models(kernel, mode, size, device), count))
        cases.append((torch_loop(PARAMETERS, 8 // (quick // 2 or 1), device), count))
        cases.append((papers_loop(PARAMETERS, 4 // (quick // 4 or 1), device), count))
    return cases


def on(device: str, options: Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return the rows and the headline of one kind of device."""
    gpu, found = device != "cpu", kernels(device)
    cases = cases_of(device, found, 8 if options.quick else 1)
    rows = timed(cases, 3 if options.quick else 5)
    best = {what: max(row["G/s"] for row in rows if row["what"] == what) for what in {row["what"] for row in rows}}
    plain, papers = best["torch, in place"], best["torch, as the papers"]
    headline: dict[str, float] = {}
    for kernel in found:
        prefix = "gpu_" if gpu else "" if kernel is found[0] else f"{kernel.name}_"
        signs = best[f"{kernel.name} rademacher"]
        headline[f"{prefix}rademacher_over_best_torch"] = signs / plain
        headline[f"{prefix}rademacher_over_papers_loop"] = signs / papers
        headline[f"{prefix}gaussian_over_best_torch"] = best[f"{kernel.name} gaussian"] / plain
        if kernel is found[0]:
            headline[f"{prefix}materialise_over_best_torch"] = best["materialise rademacher"] / plain
        of = {row["threads"]: row["G/s"] for row in rows if row["what"] == f"{kernel.name} rademacher"}
        if len(of) > 1:
            headline[f"{prefix}two_core_scaling"] = of[max(of)] / of[1]
        if gpu:
            processors = torch.cuda.get_device_properties(0).multi_processor_count
            limit = processors * GPU_OPERATIONS * megahertz() * 1e6 / SIGN_OPERATIONS / 1e9
            headline["gpu_share_of_arithmetic_limit"] = signs / limit
    for row in rows:
        row["over torch"] = row["G/s"] / plain
    return rows, headline


def main() -> None:
    """Time all, and report."""
    parser = parser_of(__doc__.partition("\n")[0])
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--devices", nargs="+", choices=devices, default=devices)
    options = parse(parser)
    rows, headline = [], {}
    for device in options.devices:
        more, also = on(device, options)
        rows, headline = rows + more, headline | also
    finish("replay", rows, headline, options)


if __name__ == "__main__":
    main()
