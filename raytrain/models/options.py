"""Adapters by name, and the options of each; it loads without peft and torch.

The options of an adapter are the fields of its configuration in peft that a recipe can hold, with the same defaults;
what they mean is said there. Those of an adapter that is named in full, as in "peft:C3AConfig", are read from it.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from raytrain.data.records import Location
from raytrain.recipe import Options

ADAPTERS: dict[str, str] = {
    "none": "raytrain.models.adapters:no_adapter",
    "lora": "peft:LoraConfig Add the product of two matrices of low rank (Hu et al. 2022).",
    "randlora": "peft:RandLoraConfig Add a full rank from random bases with trained scales (Albert et al. 2025).",
    "loha": "peft:LoHaConfig Add the product by element of two updates of low rank (Hyeon-Woo et al. 2022).",
    "lokr": "peft:LoKrConfig Add a Kronecker product of small matrices (Yeh et al. 2024).",
    "hira": "peft:HiraConfig Add the weight times an update of low rank, by element (Huang et al. 2025).",
    "gralora": "peft:GraloraConfig Add an update of low rank to each block of the matrix (Jung et al. 2025).",
    "delora": "peft:DeloraConfig Add an update of low rank whose length is bounded (Bini et al. 2025).",
    "miss": "peft:MissConfig Add a small matrix, repeated over shards of the weight (Kang and Yin 2024).",
    "shira": "peft:ShiraConfig Train a few entries of the weight, chosen at random (Bhardwaj et al. 2024).",
    "oft": "peft:OFTConfig Turn the weight by rotations of blocks (Qiu et al. 2023).",
    "hra": "peft:HRAConfig Turn the weight by a chain of Householder reflections (Yuan et al. 2024).",
}
"""Those of peft that live inside the layers of any model and start as what it is.

Others are named in full, as in "peft:C3AConfig", which starts elsewhere. Left out: prompts and prefixes, which need
models of their own kind; VeRA and its like, which keep shared parameters outside of the model; and BOFT, which wants to
compile CUDA code."""

HEAD_PATTERNS = ("classifier*", "score*")
"""What heads are usually called."""

LayerNames = str | list[str] | None
"""Layers: a regular expression, or ends of their names."""
LayerIndices = list[int] | int | None


class AdapterOptions(Options):
    """What every adapter takes beside the fields of its configuration in peft.

    Attributes:
        modules_to_save: patterns of names of parameters that are trained in full and saved beside the adapter. What a
            pretrained model lacks always is, such as the layers of a new head.
    """

    name: str = "none"
    modules_to_save: tuple[str, ...] = HEAD_PATTERNS

    @model_validator(mode="after")
    def _rank_fits(self) -> Self:
        if (rank := getattr(self, "r", 0)) < 0:
            raise ValueError(f"expected adapter.r of 0 or more; got {rank}")
        return self


class LayerOptions(AdapterOptions):
    """Options of an adapter of some layers: `target_modules`, or else all linear layers in blocks."""

    target_modules: LayerNames = None

    @model_validator(mode="after")
    def _layers_fit(self) -> Self:
        numbers, pattern = (getattr(self, name, None) for name in ("layers_to_transform", "layers_pattern"))
        if isinstance(self.target_modules, str) and (numbers is not None or pattern is not None):
            raise ValueError(
                "expected a list as adapter.target_modules with adapter.layers_to_transform or adapter.layers_pattern, "
                f"which a regular expression says too; got {self.target_modules!r}"
            )
        if pattern and numbers is None:
            raise ValueError("expected adapter.layers_to_transform with adapter.layers_pattern, of which it says which")
        return self


class LoraOptions(LayerOptions):
    """Options of lora."""

    r: int = 8
    exclude_modules: LayerNames = None
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    init_lora_weights: bool | Literal["gaussian", "eva", "olora", "pissa", "corda", "orthogonal", "mica"] = True
    layers_to_transform: LayerIndices = None
    layers_pattern: LayerNames = None
    rank_pattern: dict[str, Any] | None = {}
    alpha_pattern: dict[str, Any] | None = {}
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    use_dora: bool = False
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    layer_replication: list[tuple[int, int]] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    ensure_weight_tying: bool = False

    @model_validator(mode="after")
    def _dora_and_bias_fit(self) -> Self:
        if self.use_dora and self.megatron_config:
            raise ValueError("expected adapter.use_dora = false with adapter.megatron_config")
        if self.lora_bias and (self.use_dora or not isinstance(self.init_lora_weights, bool)):
            raise ValueError(
                "expected adapter.use_dora = false and a truth value as adapter.init_lora_weights with lora_bias"
            )
        return self


class RandLoraOptions(LayerOptions):
    """Options of randlora."""

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: int = 640
    bias: str = "none"
    init_weights: bool = True
    layers_to_transform: LayerIndices = None
    layers_pattern: str | None = None


class LoHaOptions(LayerOptions):
    """Options of loha."""

    r: int = 8
    alpha: int = 8
    rank_pattern: dict[str, Any] | None = {}
    alpha_pattern: dict[str, Any] | None = {}
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    exclude_modules: LayerNames = None
    init_weights: bool = True
    layers_to_transform: LayerIndices = None
    layers_pattern: LayerNames = None


class LoKrOptions(LayerOptions):
    """Options of lokr."""

    r: int = 8
    alpha: int = 8
    rank_pattern: dict[str, Any] | None = {}
    alpha_pattern: dict[str, Any] | None = {}
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    exclude_modules: LayerNames = None
    init_weights: bool | Literal["lycoris"] = True
    layers_to_transform: LayerIndices = None
    layers_pattern: LayerNames = None


class HiraOptions(LayerOptions):
    """Options of hira."""

    r: int = 32
    hira_dropout: float = 0.0
    rank_pattern: dict[str, Any] | None = {}
    fan_in_fan_out: bool = False
    exclude_modules: LayerNames = None
    init_weights: bool | Literal["gaussian"] | None = True
    layers_to_transform: LayerIndices = None
    layers_pattern: LayerNames = None


class GraloraOptions(LayerOptions):
    """Options of gralora."""

    r: int = 32
    hybrid_r: int = 0
    alpha: int = 64
    gralora_dropout: float = 0.0
    gralora_k: int = Field(2, ge=1)
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    layers_to_transform: LayerIndices = None
    layers_pattern: str | None = None

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        if self.r % self.gralora_k:
            raise ValueError(
                f"expected adapter.r to be a multiple of adapter.gralora_k; got {self.r} and {self.gralora_k}"
            )
        return self


class DeloraOptions(LayerOptions):
    """Options of delora."""

    r: int = Field(8, ge=1)
    delora_lambda: int = 15
    rank_pattern: dict[str, Any] | None = {}
    lambda_pattern: dict[str, Any] | None = {}
    module_dropout: float = 0.0
    exclude_modules: LayerNames = None
    bias: Literal["none", "all", "delora_only"] = "none"
    init_weights: bool = True
    layers_to_transform: LayerIndices = None
    layers_pattern: LayerNames = None


class MissOptions(LayerOptions):
    """Options of miss."""

    r: int = 64
    mini_r: int = 1
    miss_dropout: float = 0.0
    exclude_modules: LayerNames = None
    bias: str = "none"
    init_weights: bool | Literal["bat", "mini"] = True
    layers_to_transform: LayerIndices = None
    layers_pattern: str | None = None


class ShiraOptions(LayerOptions):
    """Options of shira."""

    r: int = 32
    mask_type: Literal["random"] = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True


class OftOptions(LayerOptions):
    """Options of oft."""

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    exclude_modules: LayerNames = None
    bias: Literal["none", "all", "oft_only"] = "none"
    init_weights: bool = True
    layers_to_transform: LayerIndices = None
    layers_pattern: LayerNames = None
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        if bool(self.r) == bool(self.oft_block_size):
            raise ValueError(
                "expected one of adapter.r and adapter.oft_block_size, and 0 for the other; got "
                f"{self.r} and {self.oft_block_size}"
            )
        return self


class HraOptions(LayerOptions):
    """Options of hra."""

    r: int = 8
    apply_GS: bool = False  # noqa: N815 - peft's
    exclude_modules: LayerNames = None
    bias: str = "none"
    init_weights: bool = True
    layers_to_transform: LayerIndices = None
    layers_pattern: LayerNames = None


ADAPTER_OPTIONS: dict[str, type[AdapterOptions]] = {
    "none": AdapterOptions,
    "lora": LoraOptions,
    "randlora": RandLoraOptions,
    "loha": LoHaOptions,
    "lokr": LoKrOptions,
    "hira": HiraOptions,
    "gralora": GraloraOptions,
    "delora": DeloraOptions,
    "miss": MissOptions,
    "shira": ShiraOptions,
    "oft": OftOptions,
    "hra": HraOptions,
}
"""Adapter -> its options."""


PLACEHOLDER = "{text}"


class PretrainedOptions(Options):
    """Which model, and how it computes.

    Attributes:
        model: a Hugging Face folder, a name on its hub, or "package:NAME", the folder that a Python package calls
            MODEL_DIR.
        fresh: start from random weights, and take only the architecture and the tokenizer from there.
        dtype: of the parameters.
        attention: how attention is computed: "sdpa", "eager", "flash_attention_2", ...; default: the model's choice.
    """

    model: Location = Field(min_length=1)
    fresh: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: str = ""
