"""Options of the tasks in the table; it loads without torch and transformers."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from raytrain.data.columns import Label
from raytrain.data.readers import Unit
from raytrain.data.records import SPLIT_ALIASES, Location, absolute_location
from raytrain.models.options import PLACEHOLDER, PretrainedOptions
from raytrain.recipe import AbsolutePath, Options
from raytrain.tasks.task import TaskOptions

Overflow = Literal["error", "truncate", "split"]


class DigitsOptions(TaskOptions):
    """Options of `digits`.

    Attributes:
        model: "mlp" or "cnn".
        widths: units of each hidden layer, or channels of each convolution.
        depth: how often each width is repeated.
        dropout: probability of dropping a hidden unit, or a channel.
        norm: what follows each layer.
        valid: share of the images that is held out, the same images for every seed.
    """

    model: Literal["mlp", "cnn"] = "cnn"
    widths: tuple[PositiveInt, ...] = Field((32, 64), min_length=1)
    depth: int = Field(1, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    norm: Literal["none", "batch", "layer"] = "none"
    valid: float = Field(0.2, gt=0, lt=1)


class TextOptions(TaskOptions):
    """Options of `text`.

    Attributes:
        path: a text file, or a folder of them; without it, the source text of the Python standard library.
        pattern: which files of a folder.
        tokens: "bytes" or "chars".
        alphabet: the characters that are tokens; default: those of the text. A run keeps them.
        valid: share that is held out: of the files, or of a single file its end; 1: all of it, as `evaluate` does with
            text at another path than the run's.
        block: the longest context, in tokens.
        stride: how far apart held-out windows start, at most `block`; a smaller one scores each token with more context
            before it and takes longer; 0: `block`.
        model: "gpt" (GPT-2), "llama", or a recurrent network, whose state is zero where a window starts: "elman", "gru"
            or "lstm".
        layers, width: its size.
        heads: of attention; "gpt" and "llama" only.
        dropout: its dropout; not of "llama", which has none.
    """

    path: AbsolutePath | None = None
    pattern: str = "**/*"
    tokens: Literal["bytes", "chars"] = "bytes"
    alphabet: str = ""
    valid: float = Field(0.1, gt=0, le=1)
    block: int = Field(256, ge=2)
    stride: int = Field(0, ge=0)
    model: Literal["gpt", "llama", "elman", "gru", "lstm"] = "llama"
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    width: int = Field(128, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.has_heads and self.width % self.heads:
            raise ValueError(f"expected task.width to be a multiple of task.heads; got {self.width} and {self.heads}")
        if self.stride > self.block:
            raise ValueError(f"expected task.stride of at most task.block; got {self.stride} and {self.block}")
        if self.dropout and self.model == "llama":
            raise ValueError("expected task.dropout = 0, because a Llama has no dropout; or task.model = 'gpt'")
        return self

    @property
    def has_heads(self) -> bool:
        """Whether the model is a transformer."""
        return self.model in ("gpt", "llama")

    def for_evaluation(self, trained: TaskOptions) -> Mapping[str, Any]:
        """Return that all of it is held out, unless it is the text that was `trained` on."""
        return {} if self.path == getattr(trained, "path", self.path) else {"valid": 1.0}


class RecordOptions(TaskOptions):
    """Where records come from.

    Attributes:
        path: a file (.jsonl, .json, .csv, .tsv, .txt, .parquet), a folder or a glob of such files, or a data set of the
            Hugging Face hub ("org/name", or "org/name:config"). Of a folder, the files (or sub-folders) called train,
            valid, validation, dev or test are these splits; if none is called so, all are for training.
        valid: share of the training records that is held out if there is no validation split, the same for every seed;
            1: no training examples; evaluation uses the whole test split, or all examples without one, as
            `evaluate` does with data at another path than the run's.
        held_out: what to measure on instead: a split ("test"), or a file.
        domain: the column that says where a record comes from, as federated partitions ask for; default: its file.
    """

    path: Location = ""
    valid: float = Field(0.1, gt=0, le=1)
    held_out: Annotated[
        str, AfterValidator(lambda value: value if value in SPLIT_ALIASES else absolute_location(value))
    ] = ""
    domain: str = ""

    def for_evaluation(self, trained: Options) -> Mapping[str, Any]:
        """Return that all of it is held out, unless it is the data that was `trained` on."""
        return {} if self.path == getattr(trained, "path", self.path) else {"valid": 1.0, "held_out": ""}


class ClassifyOptions(RecordOptions, PretrainedOptions):
    """Options of `classify`; those of its data and of its model come first.

    Measured are the loss, the accuracy, "expected_accuracy", which is the mean probability of the right class, and with
    two classes the F1 score of the second.

    Attributes:
        text, label: columns; default: one that is called so, or first and last if columns have no names.
        classes: the labels in their order; default: those of the training data, sorted. A run keeps them.
        length: tokens of a text that are looked at; 0: as many as the model can see, at most 512.
        head: "own", what transformers gives the model (a BERT's looks at the first token); "mean", a linear layer on
            the mean of the model's vectors, as sentence encoders want it; or "verbalizer", no new head: how likely a
            causal model finds the class's word after a prompt.
        head_init: weights of a new head: "random"; "prototypes", class means of the features of a few training
            examples; or "discriminant", their linear discriminant analysis, which is better with many.
        shots: examples of each class for `head_init`; 0: all.
        prompt: template for head = "verbalizer", with {text} in place of the text.
        verbalizer: words for the classes in their order, for head = "verbalizer"; default: " " and the label.
    """

    text: str = ""
    label: str = ""
    classes: tuple[Label, ...] = ()
    length: int = Field(0, ge=0)
    head: Literal["own", "mean", "verbalizer"] = "own"
    head_init: Literal["random", "prototypes", "discriminant"] = "random"
    shots: int = Field(16, ge=0)
    prompt: str = "{text}\nLabel:"
    verbalizer: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.classes and len(set(self.classes)) < max(2, len(self.classes)):
            raise ValueError(f"expected task.classes of two or more labels, all different; got {list(self.classes)}")
        if self.prompt.count(PLACEHOLDER) != 1:
            raise ValueError(f"expected task.prompt with {PLACEHOLDER} in it once; got {self.prompt!r}")
        if self.head == "verbalizer" and self.head_init != "random":
            raise ValueError("expected task.head_init = 'random' with task.head = 'verbalizer', which adds no head")
        return self


class CausalLmOptions(RecordOptions, PretrainedOptions):
    """Options of `causal-lm`; those of its data and of its model come first.

    Attributes:
        text: the column of the documents; default: one that is called so.
        document: what a document of a .txt file is.
        length: tokens that the model sees at once; 0: as many as it can, at most 512.
        packed: join all documents, each with an end-of-text token after it, and cut them into pieces of `length`; or
            else each example is a document.
        overflow: of a document that does not fit into `length`, without packing: "error", "truncate" to its beginning,
            or "split" into several examples.
        new_tokens: how many tokens `predict` adds to a text, at most.
    """

    text: str = ""
    document: Unit = "line"
    length: int = Field(0, ge=0)
    packed: bool = True
    overflow: Overflow = "split"
    new_tokens: int = Field(64, ge=1)


class InstructOptions(RecordOptions, PretrainedOptions):
    """Options of `instruct`; those of its data and of its model come first.

    A record has either messages, each with a "role" and a "content", or a prompt and an answer. They are written by the
    tokenizer's chat template; a tokenizer without one gets a plain one ("### user:" on a line before a message, "###
    assistant:" before an answer), and is exported with it.

    Attributes:
        messages, prompt, answer: columns; default: those that are called so.
        context: a column whose text follows the prompt, where there is any; default: one that is called so.
        turns: which messages of the assistant are answers to learn, each after all that came before: "all" or "last".
        length: tokens of prompt and answer together; 0: as many as the model can see, at most 1024.
        overflow: of a record that does not fit into `length`: "error", "truncate" its answer, or "skip" it.
        generate: of how many held-out records the answers are also written, greedily, and compared; 0: of none.
        new_tokens: how many tokens such an answer has at most, and one of `predict`.
    """

    messages: str = ""
    prompt: str = ""
    answer: str = ""
    context: str = ""
    turns: Literal["all", "last"] = "all"
    length: int = Field(0, ge=0)
    overflow: Literal["error", "truncate", "skip"] = "error"
    generate: int = Field(0, ge=0)
    new_tokens: int = Field(128, ge=1)


TASK_OPTIONS: dict[str, type[TaskOptions]] = {
    "digits": DigitsOptions,
    "text": TextOptions,
    "classify": ClassifyOptions,
    "causal-lm": CausalLmOptions,
    "instruct": InstructOptions,
}
"""Task -> its options."""
