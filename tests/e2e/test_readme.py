"""Every command and every piece of code in the README, with fewer steps."""

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(1800)  # on a busy machine; alone it takes a fraction

ROOT = Path(__file__).parents[2]
FEWER = {
    "digits": ["steps=6", "task.widths=[4]"],
    "mine:circle": ["steps=6"],
    "shakespeare-co2": ["steps=9", "task.width=16", "evaluation.batch=64"],
    "shakespeare-cpu": ["steps=3", "task.width=16", "evaluation.batch=64"],
    "sst2-minilm": ["steps=2", "evaluation.batch=8"],
    "sst2-minilm-zo": ["steps=2", "directions.count=2"],
    "stdlib-lm": ["steps=3", "task.width=16", "task.valid=0.002", "task.block=32", "task.stride=32"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    in_blocks = [line for block in blocks("sh") for line in block.splitlines()]
    in_tables = re.findall(r"^\| `((?:raytrain|python|make) [^`]*)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    each = dict.fromkeys(tuple(shlex.split(line, comments=True)) for line in [*in_blocks, *in_tables])
    return [list(words) for words in each]


def fewer(words: list[str]) -> list[str]:
    """Return the words with fewer steps, and with this README as the text to learn."""
    if words[0] != "train":
        return words
    words = [re.sub(r"^task.path=.*txt$", f"task.path={ROOT / 'README.md'}", word) for word in words]
    steps = [] if "--resume" in words else FEWER[words[1]]
    return [*words, *steps, "log.to=[]", "resources.cpus=1"]


def test_every_command_runs(ray_cluster: None, raytrain: Callable[..., Any], workplace: Path) -> None:
    (workplace / "mine.py").write_text(blocks("python")[0])
    (workplace / "sst2").mkdir()
    for name in ("train", "dev"):
        (workplace / "sst2" / f"{name}.tsv").write_text("a fine film\t1\na dull film\t0\n" * 20)
    (workplace / "sentences.txt").write_text("a fine film\nthe plot is dull\n")
    ran = 0
    for program, *words in commands():
        if program == "raytrain":
            ended = raytrain(*fewer(words))
            assert ended.status == 0, f"raytrain {' '.join(words)}\n{ended.err}"
            ran += 1
        elif program == "make":
            subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)
        else:
            assert (ROOT / words[0]).is_file(), f"{words[0]} is not there"  # benchmarks run by name only
    assert ran >= 7


def test_bringing_your_own_takes_20_lines() -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 20


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link.partition("#")[0]).exists(), link
