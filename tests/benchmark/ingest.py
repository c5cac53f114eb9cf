"""How long training waits for its data: a file, a data set of the hub's kind, Ray Data, and generator actors.

    python tests/benchmark/ingest.py

Each row is a run of `raytrain train` with one worker on one thread, whose source has one actor on another processor:
samples per second through the loop, and the share of its time that the loop waited for data (`data_wait_seconds` of
`result.json`). The model is that of the recipe shakespeare-cpu. Beside it stands what the source gives when nothing is
trained, after what it had prepared ahead is used up.

The file is the source text of the standard library, held in memory. The data set of the hub's kind has the same text as
rows of an Arrow file, that `datasets` maps into memory; each is tokenised when it is read, by a BPE of 512 tokens. The
generator draws its text from the bigrams of a sentence.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import arguments, finish

from raytrain.data import corpus
from raytrain.overrides import apply_overrides
from raytrain.recipe import AbsolutePath
from raytrain.tasks.task import Task
from raytrain.tasks.text import TextOptions, Window, _collate, _losses, _model
from raytrain.training.build import build_task
from raytrain.training.loader import BatchLoader, StepRange, local_loader
from raytrain.training.recipe import TrainRecipe

BATCH, BLOCK, ROW_BYTES = 12, 64, 2000
MODEL = {"model": "gpt", "layers": 4, "heads": 4, "width": 128, "block": BLOCK, "valid": 0.002}
SETTINGS = {
    "batch": BATCH, "optimizer.lr": 1e-3, "evaluation.every": 0, "checkpoint.every": 0, "resources.cpus": 1,
    **{f"task.{name}": value for name, value in MODEL.items()},
}  # fmt: skip
SOURCES = {
    "file": {"task.name": "text"},
    "hub": {"task.name": "ingest:hub"},
    "file, Ray Data": {"task.name": "text", "task.source": "ray"},
    "hub, Ray Data": {"task.name": "ingest:hub", "task.source": "ray"},
    "generators": {"task.name": "text", "task.source": "ingest:generate"},
}


class HubOptions(TextOptions):
    """The options of `hub`.

    Attributes:
        rows: the folder that `build` has filled.
    """

    rows: AbsolutePath


def build(folder: Path) -> None:
    """Write the data set and its tokenizer."""
    from datasets import Dataset
    from tokenizers import ByteLevelBPETokenizer

    text = "".join(document.text.decode(errors="replace") for document in corpus.standard_library())
    rows = [text[start : start + ROW_BYTES] for start in range(0, len(text) - ROW_BYTES, ROW_BYTES)]
    Dataset.from_dict({"text": rows}).save_to_disk(str(folder / "data"))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(rows[:500], vocab_size=512, show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))


class Rows:
    """The data set's first tokens of each row, as windows of the task `text`."""

    def __init__(self, folder: Path) -> None:
        from datasets import load_from_disk
        from tokenizers import Tokenizer

        self._rows = load_from_disk(str(folder / "data"))
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Window:
        """Return row `index`, tokenised now."""
        tokens = self._tokenizer.encode(self._rows[index]["text"]).ids
        return np.array(tokens[: BLOCK + 1], np.uint16), 0


def hub(options: HubOptions) -> Task:
    """Return the task of predicting the next token of a data set's rows."""

    def data(split: str) -> Any:
        rows = Rows(options.rows)
        return rows if split == "train" else [rows[index] for index in range(BATCH)]

    return Task(model=lambda seed: _model(options, 512, seed), data=data, losses=_token_losses, collate=_collate)


def _token_losses(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return _losses(module, batch).view(len(batch["inputs"]), -1).mean(dim=1)


def generate(seed: int) -> Iterator[Window]:
    """Yield windows of random text in which each letter follows the last as somewhere in a sentence."""
    draw = np.random.default_rng(seed)
    letters = np.frombuffer(b"a simulator makes examples while the model trains on those it made before ", np.uint8)
    follow = {letter: letters[1:][letters[:-1] == letter] for letter in np.unique(letters)}
    while True:
        window = np.empty(BLOCK + 1, np.uint16)
        letter = letters[0]
        for place, number in enumerate(draw.integers(1 << 30, size=BLOCK + 1)):
            letter = follow[letter][number % len(follow[letter])]
            window[place] = letter
        yield window, 0


def changes(source: str, rows: Path) -> dict[str, Any]:
    """Return the changes to a recipe that make it one of this source."""
    more = {"task.rows": str(rows)} if source.startswith("hub") else {}
    return {**SETTINGS, **SOURCES[source], **more}


def trained(source: str, rows: Path, steps: int) -> dict[str, float]:
    """Train, and return samples per second and the share of the time that the loop waited for data."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, out = Path(folder) / "recipe.toml", Path(folder) / "run"
        recipe.write_text("")
        words = [f"{field}={value}" for field, value in {**changes(source, rows), "steps": steps}.items()]
        command = [sys.executable, "-m", "raytrain", "train", str(recipe), *words, "--out", str(out)]
        ended = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(f"{source}: {ended.stderr}")
        result = json.loads((out / "result.json").read_text())
    seconds = result["seconds"]
    return {
        "samples_per_second": result["figures"]["samples"] / seconds,
        "stall_share": result["figures"]["data_wait_seconds"] / seconds,
        "seconds": seconds,
    }


def pulled(source: str, rows: Path, seconds: float) -> float:
    """Return how many samples per second the source gives, from when it has nothing prepared ahead."""
    settings = TrainRecipe.parse(apply_overrides({"kind": "train"}, changes(source, rows)))
    walk = StepRange(seed=0, rank=0, first_position=0, stride=BATCH, steps=1 << 20, local_batch=BATCH, accumulate=1)
    with opened(settings, walk) as feed:
        step, began, before = 0, time.perf_counter(), 0
        while (now := time.perf_counter()) < began + 2 * seconds:
            if not before and now > began + seconds:
                middle, before = now, step
            feed.load(walk.position(step), BATCH, 1)
            step += 1
        return BATCH * (step - before) / (time.perf_counter() - middle)


def opened(settings: TrainRecipe, walk: StepRange) -> AbstractContextManager[BatchLoader]:
    """Return the feed of a recipe."""
    if settings.task.source.name == "local":
        return local_loader(build_task(settings), settings.task, walk)
    from raytrain.launch.ingest import ray_loader

    return partial(ray_loader, actors=1, cpus=1, restarts=0)(build_task(settings), settings.task, walk)


def pull_all(rows: Path, seconds: float) -> dict[str, float]:
    """Return what each source gives when nothing is trained."""
    from raytrain.launch.session import cluster_session

    torch.set_num_threads(1)
    with cluster_session(None, cpus=2):
        return {source: pulled(source, rows, seconds) for source in SOURCES}


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__.partition("\n")[0])
    os.environ["OMP_NUM_THREADS"] = "1"
    table = []
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        alone = [sys.executable, __file__, "--pull", folder, "3" if options.quick else "6"]
        pure = json.loads(subprocess.run(alone, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(pure, flush=True)
        for source in SOURCES:
            figures = trained(source, Path(folder), 300 if options.quick else 1500)
            table.append({"source": source, **figures, "samples_per_second_without_training": pure[source]})
            print(table[-1], flush=True)
    shares = {row["source"]: row["stall_share"] for row in table}
    headline = {
        "stall_share_file": shares["file"],
        "stall_share_ray_data": shares["hub, Ray Data"],
        "stall_share_hub": shares["hub"],
        "stall_share_file_ray_data": shares["file, Ray Data"],
        "stall_share_generators": shares["generators"],
    }
    finish("ingest", table, headline, options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--pull"]:
        print(json.dumps(pull_all(Path(sys.argv[2]), float(sys.argv[3]))))
    else:
        main()
