"""Pretrained models and tokenizers of Hugging Face folders: checks, loading, tokenization and export."""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from raytrain.data.records import is_local
from raytrain.errors import RecipeError
from raytrain.models.adapters import mark_untrained
from raytrain.models.locate import locate_model
from raytrain.models.options import PretrainedOptions

AutoClass = Literal["AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"]
"""Class of transformers that loads a folder."""


class Pretrained:
    """A pretrained model and its tokenizer, in a Hugging Face folder or on the hub.

    Args:
        options: location, type and attention implementation.
        loader: class of transformers that loads it.

    Raises:
        RecipeError: there is no such folder, it has no weights, or the class does not load this architecture.
    """

    def __init__(self, options: PretrainedOptions, loader: AutoClass) -> None:
        self._options = options
        self._loader = loader
        self.source = locate_model(options.model, options.fresh)
        self._check_kind()

    @cached_property
    def config(self) -> Any:
        """The model's configuration."""
        from transformers import AutoConfig  # noqa: PLC0415 - slow to import

        try:
            with _quiet():
                return AutoConfig.from_pretrained(self.source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            if is_local(self.source):
                raise RecipeError(f"task.model: {self.source} cannot be loaded: {_first(error)}") from error
            raise RecipeError(
                f"task.model: {self.source!r} is neither a folder here nor a model that could be had from the Hugging "
                f"Face hub ({_first(error)}); to use a local copy, run `hf download {self.source} --local-dir DIR` "
                "where there is a network, and set task.model=DIR"
            ) from error

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from transformers import AutoTokenizer  # noqa: PLC0415

        try:
            with _quiet():
                tokenizer = AutoTokenizer.from_pretrained(self.source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"task.model: {self.source} has no tokenizer that can be loaded (tokenizer.json and "
                f"tokenizer_config.json): {_first(error)}"
            ) from error
        if len(tokenizer) > self.config.vocab_size:
            raise RecipeError(
                f"task.model: the tokenizer in {self.source} has {len(tokenizer)} tokens, and the model only "
                f"{self.config.vocab_size}; they do not belong together"
            )
        return tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        more = [self.tokenizer.chat_template, self.tokenizer.special_tokens_map]
        return hashlib.sha256((words + json.dumps(more, default=str)).encode()).hexdigest()

    def context_length(self, wanted: int, default: int) -> int:
        """Return the context length to use, in tokens.

        Args:
            wanted: `task.length`; 0: the smaller of `default` and the model's limit.
            default: default length.

        Raises:
            RecipeError: `wanted` exceeds the model's limit.
        """
        if wanted > self.max_context_length:
            raise RecipeError(f"task.length: {self.source} sees {self.max_context_length} tokens at most; got {wanted}")
        return wanted or min(default, self.max_context_length)

    @property
    def max_context_length(self) -> int:
        """Largest context length of model and tokenizer, in tokens."""
        positions = getattr(self.config, "max_position_embeddings", None) or sys.maxsize
        return int(min(positions, self.tokenizer.model_max_length))

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of a text; with `special`, after the tokenizer's prefix, but without an end token."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return tokens[:-1] if special and tokens and tokens[-1] == self.tokenizer.eos_token_id else tokens

    def tokenize_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Return (tokens, end of each in characters of the text); no ends if the tokenizer is not a fast one."""
        if not self.tokenizer.is_fast:
            return self.tokenize(text), []
        found = self.tokenizer(text, verbose=False, return_offsets_mapping=True)
        tokens, ends = found["input_ids"], [end for _, end in found["offset_mapping"]]
        ended = bool(tokens) and tokens[-1] == self.tokenizer.eos_token_id
        return (tokens[:-1], ends[:-1]) if ended else (tokens, ends)

    def pad_id(self) -> int:
        """Return the padding token, or for causal models without one the end-of-text token.

        Raises:
            RecipeError: there is neither.
        """
        tokenizer = self.tokenizer
        if tokenizer.pad_token_id is not None:
            return int(tokenizer.pad_token_id)
        if self.causal and tokenizer.eos_token_id is not None:
            return int(tokenizer.eos_token_id)  # a causal model does not attend to what follows
        raise RecipeError(
            f"task.model: the tokenizer in {self.source} has no padding token"
            f"{' and no end-of-text token' if self.causal else ''}, and texts differ in length; set one with "
            "tokenizer.pad_token = ..., and save the tokenizer there"
        )

    def eos_id(self) -> int:
        """Return the end-of-text token.

        Raises:
            RecipeError: there is none.
        """
        if self.tokenizer.eos_token_id is None:
            raise RecipeError(
                f"task.model: the tokenizer in {self.source} has no end-of-text token; set one with "
                "tokenizer.eos_token = ..., and save the tokenizer there"
            )
        return int(self.tokenizer.eos_token_id)

    @property
    def causal(self) -> bool:
        """Whether attention is causal."""
        from transformers.models.auto import modeling_auto as auto  # noqa: PLC0415

        kind, config = self.config.model_type, self.config
        generates = kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        masked = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
        return generates and (not masked or getattr(config, "is_decoder", False))

    def load_module(self, seed: int, **changes: Any) -> Any:
        """Load the model in training mode; parameters without pretrained weights are random.

        These are marked as untrained, so that they are trained beside any adapter.

        Args:
            seed: of random weights.
            **changes: of the model's configuration.

        Raises:
            RecipeError: weights are missing, damaged, or of another architecture.
        """
        import transformers  # noqa: PLC0415

        loader, how = getattr(transformers, self._loader), self._how()
        torch.manual_seed(seed)
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(self.source, trust_remote_code=False, **changes)
            try:
                if self._options.fresh:
                    module = loader.from_config(config, **how)
                else:
                    module, found = loader.from_pretrained(
                        self.source, config=config, use_safetensors=True, ignore_mismatched_sizes=True,
                        output_loading_info=True, trust_remote_code=False, **how,
                    )  # fmt: skip
                    lacking = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
                    self._check_weights(module, lacking)
                    mark_untrained(parameter for name, parameter in module.named_parameters() if name in lacking)
            except SafetensorError as error:
                raise RecipeError(
                    f"task.model: {self._unreadable()} is no file of weights that can be read: {_first(error)}; it may "
                    "be cut off, or only git's pointer to it: download it again, or run git lfs pull there"
                ) from error
            except (OSError, ValueError, ImportError) as error:
                raise RecipeError(f"task.model: {self.source} cannot be loaded: {_first(error)}") from error
        return module.train()

    def prepare(self, module: Any) -> Any:
        """Return the module in training mode, without a key-value cache."""
        if hasattr(module.config, "use_cache"):
            module.config.use_cache = False
        return module.train()

    def export(self, module: Any, folder: Path) -> None:
        """Write model and tokenizer to a folder that `from_pretrained` loads.

        Args:
            module: from `load_module`, trained; without adapters, or with them merged.
            folder: created if missing.
        """
        trained = module.config.use_cache if hasattr(module.config, "use_cache") else None
        with _quiet():
            if trained is not None:
                module.config.use_cache = self.config.use_cache
            module.save_pretrained(folder)
            if trained is not None:
                module.config.use_cache = trained
            self.tokenizer.save_pretrained(folder)

    def _how(self) -> dict[str, Any]:
        attention = {"attn_implementation": self._options.attention} if self._options.attention else {}
        return {"dtype": getattr(torch, self._options.dtype), **attention}

    def _unreadable(self) -> str:
        """Return the file of weights that cannot be read, or the source if that is not a folder."""
        for file in sorted(Path(self.source).glob("*.safetensors")):
            try:
                with safe_open(file, "pt"):
                    pass
            except SafetensorError:
                return str(file)
        return self.source

    def _check_kind(self) -> None:
        from transformers.models.auto import modeling_auto as auto  # noqa: PLC0415

        kinds = {
            "AutoModel": auto.MODEL_MAPPING_NAMES,
            "AutoModelForCausalLM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            "AutoModelForSequenceClassification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        }
        kind = self.config.model_type
        if kind not in kinds[self._loader]:
            raise RecipeError(f"task.model: {self.source} is a {kind}, of which transformers makes no {self._loader}")
        if self._loader == "AutoModelForCausalLM" and not self.causal:
            raise RecipeError(
                f"task.model: {self.source} is a {kind}, an encoder, whose tokens see what comes after them; expected "
                "a causal model, as gpt2 or llama; the task classify takes encoders"
            )

    def _check_weights(self, module: Any, lacking: set[str]) -> None:
        """Check that missing weights are those of a head only."""
        if self._loader == "AutoModelForSequenceClassification":
            lacking = {key for key in lacking if key.startswith(f"{module.base_model_prefix}.")}
        if self._loader != "AutoModelForCausalLM":
            lacking = {key for key in lacking if "pooler." not in key}
        if lacking:
            more = f" and {len(lacking) - 2} more" if len(lacking) > 2 else ""
            raise RecipeError(
                f"task.model: {self.source} lacks weights that a {type(module).__name__} has, or has them in another "
                f"shape: {', '.join(sorted(lacking)[:2])}{more}; they are those of another architecture"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warnings about missing weights, which are checked here, and its progress bars."""
    from transformers.utils import logging  # noqa: PLC0415

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first(error: Exception) -> str:
    """Return the first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
