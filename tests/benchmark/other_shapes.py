"""What a member of a population gains from a donor of another shape: its weights in part, or its outputs.

    python tests/benchmark/other_shapes.py

A donor (64-32-10, digits) is trained for a while; then a child of another shape trains for the steps that are left, and
is judged by its loss on the test split. It starts

* new,
* with the leading block of each weight that both shapes have, as `other_shapes = "overlap"` does,
* new, and takes its first steps on the divergence from the donor's outputs in place of the loss (distillation, as
  between the generations of Wan et al. 2022, arXiv 2207.09405), or on the mean of the two.

(a) 30 % of the training labels are wrong; SGD with momentum. (b) Clean labels; AdamW.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bench import finish, parse, parser_of
from digit_stack import BATCH, Digits, load
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

DONOR = (32,)
CHILDREN = ((64,), (16,), (32, 32))
LENGTHS = ((200, 400), (800, 1000))
"""(steps of the donor, steps of donor and child together)"""
WRONG = 0.3
DISTILLED: dict[str, tuple[int, float]] = {"distil 50": (50, 1.0), "distil 100": (100, 1.0), "half distil": (1000, 0.5)}
"""Name -> (steps with a teacher, its share of the loss)."""


def network(widths: Sequence[int], seed: int) -> nn.Module:
    """Return new weights."""
    torch.manual_seed(seed)
    sizes = (64, *widths)
    layers = [
        part for inner, outer in zip(sizes, widths, strict=False) for part in (nn.Linear(inner, outer), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))


def train(
    module: nn.Module,
    digits: Digits,
    steps: range,
    seed: int,
    *,
    adam: bool,
    teacher: nn.Module | None = None,
    distilled: tuple[int, float] = (0, 0.0),
) -> None:
    """Train in place, with a new optimizer; the first steps with a share of the loss from a teacher."""
    parameters = module.parameters()
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
        if adam
        else torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)
    )
    inputs, labels = digits.train
    for step in steps:
        generator = torch.Generator().manual_seed(seed * 100_003 + step)
        batch = torch.randint(len(labels), (BATCH,), generator=generator)
        outputs = module(inputs[batch])
        loss = cross_entropy(outputs, labels[batch])
        if teacher is not None and step - steps.start < distilled[0]:
            with torch.no_grad():
                wanted = log_softmax(teacher(inputs[batch]), dim=1)
            divergence = kl_div(log_softmax(outputs, dim=1), wanted, log_target=True, reduction="batchmean")
            loss = distilled[1] * divergence + (1 - distilled[1]) * loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def overlay(child: nn.Module, donor: nn.Module) -> None:
    """Copy the leading block of each weight, by name, where it has as many dimensions."""
    weights = dict(donor.named_parameters())
    for name, weight in child.named_parameters():
        if name in weights and weights[name].dim() == weight.dim():
            block = tuple(map(slice, map(min, weight.shape, weights[name].shape)))
            weight[block] = weights[name][block]


@torch.no_grad()
def test_loss(module: nn.Module, digits: Digits) -> float:
    """Return the loss on the test split."""
    inputs, labels = digits.test
    return float(cross_entropy(module(inputs), labels))


def losses(widths: Sequence[int], lengths: tuple[int, int], seed: int, *, adam: bool) -> dict[str, float]:
    """Return the loss of the donor where the child begins, and of each child."""
    digits, (begin, end) = load(seed, 0.0 if adam else WRONG), lengths
    donor = network(DONOR, seed)
    train(donor, digits, range(begin), seed, adam=adam)
    found = {"donor": test_loss(donor, digits)}
    for name, distilled in {"new": (0, 0.0), "overlap": (0, 0.0), **DISTILLED}.items():
        child = network(widths, 1000 + seed)
        if name == "overlap":
            overlay(child, donor)
        train(child, digits, range(begin, end), seed, adam=adam, teacher=donor, distilled=distilled)
        found[name] = test_loss(child, digits)
    return found


def row_of(each: Sequence[Mapping[str, float]], name: str) -> dict[str, Any]:
    """Return the mean loss, and by how much it is below that of new weights, with the half width of its interval."""
    gains = [one["new"] - one[name] for one in each]
    half = 1.96 * statistics.stdev(gains) / math.sqrt(len(gains))
    loss = statistics.mean(one[name] for one in each)
    return {"start": name, "test_loss": loss, "gain": statistics.mean(gains), "half_width_95": half}


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, help="by default 20, or 4 with --quick")
    options = parse(parser)
    torch.set_num_threads(1)
    seeds, rows = range(options.seeds or (4 if options.quick else 20)), []
    for adam in (False, True):
        for lengths in LENGTHS[:1] if options.quick else LENGTHS:
            for widths in CHILDREN:
                each = [losses(widths, lengths, seed, adam=adam) for seed in seeds]
                about = {"labels": "clean" if adam else "30 % wrong", "child": str(widths), "donor_steps": lengths[0]}
                rows += [{**about, **row_of(each, name)} for name in each[0]]
                print(*rows[-len(each[0]) :], sep="\n", flush=True)
    finish("other_shapes", rows, {}, options)


if __name__ == "__main__":
    main()
