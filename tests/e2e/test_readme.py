"""Every command and every piece of code in the README, and every shipped recipe, with fewer steps."""

import importlib
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytrain.overrides import apply_overrides, parse_overrides
from raytrain.recipe import read_toml
from raytrain.run.rows import read_jsonl
from raytrain.testing import train_here
from raytrain.training.kind import KIND
from raytrain.training.recipe import TrainRecipe

pytestmark = pytest.mark.timeout(1800)  # on a busy machine; alone it takes a fraction

ROOT = Path(__file__).parents[2]
FEWER = ["steps=4", "evaluation.every=2", "log.every=1", "log.loggers=[]", "resources.cpus=1"]
FEWER_OF = {
    "search": ["base.steps=20", "search.interval=10", "search.population=4", "slots=1", "base.log.loggers=[]"],
    "federate": ["rounds=1", "protocol.local_steps=4", "clients.actors=1"],
}
SMALLER = {
    "digits": ["task.widths=[4]"],
    "mine:circle": [],
    "shakespeare-delayed": ["task.width=16", "evaluation.batch=64"],
    "shakespeare-cpu": ["task.width=16", "evaluation.batch=64"],
    "sst2-minilm": ["evaluation.batch=8"],
    "sst2-minilm-zo": ["zo.num_perturbations=2"],
    "stdlib-lm": ["task.width=16", "task.valid=0.002", "task.block=32", "task.stride=32"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Return the commands of the README, each once, however it is spelled and wherever its run goes."""
    in_blocks = [line for block in blocks("sh") for line in block.splitlines()]
    in_tables = re.findall(r"^\| `((?:raytrain|python|make) [^`]*)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    each: dict[str, list[str]] = {}
    for line in [*in_blocks, *in_tables]:
        words = shlex.split(line, comments=True)
        each.setdefault(re.sub(r" --set| --out \S+", "", " ".join(words)), words)
    return list(each.values())


def fewer(words: list[str]) -> list[str]:
    """Return the words with fewer steps, and with this README as the text to learn."""
    if words[0] != "train":
        return [*words, *FEWER_OF.get(words[0], [])]
    if "--resume" in words:
        return [re.sub(r"^steps=.*", "steps=8", word) for word in words]
    words = [re.sub(r"^task.path=.*txt$", f"task.path={ROOT / 'README.md'}", word) for word in words]
    return [*words, *FEWER, *SMALLER[words[1]]]


def check_log(run: Path, name: str, last: int) -> None:
    """Check that a run trained and evaluated as it was told to."""
    log = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in log] == [step for pair in range(1, last, 2) for step in (pair, pair + 1, pair + 1)]
    assert log[0]["loss"] * (-1 if name == "sst2-minilm-zo" else 1) > 0, "it lowers minus a probability"
    assert log[-1]["valid"]["loss"] > 0


def test_every_command_runs(raytrain: Callable[..., Any], workplace: Path) -> None:
    (workplace / "mine.py").write_text(blocks("python")[0])
    for folder in ("sst2", "runs"):
        (workplace / folder).mkdir()
    for name in ("train", "dev"):
        (workplace / "sst2" / f"{name}.tsv").write_text("a fine film\t1\na dull film\t0\n" * 20)
    (workplace / "sentences.txt").write_text("a fine film\nthe plot is dull\n")
    ran = 0
    for program, *words in commands():
        if program == "raytrain":
            before = set((workplace / "runs").iterdir())
            ended = raytrain(*fewer(words))
            assert ended.status == 0, f"raytrain {' '.join(words)}\n{ended.err}"
            if words[0] == "train":
                (run,) = [workplace / words[1]] if "--resume" in words else {*(workplace / "runs").iterdir()} - before
                check_log(run, words[1], 8 if "--resume" in words else 4)
            ran += 1
        elif program == "make":
            subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)
        else:
            assert (ROOT / words[0]).is_file(), f"{words[0]} is not there"  # benchmarks run by name only
    assert ran >= 7


def test_the_first_lines_of_python_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(blocks("python")[1], {})
    assert capsys.readouterr().out.startswith("done {'step': 100, ")


def recipes_without_a_command() -> list[str]:
    trained = {words[2] for words in commands() if words[:2] == ["raytrain", "train"]}
    return sorted({file.stem for file in KIND.recipes.glob("*.toml")} - trained)


@pytest.mark.parametrize("name", recipes_without_a_command())
def test_recipes_that_no_command_trains(name: str, shakespeare: Path, tmp_path: Path) -> None:
    raw, _ = read_toml(name, [KIND.recipes])
    changes = parse_overrides([f"task.path={shakespeare}", *FEWER, *SMALLER[name]])
    run = train_here(TrainRecipe.parse(apply_overrides(raw, changes)), tmp_path / "run")
    assert run.failure() is None
    check_log(run.path, name, 4)


def test_what_the_benchmark_compares_are_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes an hour or more, and should not end in a typing error after those before it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmark"))
    finetune = importlib.import_module("finetune")
    for recipe, changes in finetune.METHODS.values():
        assert finetune.changed(recipe, changes).name == recipe


def test_bringing_your_own_takes_20_lines() -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 20


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link.partition("#")[0]).exists(), link
