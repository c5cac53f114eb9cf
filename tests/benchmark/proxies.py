"""Which zero-cost proxies say how good a language model becomes, and which only how large it is.

    python tests/benchmark/proxies.py

32 transformers (GPT-2 and Llama) and 32 recurrent networks (Elman, GRU and LSTM) of random sizes are trained on bytes,
all by one recipe: tinyshakespeare if `--data` has it, else the source of Python's standard library. Each proxy is
measured on one minibatch before the first step. The table has Kendall's tau-b with the held-out loss at the end, where
-1 is a perfect proxy; and the same with the number of parameters partialled out, where 0 says nothing that the size
does not say: (t_xy - t_xz t_yz) / sqrt((1 - t_xz^2) (1 - t_yz^2)) (Kendall 1942). Intervals are those of the bootstrap
over models, 95 %. A proxy beats the number of parameters if the whole interval of the difference is below 0.
"""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from bench import finish, parse, parser_of
from torch import nn

from raytrain.registry import resolve
from raytrain.tasks.options import TextOptions
from raytrain.tasks.task import Batch, Task
from raytrain.tasks.text import text
from search.chooser import Chooser
from search.proxies.minibatch import Minibatch
from search.searchers.random import RandomSearcher
from search.space import Space
from search.tables import PROXIES

BLOCK, BATCH, RATE, WARMUP = 64, 16, 3e-3, 0.1
MODELS, STEPS = 32, 300
QUICK_MODELS, QUICK_STEPS = 12, 60
HELD_OUT_BATCHES, HELD_OUT_WINDOWS = 4, 64
RESAMPLES = 2000
OF_ATTENTION = ("synaptic-diversity", "head-confidence", "softmax-confidence")
SIZE = "parameters"


def transformer(choose: Chooser) -> dict[str, Any]:
    """Return options of a transformer of the task `text`."""
    heads = choose.ordered("heads", [1, 2, 4])
    width = heads * choose.ordered("head_width", [8, 16, 24])
    return {"model": choose.one_of("model", ["gpt", "llama"]), "layers": choose.int("layers", 1, 5), "heads": heads,
            "width": width}  # fmt: skip


def recurrent(choose: Chooser) -> dict[str, Any]:
    """Return options of a recurrent network of the task `text`."""
    return {"model": choose.one_of("model", ["elman", "gru", "lstm"]), "layers": choose.int("layers", 1, 3),
            "width": choose.int("width", 16, 160, log=True)}  # fmt: skip


FAMILIES = {"transformer": transformer, "recurrent": recurrent}


def task_of(data: Path, **options: Any) -> Task:
    """Return the task on bytes."""
    file = data / "tinyshakespeare" / "input.txt"
    path = file if file.is_file() else None
    return text(TextOptions.model_validate({"name": "text", "path": path, "block": BLOCK, **options}))


def minibatch(task: Task, split: Literal["train", "valid"], count: int, number: int) -> Batch:
    """Return a minibatch of random windows, the same ones for each model."""
    examples = task.data(split)
    places = np.random.default_rng([number, len(split)]).integers(len(examples), size=count)
    return task.collate([examples[int(place)] for place in places])


def train(module: nn.Module, task: Task, steps: int) -> float:
    """Train a model, and return its held-out loss."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.01)
    warmup = max(1, int(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    module.train()
    for step in range(steps):
        optimizer.zero_grad()
        task.losses(module, minibatch(task, "train", BATCH, step)).mean().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    module.eval()
    with torch.no_grad():
        held_out = (minibatch(task, "valid", HELD_OUT_WINDOWS, number) for number in range(HELD_OUT_BATCHES))
        return statistics.mean(float(task.losses(module, each).mean()) for each in held_out)


def proxies_of(family: str, module: nn.Module, batch: Minibatch) -> dict[str, tuple[float, float]]:
    """Return the score and the seconds of each proxy that the model has layers for."""
    found = {}
    for name in PROXIES:
        if family == "transformer" or name not in OF_ATTENTION:
            began = time.process_time()
            score = resolve(PROXIES, name, "proxy")(module, batch)
            found[name] = (score, time.process_time() - began)
    return found


def concordance(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the sign of each difference, shape (n, n)."""
    return np.sign(values[:, None] - values[None, :])


def tau(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Return Kendall's tau-b of two variables, from the signs of their differences."""
    scale = float(np.sqrt((one * one).sum() * (other * other).sum()))
    return float((one * other).sum()) / scale if scale else 0.0


def correlations(proxy: Any, size: Any, loss: Any) -> np.ndarray[Any, Any]:
    """Return tau with the loss, the same without the size, and how much lower the first is than that of the size."""
    raw, with_size, of_size = tau(proxy, loss), tau(proxy, size), tau(size, loss)
    scale = np.sqrt(max((1 - with_size**2) * (1 - of_size**2), 0.0))
    return np.array([raw, (raw - with_size * of_size) / scale if scale else 0.0, raw - of_size])


def row_of(name: str, scores: Sequence[float], sizes: Sequence[float], losses: Sequence[float]) -> dict[str, Any]:
    """Return what the table says of a proxy, over the models where it is finite: a deep Llama can overflow synflow."""
    finite = np.isfinite(scores)
    signs = [concordance(np.array(values)[finite]) for values in (scores, sizes, losses)]
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(RESAMPLES):
        places = rng.integers(finite.sum(), size=finite.sum())
        draws.append(correlations(*(each[np.ix_(places, places)] for each in signs)))
    raw, partial, _ = correlations(*signs)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    own = {"tau": raw, "tau_low": low[0], "tau_high": high[0]}
    beside = {"partial": partial, "partial_low": low[1], "partial_high": high[1], "minus_size_high": high[2]}
    shown = beside if name != SIZE else dict.fromkeys(beside, math.nan)
    return {
        "proxy": name,
        "models": int(finite.sum()),
        **{key: float(value) for key, value in {**own, **shown}.items()},
    }


def measure(family: str, count: int, steps: int, data: Path) -> list[dict[str, Any]]:
    """Train the models of a family, and return the rows of its proxies."""
    task, losses = task_of(data), []
    scores: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for candidate in RandomSearcher(Space(FAMILIES[family]), 0).ask(range(count)):
        module = task_of(data, **candidate.configuration.changes).model(0)
        batch = Minibatch(minibatch(task, "train", BATCH, 0), task.losses)
        for name, (score, took) in proxies_of(family, module, batch).items():
            scores.setdefault(name, []).append(score)
            seconds.setdefault(name, []).append(took)
        losses.append(train(module, task, steps))
        print(f"{family} {dict(candidate.configuration.changes)}: {losses[-1]:.4f}", flush=True)
    return [
        {"family": family, **row_of(name, values, scores[SIZE], losses), "seconds": statistics.mean(seconds[name]),
         "scores": values, "losses": losses}
        for name, values in scores.items()
    ]  # fmt: skip


def headline_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the proxy with the lowest tau in each family, and those that beat the number of parameters."""
    headline: dict[str, Any] = {}
    for family in FAMILIES:
        own = [row for row in rows if row["family"] == family]
        best = min(own, key=lambda row: row["tau"])
        beating = [row["proxy"] for row in own if row["minus_size_high"] < 0]
        telling = [row["proxy"] for row in own if row["partial_high"] < 0]
        size = next(row["tau"] for row in own if row["proxy"] == SIZE)
        headline |= {
            f"{family}_models": len(best["losses"]),
            f"{family}_tau_of_parameters": size,
            f"{family}_best": best["proxy"],
            f"{family}_tau_of_best": best["tau"],
            f"{family}_beat_parameters": ", ".join(beating) or "none",
            f"{family}_tell_more_than_parameters": ", ".join(telling) or "none",
        }
    return headline


def main() -> None:
    """Measure and report."""
    options = parse(parser_of(__doc__.partition("\n")[0]))
    torch.set_num_threads(1)
    count, steps = (QUICK_MODELS, QUICK_STEPS) if options.quick else (MODELS, STEPS)
    rows = [row for family in FAMILIES for row in measure(family, count, steps, options.data)]
    finish("proxies", rows, headline_of(rows), options)


if __name__ == "__main__":
    main()
