"""Fixtures of all tests, and markers from folders."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",  # by 15, Ray's own, workers would starve beside the tests of another process
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    FLWR_TELEMETRY_ENABLED="0",
    HF_HUB_OFFLINE="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    WANDB_ERROR_REPORTING="false",
)

import psutil
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from raytrain.testing_command import Command

# At a desk examples are drawn anew each time; where changes are judged they are few, and the same for each change.
settings.register_profile("patient", deadline=None)  # a busy machine is no failure
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("ci" if os.environ.get("CI") else "patient")

# A shell that starts us in the background has us ignore Ctrl-C, and what we start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data", default=str(ROOT.parent / "shared" / "data"), help="folder of the data sets of the tests"
    )


@pytest.fixture(autouse=True, scope="module")
def collections() -> None:
    """Have garbage collections pass over what is imported by now: each takes a fifth of a second otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def threads() -> None:
    """Fix the number of threads, on which sums depend."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--data"))


@pytest.fixture
def shakespeare(data_folder: Path) -> Path:
    file = data_folder / "tinyshakespeare" / "input.txt"
    if not file.is_file():
        pytest.skip(f"no {file}: name the folder of the data sets with --data=FOLDER")
    return file


@pytest.fixture
def sst2(data_folder: Path) -> Path:
    folder = data_folder / "sst2"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: name the folder of the data sets with --data=FOLDER")
    return folder


@pytest.fixture
def workplace(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """An empty current folder, from which modules can be imported as from a user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    forget_modules(tmp_path_factory.getbasetemp())
    yield tmp_path
    forget_modules(tmp_path)


def forget_modules(folder: Path) -> None:
    """Let what was imported from a folder be imported anew: each test has its own `mine.py`."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(folder):
            del sys.modules[name]


@dataclass(frozen=True)
class SmallDisk:
    """A disk of a few megabytes of its own."""

    path: Path

    def fill(self) -> None:
        """Leave no room; what has begun a page of 4096 bytes can still end it."""
        with (self.path / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(4096))

    def free(self) -> None:
        (self.path / "filler").unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk that can be filled: a tmpfs, which takes the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a full disk needs a small one, and a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield SmallDisk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of this process, which `launch.run` uses as it finds it."""
    from raytrain.launch.forked_processes import fork_ray_processes
    from raytrain.launch.session import cluster_session

    fork_ray_processes()
    with cluster_session(None, cpus=4):
        yield


MARK = "RAYTRAIN_STARTED_BY_TEST"


@contextlib.contextmanager
def ended_with_the_test() -> Iterator[dict[str, str]]:
    """Yield an environment by which all that has it is known, and end what is left of that: Ray outlives its driver."""
    mark = uuid.uuid4().hex
    try:
        yield {**os.environ, MARK: mark}
    finally:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == mark:
                    process.kill()


@pytest.fixture
def start() -> Iterator[Callable[..., "Command"]]:
    """Start the command in a process of its own, as `start(folder, "train", "digits")`."""
    from raytrain.launch.forked_processes import fork_ray_processes
    from raytrain.testing_command import start_command

    fork_ray_processes()
    with ended_with_the_test() as environment:
        yield lambda folder, *words: start_command(words, folder, environment)


@pytest.fixture(scope="session", autouse=True)
def hugging_face_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep out of the user's cache; the libraries read this when they are first imported."""
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        os.environ[name] = str(tmp_path_factory.mktemp(name.lower()))


WORDS = "the a film is was good bad great awful plot acting story and but very question answer what of"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small Hugging Face models with random weights: bert, gpt2, llama, and chat, a llama with ChatML."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    # Weights larger than usual, so that so small a model tells its inputs apart.
    small = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}
    llama = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **small}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(max_position_embeddings=128, **llama)).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64, **small)).save_pretrained(
        folder / "gpt2"
    )
    tokenizer.save_pretrained(folder / "gpt2")
    chat = byte_tokenizer(eos_token="<|im_end|>", pad_token="<pad>", additional_special_tokens=["<|im_start|>"])
    chat.chat_template = CHATML
    small = {"vocab_size": len(chat), "eos_token_id": 0, "initializer_range": 0.2}
    LlamaForCausalLM(LlamaConfig(max_position_embeddings=256, **{**llama, **small})).save_pretrained(folder / "chat")
    chat.save_pretrained(folder / "chat")
    encoder = byte_tokenizer(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = {"vocab_size": len(encoder), "pad_token_id": encoder.pad_token_id, "initializer_range": 0.2}
    bert = BertConfig(max_position_embeddings=64, **size, **small)
    BertModel(bert).save_pretrained(folder / "bert")
    encoder.save_pretrained(folder / "bert")
    return folder


def byte_tokenizer(**special: Any) -> Any:
    """A byte-level BPE tokenizer whose merges are those of a few words; an encoder's puts [CLS] and [SEP] around."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = [name for value in special.values() for name in ([value] if isinstance(value, str) else value)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=names, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 2, trainer)
    if "cls_token" in special:
        ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def raytrain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Call the command inside this process, as `raytrain("train", "digits")`."""
    from raytrain.cli.main import main

    def call(*words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["raytrain", *words])
        monkeypatch.setattr(sys, "path", list(sys.path))  # the command adds the current folder
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return Ended(int(ended.value.code or 0), shown.out, shown.err)

    return call


@pytest.fixture(scope="session")
def changed_rows() -> Callable[[str], st.SearchStrategy[str]]:
    """Changes some rows of a ``.jsonl`` file: fields are renamed or hold something else, lines are cut or odd."""
    scalars = (
        st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats(allow_nan=False) | st.text(max_size=3)
    )
    values = scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.text(max_size=2), scalars, max_size=2)

    @st.composite
    def changed(draw: st.DrawFn, text: str) -> str:
        lines = text.strip().splitlines()
        for place in draw(st.lists(st.sampled_from(range(len(lines))), max_size=2, unique=True)):
            row = json.loads(lines[place])
            inside = draw(st.sampled_from([row, *(value for value in row.values() if isinstance(value, dict))]))
            for name in draw(st.lists(st.sampled_from(sorted(inside)), max_size=2, unique=True)) if inside else ():
                renamed = draw(st.booleans())
                value = inside.pop(name)
                inside[f"{name}x" if renamed else name] = value if renamed else draw(values)
            lines[place] = draw(st.sampled_from([json.dumps(row)] * 4 + ["", "null", lines[place][:9]]))
        return "\n".join(lines) + "\n"

    return changed
