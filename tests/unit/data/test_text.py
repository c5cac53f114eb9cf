import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.data import corpus
from raytrain.data.collate import IGNORE_INDEX
from raytrain.data.corpus import ByteTokenizer, CharacterTokenizer, Document
from raytrain.errors import RecipeError
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.tasks.text import TextExamples, TextOptions, _collate, text
from raytrain.training.evaluation import evaluate

texts = st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4)


def documents(contents: list[bytes]) -> list[Document]:
    return [Document(f"{place}.py", content, ((0, f"package{place}"),)) for place, content in enumerate(contents)]


@settings(deadline=None)
@given(texts, st.integers(2, 12), st.integers(1, 12))
def test_held_out_windows_score_every_byte_once_with_its_own_past(
    contents: list[bytes], block: int, stride: int
) -> None:
    stride = min(stride, block)
    examples = TextExamples(documents(contents), ByteTokenizer(), block, stride)
    scored = []
    for place in range(len(examples)):
        tokens, unscored = examples[place]
        assert len(tokens) <= block + 1
        begin = tokens == ByteTokenizer.bos_id
        assert not begin[1:].any(), "a window crosses into another document"
        scored.append(tokens[unscored + 1 :])
        if not begin[0]:
            assert len(tokens) == block + 1, "a window that does not begin its document has all the past it can"
            assert unscored >= block - stride
    assert np.concatenate(scored).tolist() == list(b"".join(contents))


@settings(deadline=None)
@given(texts, st.integers(2, 12))
def test_training_windows_start_at_every_token(contents: list[bytes], block: int) -> None:
    examples = TextExamples(documents(contents), ByteTokenizer(), block, 0)
    stream = [token for content in contents for token in (256, *content)] + [256]
    assert len(examples) == max(0, len(stream) - block)
    assert [examples[place][0].tolist() for place in range(len(examples))] == [
        stream[place : place + block + 1] for place in range(len(examples))
    ]


def test_batches_are_shifted_padded_and_marked() -> None:
    batch = _collate([(np.array([5, 6, 7, 8], np.uint16), 1), (np.array([1, 2], np.uint16), 0)])
    assert batch["inputs"].tolist() == [[5, 6, 7], [1, 0, 0]]
    assert batch["targets"].tolist() == [[IGNORE_INDEX, 7, 8], [2, IGNORE_INDEX, IGNORE_INDEX]]


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=20, alphabet=st.characters(codec="utf-8")), min_size=1, max_size=3))
def test_characters_are_encoded_and_counted(contents: list[str]) -> None:
    written = documents([content.encode() for content in contents])
    characters = CharacterTokenizer(corpus.alphabet_of(written))
    alphabet = sorted(set("".join(contents)))
    assert characters.vocab_size == len(alphabet) + 1
    for document, content in zip(written, contents, strict=True):
        tokens = characters.encode(document)
        assert tokens[0] == characters.bos_id
        assert "".join(alphabet[token] for token in tokens[1:]) == content
        assert characters.bytes_per_token()[tokens].sum() == len(document.text)
        assert characters.count(document.text) == len(content)


def test_the_standard_library_is_split_by_file_and_the_same_everywhere() -> None:
    whole = corpus.standard_library()
    parts = corpus.split_corpus(whole, 0.1)
    train, valid = ({document.name for document in parts[split]} for split in ("train", "valid"))
    assert not train & valid
    assert train | valid == {document.name for document in whole}
    assert len(valid) == round(0.1 * len(whole))
    # A file's place depends on its own name: without other files, what was held out still is.
    some = [document for document in whole if document.name in valid or document.name < "c"]
    assert {document.name for document in corpus.split_corpus(some, len(valid) / len(some))["valid"]} == valid
    assert not any("test" in Path(name).parts for name in train | valid)
    assert {"asyncio", "json", "argparse"} <= {document.domains[0][1] for document in whole}


PLAY = b"First Citizen:\nBefore we proceed.\n\nAll:\nSpeak, speak.\n\nFirst Citizen:\nYou are all resolved to die?\n"


@pytest.mark.parametrize("tokens", ["bytes", "chars"])
def test_the_domains_of_a_play_are_its_speakers(tmp_path: Path, tokens: str) -> None:
    (tmp_path / "play.txt").write_bytes(PLAY.replace(b"speak.", "spéak.".encode()))
    task = text(TextOptions(name="text", path=tmp_path / "play.txt", tokens=tokens, block=4))
    train = task.data("train")
    speakers = [train.domain(place) for place in range(len(train))]
    content = (tmp_path / "play.txt").read_text()
    assert speakers[0] == speakers[1] == "First Citizen"
    # Token 0 begins the document, so token n is character n - 1.
    begin = len((content if tokens == "chars" else content.encode().decode("latin-1"))[: content.index("All:")])
    assert speakers[begin] == "First Citizen"
    assert speakers[begin + 1] == "All"
    assert {train.label(place) for place in range(len(train))} == {0, 1}
    valid = task.data("valid")
    assert valid.domain(0) == "First Citizen"


def test_a_folder_is_split_by_file_and_its_domains_are_its_folders(tmp_path: Path) -> None:
    for name in ("a/one.txt", "a/two.txt", "b/three.txt", "four.txt", ".hidden/x.txt", "a/empty.txt", "b/skip.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else f"some text of {name}")
    found = corpus.read_corpus(tmp_path, "**/*.txt")
    assert [document.name for document in found] == ["a/one.txt", "a/two.txt", "b/three.txt", "four.txt"]
    assert [document.domains for document in found] == [((0, "a"),), ((0, "a"),), ((0, "b"),), ((0, "four"),)]
    parts = corpus.split_corpus(found, 0.3)
    assert (len(parts["train"]), len(parts["valid"])) == (3, 1)


@given(st.text(min_size=2, max_size=30, alphabet="aé漢😀"), st.floats(0.1, 0.9))
def test_a_single_file_is_never_cut_inside_a_character(content: str, share: float) -> None:
    parts = corpus.split_corpus([Document("x", content.encode(), ((0, "x"),))], share)
    assert parts["train"][0].text.decode() + parts["valid"][0].text.decode() == content


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"^task.path: no such file or folder: .*corpus$"),
        (lambda path: path.write_bytes(b""), r"^task.path: there is no text at .*corpus$"),
        (
            lambda path: path.mkdir(),
            r"^task.path: there is no text at .*corpus in files that match task.pattern = '\*\*/\*'$",
        ),
    ],
)
def test_missing_and_empty_text_is_refused_before_anything_starts(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path / "corpus")
    with pytest.raises(RecipeError, match=message):
        text(TextOptions(name="text", path=tmp_path / "corpus")).infer_options()


def test_short_text_and_text_without_characters_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("ab")
    with pytest.raises(RecipeError, match=r"^task.path: the train part of the text is shorter than task.block = 256$"):
        text(TextOptions(name="text", path=tmp_path / "short.txt")).data("train")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1") * 50)
    with pytest.raises(
        RecipeError, match=r"^task.path: latin.txt is not UTF-8 \(byte 1\), so it has no characters; use"
    ):
        text(TextOptions(name="text", path=tmp_path / "latin.txt", tokens="chars")).data("train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 10, "heads": 4}, "expected task.width to be a multiple of task.heads; got 10 and 4"),
        ({"block": 8, "stride": 9}, "expected task.stride of at most task.block; got 9 and 8"),
        ({"dropout": 0.1}, "a Llama has no dropout"),
    ],
)
def test_options_must_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextOptions(name="text", **options)


@pytest.mark.parametrize("model", ["gpt", "llama", "lstm"])
@pytest.mark.parametrize("tokens", ["bytes", "chars"])
def test_bits_per_byte_are_those_of_the_definition(tmp_path: Path, model: str, tokens: str) -> None:
    """A model whose outputs are all equal pays log2(tokens) bits for each token."""
    (tmp_path / "x.txt").write_text("naïve café " * 40)
    options = TextOptions(
        name="text", path=tmp_path / "x.txt", tokens=tokens, model=model, block=16, stride=5, layers=1, heads=1, width=8
    )
    task = text(options)
    module = task.model(0)
    for value in module.parameters():
        torch.nn.init.zeros_(value)
    size = next(module.parameters()).shape[0]
    found = evaluate(task, module, task.data("valid"), 3, ExactAverager(LocalTransport()))
    held_out = (tmp_path / "x.txt").read_bytes()[round(0.9 * (tmp_path / "x.txt").stat().st_size) :].decode()
    characters = len(held_out) if tokens == "chars" else len(held_out.encode())
    assert found["loss"] == pytest.approx(math.log(size), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(math.log2(size) * characters / len(held_out.encode()), rel=1e-6)


def test_a_smaller_stride_gives_more_past() -> None:
    contents = [bytes(range(50)) * 3]
    long, short = (TextExamples(documents(contents), ByteTokenizer(), 20, stride) for stride in (20, 4))
    past = [
        np.concatenate(
            [np.arange(unscored, len(tokens) - 1) for tokens, unscored in (examples[i] for i in range(len(examples)))]
        )
        for examples in (long, short)
    ]
    assert past[0].mean() < past[1].mean()


def test_references_are_xz_on_the_held_out_text(tmp_path: Path) -> None:
    for name in "abcdefghij":
        (tmp_path / name).write_text(name * 1000)
    found = text(TextOptions(name="text", path=tmp_path, valid=0.2)).references()
    assert found["bits_per_byte_of_xz_together"] < found["bits_per_byte_of_xz_each_file"]


def test_a_run_keeps_its_alphabet(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("abcd" * 20)
    options = TextOptions(name="text", path=tmp_path / "old.txt", tokens="chars", block=4)
    settled = text(options).infer_options()
    assert settled == {"alphabet": "abcd"}
    kept = options.model_copy(update=settled)
    assert text(kept).infer_options() == {}
    (tmp_path / "some.txt").write_text("dcca")
    other = kept.model_copy(update={"path": tmp_path / "some.txt"})
    other = other.model_copy(update=other.for_evaluation(kept))
    valid = text(other).data("valid")
    assert [token for place in range(len(valid)) for token in valid[place][0][1:].tolist()] == [3, 2, 2, 0], "all of it"
    (tmp_path / "strange.txt").write_text("abé wxyz")
    with pytest.raises(RecipeError) as refused:
        text(other.model_copy(update={"path": tmp_path / "strange.txt"})).data("valid")
    assert str(refused.value) == (
        "task.path: strange.txt has the character 'é', which is not one of task.alphabet, the 4 of the text that was "
        "learned from"
    )


@pytest.mark.parametrize("tokens", ["bytes", "chars"])
def test_text_that_nothing_is_learned_from_is_measured_as_a_whole(tmp_path: Path, tokens: str) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name * 50)
    task = text(TextOptions(name="text", path=tmp_path, tokens=tokens, block=8, valid=1))
    assert sum(len(tokens) - 1 - unscored for tokens, unscored in task.data("valid")) == 150
    with pytest.raises(RecipeError, match=r"^task.path: the train part of the text is shorter than task.block = 8$"):
        task.data("train")
