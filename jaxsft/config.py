"""The sections of a config: every key that can be set, its type, its default and its meaning.

Each module takes the section that concerns it, never the whole config; only `train.py`, `cli.py` and what compares
runs see the whole. Reading a config from a file, and writing it to one, is `config_files.py`.
"""

import datetime
import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

Dtype = Literal["float32", "bfloat16"]
AttentionKernel = Literal["auto", "splash", "packed", "cudnn", "xla"]
PositiveInt = Annotated[int, Field(ge=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


RESERVED_TEMPLATE_KWARGS = {
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip
"""Arguments of apply_chat_template: setting one would change more than a template's variables."""


class ConfigError(ValueError):
    """A mistake of the user in the config or in the files that it names; its text is shown as it is."""

    exit_code = 1


class Section(BaseModel):
    """A part of the config: frozen, strict about types, and without any key that it does not name.

    A key that is given as null is left out, but for one where null has a meaning of its own.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _left_out(cls, given: Any) -> Any:
        return _without_nulls(given, cls.model_fields) if isinstance(given, dict) else given


def _without_nulls(given: dict[str, Any], fields: dict[str, FieldInfo]) -> dict[str, Any]:
    """What is given of a section without all that is null, in tables of names as well; null variables of a template
    are not as if they were not given."""
    kept = {}
    for key, value in given.items():
        field = fields.get(key)
        if field is not None and value is None and not _has_meaning_of_null(field):
            continue
        if field is not None and isinstance(value, dict) and get_origin(field.annotation) is dict:
            is_any = get_args(field.annotation)[1] is Any
            value = {name: each for name, each in value.items() if each is not None or is_any}
        kept[key] = value
    return kept


def _has_meaning_of_null(field: FieldInfo) -> bool:
    """Whether null says something else than leaving the key out does, as `clip_norm: null` does."""
    return field.default is not None and type(None) in get_args(field.annotation)


class ModelConfig(Section):
    """The model to begin with, and the dtypes of its numbers."""

    path: str
    """Hugging Face folder of the model (config.json, safetensors, tokenizer), hub id, or GGUF file; a folder may be in
    a bucket (gs://, s3://)."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """Start from the weights in `path`, or from random ones drawn for its config.json."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; left out: `model.path`."""
    param_dtype: Dtype = "float32"
    """Dtype of the trained parameters."""
    compute_dtype: Dtype | None = None
    """Dtype of activations and matmuls; left out: bfloat16 on accelerators, float32 on CPU."""
    export_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the exported weights; left out: each as it was stored, and random weights as config.json says."""
    quantize: Literal["nf4", "int8", "none"] = "none"
    """How the frozen weights of linear maps lie in memory: in 4.13 bits a number (`nf4`, QLoRA's, doubly quantised), in
    8 (`int8`), or as they are. Embeddings, output projection, norms and routers are not quantised."""
    tie_embeddings: bool | None = None
    """Whether embedding and output projection are one; left out: as config.json says; false: trained apart."""
    unroll: bool = False
    """Layers one after the other in the compiled program instead of one scanned: faster on CPU, slow to compile.
    Checkpoints are the same."""
    attention: AttentionKernel = "auto"
    """What computes attention in training: JAX's TPU kernels (`splash`), ours that leave out what no query of a packed
    row sees (`packed`), those of NVIDIA GPUs for packed rows (`cudnn`: Hopper and newer, bfloat16, rows that are whole
    and prepared), XLA's operations in blocks (`xla`), or what suits devices and rows (`auto`). The log says which and
    why; a kernel is held against the formula before step 1."""
    remat: Literal["none", "attention", "full", "offload"] = "full"
    """What the backward pass computes again: only what is cheap (norms, rotations, activations; nothing in mixtures
    and unrolled layers), all but attention, or each whole layer. With "offload", what a layer then begins from waits in
    the host's memory."""


def _with_text_values(value: Any) -> Any:
    """Files without a header have columns "1", "2", ..., which YAML reads as numbers."""
    return (
        {key: str(each) if type(each) is int else each for key, each in value.items()}
        if isinstance(value, dict)
        else value
    )


SHARES = ("weight", "count", "epochs")
"""Keys of a source of which it has one at most."""


class SourceConfig(Section):
    """One source of rows, and how its columns, roles and keys are called."""

    path: str
    """Rows: a file, folder or glob (JSONL, JSON, Parquet, CSV, TSV; .gz, .zst), also in a bucket (gs://, s3://), or hub
    `org/name[@config][:split]`."""
    format: str | None = None
    """Format of the rows; left out: detected from the columns."""
    columns: Annotated[dict[str, str], BeforeValidator(_with_text_values)] = {}
    """Columns of other names, as `ours: theirs`, such as {prompt: inputs, completion: targets}; `answers.text.0` is a
    part of one."""
    roles: dict[str, str] = {}
    """Roles of other names, as `theirs: ours`, such as {Patient: user, Doctor: assistant}; {critic: critic} declares a
    role of your own."""
    keys: dict[str, str] = {}
    """Keys of turns of other names, as `theirs: ours`, such as {speaker: role, skip: masked}."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of an epoch's examples, relative to the other weights; the epoch has as many as all sources together."""
    count: PositiveInt | None = None
    """Examples drawn from this source per epoch; more than it has repeats them."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over this source per epoch of the whole; left out, and no weight or count given: 1."""

    @model_validator(mode="after")
    def _checked(self) -> "SourceConfig":
        given = [key for key in SHARES if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"give only one of {' and '.join(f'`{key}`' for key in given)}")
        return self


def _date_as_text(value: Any) -> Any:
    """YAML reads 2024-07-26 as a date."""
    return value.isoformat() if type(value) is datetime.date else value


def _as_numbered(value: Any) -> Any:
    """A list, where it was given by number; what is null is left out."""
    if isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
        return [value[key] for key in sorted(value, key=int) if value[key] is not None]
    return value


def as_sources(value: Any) -> Any:
    """One path, one source, or several of either; `{0: ...}` is what an override of `train.0.path` makes."""
    value = _as_numbered(value)
    if isinstance(value, str | dict):
        value = [value]
    return [{"path": each} if isinstance(each, str) else each for each in value] if isinstance(value, list) else value


def _as_named_sources(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, dict) and "path" in value):
        value = {"eval": value}
    if isinstance(value, dict):
        return {name: {"path": each} if isinstance(each, str) else each for name, each in value.items()}
    return {} if value is None else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Patterns = Annotated[list[NonEmpty], BeforeValidator(_as_list)]


class DataConfig(Section):
    """Rows of data, how they become examples, and how examples fill the rows of a batch."""

    train: Annotated[list[SourceConfig], BeforeValidator(as_sources), Field(min_length=1)]
    """Training rows: a path, or a list of sources."""
    eval: Annotated[dict[str, SourceConfig], BeforeValidator(_as_named_sources)] = {}
    """Held-out rows: a path, or sources by name, each reported; their keys are those of `data.train.N`."""
    chat_template: str | None = None
    """Jinja file, or the name of one of ours, that replaces the tokenizer's chat template."""
    set_eos: bool = False
    """Make the token by which the chat template ends an answer the tokenizer's eos token, in the export too."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the chat template; those of a row go first."""
    template_date: Annotated[str | None, BeforeValidator(_date_as_text)] = None
    """The day (YYYY-MM-DD) that a template sees as today's; left out: the day on which the run began."""
    train_on: Literal["assistant", "last_turn", "last_exchange", "all"] | list[str] = "assistant"
    """Train every assistant turn, only the last one, all after the last user turn (calls included), every token, or the
    turns of these roles."""
    train_stop: Literal["every", "last"] = "every"
    """Train the stop token of every trained turn, or only that of a conversation's last one."""
    ignore_keys: Annotated[list[str], BeforeValidator(_as_list)] = []
    """Keys of turns that look as if they said which turns are trained, and do not."""
    train_reasoning: bool = True
    """Whether the text of reasoning is trained, or only seen."""
    reasoning: Literal["error", "drop"] = "error"
    """Reasoning of an answer for which the template has no place, as with thinking turned off: refuse the row, or leave
    the reasoning of its answers out, counted."""
    reasoning_tags: list[Annotated[list[NonEmpty], Field(min_length=2, max_length=2)]] = []
    """Marks (opening, closing) of reasoning at the start of an answer's content, such as [["<reasoning>",
    "</reasoning>"]]: what they enclose is given to the template as reasoning."""
    unroll: Literal["auto", "always", "never"] = "auto"
    """One example per turn: where the template shows a turn another past later, for every turn, or never."""
    control_tokens: Literal["split", "error", "allow"] = "split"
    """Text of the data that spells a control token: encode it as ordinary text, refuse the row, or let it act."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Refuse bad rows, or leave them out, counted, as long as they are at most 1% of the rows."""
    seq_len: Annotated[int, Field(ge=2)] = 2048
    """Tokens per row, and the longest example that is kept whole."""
    packing: bool = True
    """Several examples share a row, sealed off from each other; otherwise one example per row."""
    overlong: Literal["drop", "error", "drop_oldest", "truncate_turns", "truncate", "split"] | None = None
    """What becomes of an example of more than `seq_len` tokens; left out: chats are dropped, plain text is split."""
    allow_overlap: bool = False
    """Whether held-out rows may be in the training data as well."""
    mixture_ends: Literal["total", "first", "all"] = "total"
    """Of sources with weights, an epoch draws as many examples as all have together, or ends when the first of them, or
    when every one of them, was gone through."""
    stream: bool = False
    """Prepare the rows while training, for sources too large to prepare before; needs `train.steps`."""
    shuffle_buffer: PositiveInt = 8192
    """Rows that are shuffled and packed together when streaming."""
    cache: str | None = None
    """Folder of the prepared data; left out: jaxsft in the user's cache folder. In a bucket (gs://, s3://), it is where
    hosts share them: each has its copy in the user's cache folder."""

    @model_validator(mode="after")
    def _checked(self) -> "DataConfig":
        for name, source in self.eval.items():
            given = [key for key in SHARES if getattr(source, key) is not None]
            if given:
                raise ValueError(f"eval.{name}.{given[0]}: held-out rows are all examined once")
        if self.train_on == []:
            raise ValueError(
                "train_on: an empty list given, which trains nothing; expected assistant, last_turn, last_exchange, "
                "all, or a list of roles such as [assistant]"
            )
        if self.template_date is not None:
            try:
                datetime.date.fromisoformat(self.template_date)
            except ValueError:
                raise ValueError(f"template_date: {self.template_date!r} given, expected YYYY-MM-DD") from None
        if reserved := sorted(RESERVED_TEMPLATE_KWARGS & self.chat_template_kwargs.keys()):
            raise ValueError(f"chat_template_kwargs: {', '.join(reserved)} cannot be set: no variable of the template")
        try:
            json.dumps(self.chat_template_kwargs, sort_keys=True)
        except TypeError as error:
            raise ValueError(f"chat_template_kwargs: only what JSON can hold: {error}") from None
        if len(self.train) == 1 and self.train[0].weight is not None:
            raise ValueError("train.0.weight has no effect: there is no other source")
        if self.mixture_ends != "total" and (self.stream or any(source.weight is None for source in self.train)):
            raise ValueError(
                "`mixture_ends` has no effect but on several sources with a `weight` each, without `stream`"
            )
        if not self.stream and "shuffle_buffer" in self.model_fields_set:
            raise ValueError("`shuffle_buffer` has no effect without `stream`")
        return self


class TrainConfig(Section):
    """How much is trained, and in which portions."""

    batch_size: PositiveInt = 32
    """Rows per step, over all devices."""
    microbatch_size: PositiveInt | None = None
    """Rows per forward-backward, over all devices; divides `batch_size`; left out: the whole batch at once."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data."""
    steps: PositiveInt | None = None
    """Steps in all, instead of `epochs`."""
    stall_timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds without a finished step after which the run is ended with exit code 75, the stacks of all threads on
    stderr; left out: ten times the median step or three times the longest wait for a batch, and at least 45. The first
    step, evaluations, saves and the export may take two hours more."""
    only: Patterns | None = None
    """Train these weights and freeze all others: `embeddings`, `norms`, ends of names such as down_proj, or regular
    expressions for whole names, such as layers\\.(28|29)\\..*; of layers, the last ones. Left out: all are trained."""

    @property
    def microbatch_rows(self) -> int:
        """Rows per forward-backward."""
        return self.microbatch_size or self.batch_size

    @property
    def num_microbatches(self) -> int:
        """Forward-backward passes of a step."""
        return self.batch_size // self.microbatch_rows

    @model_validator(mode="after")
    def _checked(self) -> "TrainConfig":
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise ValueError("give `steps` or `epochs`, not both")
        if self.only == []:
            raise ValueError("only: an empty list given, which trains nothing; leave it out to train all weights")
        if self.microbatch_size is not None and self.batch_size % self.microbatch_size:
            raise ValueError(f"microbatch_size {self.microbatch_size} does not divide batch_size {self.batch_size}")
        return self


_OF_ADAM = ("beta1", "beta2", "epsilon")

KEYS_OF: dict[str, tuple[str, ...]] = {
    "adamw": (*_OF_ADAM, "moment_dtype"),
    "adamw8bit": _OF_ADAM,
    "adafactor": (),
    "lion": ("beta1", "beta2", "moment_dtype"),
    "muon": ("momentum", *_OF_ADAM, "moment_dtype"),
    "sgd": ("momentum", "moment_dtype"),
    "schedule_free_adamw": (*_OF_ADAM, "moment_dtype"),
}
"""Optimizer -> those keys of `optim` that not all optimizers have."""

USUAL: dict[str, dict[str, Any]] = {
    "lion": {"beta2": 0.99},
    "sgd": {"momentum": 0.9},
    "schedule_free_adamw": {"schedule": "constant"},
}
"""Optimizer -> what keys are where they are left out, if that is not their default."""


class GroupConfig(Section):
    """Parameters that are trained at another rate, or decayed otherwise."""

    match: Annotated[list[NonEmpty], BeforeValidator(_as_list), Field(min_length=1)]
    """Regular expressions of which one is found in the parameter's path, such as `embed_tokens`, `lm_head`, `norm`,
    `lora_b` or `layers.mlp.up_proj.weight`."""
    learning_rate_factor: Annotated[float, Field(gt=0)] | None = None
    """Their learning rate, as a multiple of that of all others."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Their weight decay, norms and biases among them included."""

    @model_validator(mode="after")
    def _checked(self) -> "GroupConfig":
        for pattern in self.match:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"match: {pattern!r} is no regular expression: {error}") from None
        if self.learning_rate_factor is None and self.weight_decay is None:
            raise ValueError("no effect without `learning_rate_factor` or `weight_decay`")
        return self


def _as_groups(value: Any) -> Any:
    """One group, or several; `{0: ...}` is what an override of `groups.0.match` makes."""
    value = _as_numbered(value)
    return [value] if isinstance(value, dict) else value


class OptimConfig(Section):
    """Optimizer, schedule, and what is added to the loss."""

    name: Literal["adamw", "adamw8bit", "adafactor", "lion", "muon", "sgd", "schedule_free_adamw"] = "adamw"
    """The optimizer; docs/optimizers.md says what each computes and how many bytes it keeps per parameter. Lion wants
    about a tenth of adamw's learning rate, sgd far more; the others take adamw's."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Course of the learning rate after warm-up; wsd stays at the peak and decays over the last `decay_ratio`. Left out
    with schedule_free_adamw: constant."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of warm-up, instead of `warmup_ratio`."""
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps in which wsd decays."""
    final_ratio: Fraction = 0.0
    """Learning rate that is reached after the last step, as a share of the peak."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment; of schedule_free_adamw, the share of the average in where gradients are taken."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment; of lion, of its only one, left out: 0.99."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the momentum of muon and sgd; left out with sgd: 0.9."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, not on norms and biases."""
    groups: Annotated[list[GroupConfig], BeforeValidator(_as_groups)] = []
    """Parameters with a learning rate or weight decay of their own; where a parameter is in several groups, what a
    later one gives replaces what an earlier one gave."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global norm of the gradient; null: no clipping."""
    moment_dtype: Dtype = "float32"
    """Dtype of the first and second moments; those of adamw8bit and adafactor have their own."""
    stochastic_rounding: bool = False
    """Round bfloat16 parameters up or down at random after each step, so that small updates count on average, instead
    of to the nearest; needs `model.param_dtype` bfloat16."""
    max_skipped: Fraction = 0.01
    """Share of the run's steps (rounded up) that may be skipped because their loss or gradient is not finite; with one
    more, or with 10 in a row, the run stops and exports nothing."""
    router_balance: Annotated[float, Field(ge=0)] = 0.0
    """Mixtures of experts: weight of the load-balancing loss beside the loss, num_experts * sum over experts of (share
    of the batch's tokens that chose it) * (its mean probability), a mean over layers; config.json's
    router_aux_loss_coef is such a weight (transformers takes shares and means over all layers together, and adds it
    only with output_router_logits). With several microbatches a first forward pass counts all choices, a third more
    time."""
    router_z: Annotated[float, Field(ge=0)] = 0.0
    """Mixtures of experts: weight of the mean over tokens and layers of logsumexp(router logits)^2."""

    @model_validator(mode="before")
    @classmethod
    def _with_usual(cls, given: Any) -> Any:
        """Keys that are left out get what is usual with the optimizer."""
        if not isinstance(given, dict):
            return given
        given = _without_nulls(given, cls.model_fields)
        name = given.get("name", cls.model_fields["name"].default)
        return {**USUAL.get(name, {}), **given} if isinstance(name, str) else given

    @model_validator(mode="after")
    def _checked(self) -> "OptimConfig":
        if refused := sorted(self.model_fields_set & keys_without_effect(self.name)):
            keys = " and ".join(f"`{key}`" for key in refused)
            raise ValueError(f"{keys} {'has' if len(refused) == 1 else 'have'} no effect with optimizer {self.name!r}")
        if self.name == "schedule_free_adamw" and self.beta1 == 0:
            raise ValueError("beta1: 0 given, but schedule_free_adamw finds its average by dividing by it")
        if self.warmup_steps is not None and "warmup_ratio" in self.model_fields_set:
            raise ValueError("give `warmup_steps` or `warmup_ratio`, not both")
        if self.schedule == "constant" and "final_ratio" in self.model_fields_set:
            raise ValueError("`final_ratio` has no effect with schedule 'constant'")
        if self.schedule != "wsd" and "decay_ratio" in self.model_fields_set:
            raise ValueError(f"`decay_ratio` has no effect with schedule {self.schedule!r}, only with 'wsd'")
        return self


EXCLUSIVE = (
    ("train.steps", "train.epochs"),
    ("optim.warmup_steps", "optim.warmup_ratio"),
    ("loss.dft", "loss.label_smoothing"),
    ("lora", "train.only"),
)
"""Keys, or sections, of which a config has one at most; of a source, those in `SHARES` are such keys too."""


def idle_keys(value: Callable[[str], Any]) -> list[str]:
    """Keys, or sections, that say nothing beside the values of others.

    Args:
        value: of a key, such as "optim.schedule".
    """
    idle = [f"optim.{key}" for key in keys_without_effect(value("optim.name"))]
    log_to = value("log.to")
    conditions = {
        "train.epochs": value("train.steps") is not None,
        "optim.warmup_ratio": value("optim.warmup_steps") is not None,
        "optim.decay_ratio": value("optim.schedule") != "wsd",
        "optim.final_ratio": value("optim.schedule") == "constant",
        "optim.stochastic_rounding": value("model.param_dtype") != "bfloat16",
        "eval": not value("data.eval"),
        "eval.patience": value("eval.every") is None,
        "checkpoint.export": not value("data.eval") or value("eval.every") is None,
        "data.shuffle_buffer": not value("data.stream"),
        "data.mixture_ends": bool(value("data.stream")),
        "checkpoint.local_dir": value("checkpoint.local_every") is None,
        "log.project": not (isinstance(log_to, str | list) and any(name in log_to for name in ("wandb", "trackio"))),
    }
    return sorted(idle) + [key for key, is_idle in conditions.items() if is_idle]


def keys_without_effect(optimizer: str) -> set[str]:
    """Keys of `optim` that other optimizers have, and this one has not."""
    return {key for keys in KEYS_OF.values() for key in keys}.difference(KEYS_OF[optimizer])


class LoraConfig(Section):
    """Adapters of low rank on a frozen model (Hu et al. 2021): `x W` becomes `x W + alpha / rank * x A B`."""

    rank: PositiveInt
    """Columns of A and rows of B."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of what adapters add, times their rank; left out: twice `rank`, whatever `rank_pattern` says."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the inputs of A that are set to 0 in training, the others scaled up."""
    targets: Patterns = ["all_linear"]
    """Which maps get adapters: `attention`, `mlp` (experts included), `all_linear` (both and convolutions' maps), names
    of maps such as q_proj or qkv_proj, `embed_tokens`, `lm_head`, or regular expressions for the whole name, such as
    layers\\.[0-9]\\..*_proj."""
    exclude: Patterns = []
    """Which of the targets get none; in the words of `targets`."""
    rank_pattern: dict[str, PositiveInt] = {}
    """Other ranks, by regular expressions for the end of a map's name, such as {down_proj: 32}; the first counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Other alphas, likewise."""
    rslora: bool = False
    """The scale is alpha / sqrt(rank) (Kalajdzievski 2023)."""
    dora: bool = False
    """Outputs keep a trained magnitude, and adapters turn their direction (Liu et al. 2024)."""


class LossConfig(Section):
    """What is minimised in place of the plain loss, which is reported all the same (docs/losses.md)."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each target that is spread evenly over the vocabulary."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of logsumexp(logits)^2 beside the loss of each trained token: it keeps the logits from drifting."""
    dft: bool = False
    """Multiply the loss of each token by its probability, taken as a constant (dynamic fine-tuning); not together with
    `label_smoothing`."""
    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Add noise to the embeddings in training: uniform, at most alpha / sqrt(tokens of the example * model width)."""

    @property
    def asked(self) -> list[str]:
        """Keys that ask for something."""
        return [key for key in type(self).model_fields if getattr(self, key)]

    @property
    def is_plain(self) -> bool:
        """Whether it is the plain loss that is minimised, with or without noise."""
        return not set(self.asked) - {"neftune_alpha"}

    @model_validator(mode="after")
    def _checked(self) -> "LossConfig":
        if self.dft and self.label_smoothing:
            raise ValueError(
                "`dft` with `label_smoothing`: the first weights a loss of the target alone, the second spreads the "
                "target over the vocabulary; give one of them"
            )
        return self


class MeshConfig(Section):
    """How the devices are divided: the product of all sizes is their number."""

    data: PositiveInt | None = None
    """Devices that hold copies of the parameters and split the rows; left out: the slices of a TPU run, else 1."""
    fsdp: PositiveInt | None = None
    """Devices that split the parameters and the rows; left out: all that the other axes leave over."""
    expert: PositiveInt = 1
    """Devices that split the experts and the rows, and all other parameters too."""
    context: PositiveInt = 1
    """Devices that split the positions of a row, and the parameters."""
    tensor: PositiveInt = 1
    """Devices that split heads, MLP width and vocabulary."""


class EvalConfig(Section):
    """When held-out rows are evaluated, and what is asked of them."""

    every: PositiveInt | None = None
    """Steps between evaluations; left out: only before and after training."""
    patience: PositiveInt | None = None
    """End the run after so many evaluations in a row without a smaller held-out loss than the smallest so far, that
    before training included; the schedule of the learning rate is that of all steps. Left out: all steps are done."""
    examples: PositiveInt | None = None
    """Evaluate on the first so many rows of `data.eval`; left out: on all."""
    samples: Annotated[int, Field(ge=0)] = 3
    """Questions of each held-out set whose answers are shown at every evaluation."""
    exact_match: bool = False
    """Also answer every question of the held-out conversations and report the share that is exactly what is trained."""
    ask: Literal["last", "all"] = "last"
    """Ask for the last trained turn of the assistant in each held-out conversation, or for every one."""
    max_new_tokens: PositiveInt = 128
    """Longest generated answer, in tokens with the stop token."""

    @model_validator(mode="after")
    def _checked(self) -> "EvalConfig":
        if self.patience is not None and self.every is None:
            raise ValueError("`patience` has no effect without `every`: it counts evaluations between steps")
        return self


class CheckpointConfig(Section):
    """When the state is saved, and for how long it is kept."""

    every: PositiveInt = 100
    """Steps between checkpoints; one is always saved at the end."""
    keep: PositiveInt = 2
    """Newest checkpoints kept; the one with the best held-out loss is kept besides."""
    export: Literal["last", "best"] = "last"
    """Which checkpoint the run ends with as its export: that after the last step, or that with the smallest held-out
    loss."""
    local_every: PositiveInt | None = None
    """Steps between copies on the disks of the hosts, from which a start goes on where all of them are newer than the
    checkpoints; left out: none."""
    local_dir: str | None = None
    """Folder of these copies on each host; left out: in the user's cache."""

    @model_validator(mode="after")
    def _checked(self) -> "CheckpointConfig":
        if self.local_dir is not None and self.local_every is None:
            raise ValueError("`local_dir` has no effect without `local_every`")
        if self.local_dir is not None and "://" in self.local_dir:
            raise ValueError(f"`local_dir` {self.local_dir} is in a bucket: give a folder on a disk of each host")
        if self.local_every is not None and self.local_every >= self.every:
            raise ValueError(
                f"`local_every` {self.local_every} has no effect with `every` {self.every}: give fewer steps"
            )
        return self


class LogConfig(Section):
    """When a line of metrics is written, and where it goes."""

    every: PositiveInt = 10
    """Steps from one line of metrics to the next."""
    to: Annotated[list[Literal["tensorboard", "wandb", "trackio"]], BeforeValidator(_as_list)] = []
    """Where the lines of `metrics.jsonl` also go; each needs its package, such as `pip install 'jaxsft[wandb]'`."""
    project: str = "jaxsft"
    """Project of Weights & Biases and trackio that the run belongs to."""
    profile_steps: PositiveInt | None = None
    """Trace so many steps, soon after the start, into `profile/` of the run folder; left out: none."""

    @model_validator(mode="after")
    def _checked(self) -> "LogConfig":
        if twice := sorted({name for name in self.to if self.to.count(name) > 1}):
            raise ValueError(f"to: {', '.join(twice)} given twice")
        if "project" in self.model_fields_set and not {"wandb", "trackio"} & set(self.to):
            raise ValueError("`project` has no effect without wandb or trackio in `to`")
        return self


class Config(Section):
    """All of a run. Checks that concern several sections are here."""

    run_dir: str | None = None
    """Folder of the run, on a disk or in a bucket (gs://, s3://); left out: `runs/` and the name of the config file,
    where the config is one."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of packing, order of rows, and random weights."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    lora: LoraConfig | None = None
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _checked(self) -> "Config":
        if self.data.stream and self.train.steps is None:
            raise ValueError("data.stream: the length of a stream is not known; give train.steps")
        if self.lora is not None and self.train.only is not None:
            raise ValueError("train.only: with lora, adapters are all that is trained; leave one of the two out")
        if not self.data.eval and self.eval.model_fields_set:
            keys = ", ".join(f"eval.{key}" for key in sorted(self.eval.model_fields_set))
            raise ValueError(f"{keys}: no effect without held-out rows; give data.eval")
        if not self.data.eval and self.checkpoint.export == "best":
            raise ValueError("checkpoint.export: best: nothing is measured without held-out rows; give data.eval")
        if self.eval.every is None and self.checkpoint.export == "best":
            raise ValueError("checkpoint.export: best: only the last one is measured without eval.every")
        if self.optim.stochastic_rounding and self.model.param_dtype != "bfloat16":
            raise ValueError(
                f"optim.stochastic_rounding: no effect with model.param_dtype {self.model.param_dtype}; it rounds to "
                "bfloat16"
            )
        return self
