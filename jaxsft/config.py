"""The config: frozen sections with every default, YAML plus `a.b=value` overrides, and the text of its errors.

In: a YAML file and overrides. Out: one validated `Config`, or one `ConfigError` that lists every mistake. A function
elsewhere takes its own section; only `train.py` and `run.py` see the whole.
"""

import difflib
import pathlib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Dtype = Literal["float32", "bfloat16"]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A mistake of the user in the config or in the files that it names; its text is shown as it is."""

    exit_code = 1


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    path: str
    """Hugging Face folder of the model (config.json, safetensors, tokenizer), or a hub id."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """Start from the weights in `path`, or from random ones drawn for its config.json."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; left out: `model.path`."""
    param_dtype: Dtype = "float32"
    """Dtype of the trained parameters."""
    compute_dtype: Dtype | None = None
    """Dtype of activations and matmuls; left out: bfloat16 on accelerators, float32 on CPU."""
    export_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the exported weights; left out: what config.json says, else float32."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass computes again: nothing, all but matmul outputs, or each whole layer."""


class DataConfig(Section):
    train: str
    """Training rows: a file, folder or glob (JSONL, JSON, Parquet, CSV, TSV), or hub `org/name[@config][:split]`."""
    eval: str | None = None
    """Held-out rows, in the same ways."""
    format: Literal["messages", "conversations", "prompt_completion", "alpaca", "question_answer", "text"] | None = None
    """Format of the rows; left out: detected from the columns."""
    chat_template: str | None = None
    """Jinja file that replaces the tokenizer's chat template."""
    train_on: Literal["assistant", "last_turn", "all"] = "assistant"
    """Train every assistant turn, only the last one of a conversation, or every token."""
    seq_len: Annotated[int, Field(ge=2)] = 2048
    """Tokens per row, and the longest example that is kept."""
    packing: bool = True
    """Several examples share a row, sealed off from each other; otherwise one example per row."""
    overlong: Literal["drop", "error"] = "drop"
    """What happens to an example of more than `seq_len` tokens; what is dropped is counted and shown."""
    cache: str | None = None
    """Folder of the prepared data; left out: jaxsft in the user's cache folder."""


class TrainConfig(Section):
    batch_size: PositiveInt = 32
    """Rows per step, over all devices."""
    microbatch_size: PositiveInt | None = None
    """Rows per forward-backward, over all devices; divides `batch_size`; left out: the whole batch at once."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data."""
    steps: PositiveInt | None = None
    """Steps in all, instead of `epochs`."""
    log_every: PositiveInt = 10
    """Steps from one line of metrics to the next."""

    @model_validator(mode="after")
    def _checked(self) -> "TrainConfig":
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise ValueError("give `steps` or `epochs`, not both")
        if self.microbatch_size is not None and self.batch_size % self.microbatch_size:
            raise ValueError(f"microbatch_size {self.microbatch_size} does not divide batch_size {self.batch_size}")
        return self


class OptimConfig(Section):
    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Course of the learning rate after warm-up; wsd stays at the peak and decays over the last `decay_ratio`."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of warm-up, instead of `warmup_ratio`."""
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps in which wsd decays."""
    final_ratio: Fraction = 0.0
    """Learning rate at the end, as a share of the peak."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, not on norms and biases."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global norm of the gradient; null: no clipping."""
    moment_dtype: Dtype = "float32"
    """Dtype of the first and second moments."""

    @model_validator(mode="after")
    def _checked(self) -> "OptimConfig":
        if self.warmup_steps is not None and "warmup_ratio" in self.model_fields_set:
            raise ValueError("give `warmup_steps` or `warmup_ratio`, not both")
        if self.schedule == "constant" and "final_ratio" in self.model_fields_set:
            raise ValueError("`final_ratio` has no effect with schedule 'constant'")
        if self.schedule != "wsd" and "decay_ratio" in self.model_fields_set:
            raise ValueError(f"`decay_ratio` has no effect with schedule {self.schedule!r}, only with 'wsd'")
        return self


class MeshConfig(Section):
    data: PositiveInt = 1
    """Devices that hold copies of the parameters and split the rows."""
    fsdp: PositiveInt | None = None
    """Devices that split the parameters and the rows; left out: all that the other axes leave over."""
    expert: PositiveInt = 1
    """Devices that split the experts and the rows."""
    context: PositiveInt = 1
    """Devices that split the positions of a row."""
    tensor: PositiveInt = 1
    """Devices that split heads, MLP width and vocabulary."""


class EvalConfig(Section):
    every: PositiveInt | None = None
    """Steps between evaluations; left out: only before and after training."""
    examples: PositiveInt | None = None
    """Evaluate on the first so many rows of `data.eval`; left out: on all."""
    samples: Annotated[int, Field(ge=0)] = 3
    """Held-out prompts whose answers are shown, before and after training."""
    exact_match: bool = False
    """Also generate an answer to every held-out prompt and report the share that is exactly right."""
    max_new_tokens: PositiveInt = 128
    """Longest generated answer."""


class CheckpointConfig(Section):
    every: PositiveInt = 100
    """Steps between checkpoints; one is always saved at the end."""
    keep: PositiveInt = 2
    """Newest checkpoints kept; the one with the best held-out loss is kept besides."""


class Config(Section):
    run_dir: str | None = None
    """Folder of the run; left out: `runs/` and the name of the config file."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of packing, order of rows, and random weights."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _checked(self) -> "Config":
        if self.data.eval is None and self.eval.model_fields_set:
            keys = ", ".join(f"eval.{key}" for key in sorted(self.eval.model_fields_set))
            raise ValueError(f"{keys}: no effect without held-out rows; give data.eval")
        return self


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers (`1e-3` is a number) and no silently repeated keys."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def load_config(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies overrides such as `optim.learning_rate=1e-4`, and validates.

    Raises:
        ConfigError: every mistake in one report; unknown keys come with the nearest known ones.
    """
    path = pathlib.Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:  # a bad date or key is no YAMLError
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys, but this file holds a {type(tree).__name__}")
    problems = [problem for override in overrides if (problem := _apply_override(tree, override))]
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems += [_describe(problem) for problem in error.errors()]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{path}: {len(problems)} mistake{'s' * (len(problems) > 1)} in the config:\n{listed}")
    if config.run_dir is None:
        config = config.model_copy(update={"run_dir": f"runs/{path.stem}"})
    return config


def dump_config(config: Config) -> str:
    """The resolved config as YAML that reproduces the run; keys whose default was taken and derived are included."""
    tree = config.model_dump()
    # Of two keys that exclude each other, only the one in force may be written.
    if config.train.steps is not None:
        del tree["train"]["epochs"]
    if config.optim.warmup_steps is not None:
        del tree["optim"]["warmup_ratio"]
    if config.optim.schedule != "wsd":
        del tree["optim"]["decay_ratio"]
    if config.optim.schedule == "constant":
        del tree["optim"]["final_ratio"]
    if config.data.eval is None:
        del tree["eval"]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def config_changes(dumped: str, config: Config) -> list[str]:
    """What differs between a dumped config and this one, as `key: before -> now`."""

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {
            key: value
            for name, part in tree.items()
            for key, value in flat(part, f"{prefix}.{name}".strip(".")).items()
        }

    before, now = flat(yaml.safe_load(dumped)), flat(yaml.safe_load(dump_config(config)))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys]


def config_keys() -> list[tuple[str, str, str, str]]:
    """Every leaf key: (`section.key`, type, default, meaning)."""
    rows = []
    for key, field in _leaves(Config):
        default = "required" if field.is_required() else yaml.safe_dump(field.default).split("\n")[0]
        rows.append((key, _type_text(field.annotation), default, " ".join((field.description or "").split())))
    return rows


def _leaves(section: type[Section], prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            leaves += _leaves(field.annotation, f"{prefix}{name}.")
        else:
            leaves.append((prefix + name, field))
    return leaves


def _type_text(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_text(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " | ".join(get_args(annotation))
    if get_args(annotation):
        return " | ".join(_type_text(arg) for arg in get_args(annotation) if arg is not type(None))
    return annotation.__name__


def _apply_override(tree: dict, override: str) -> str | None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        return f"{override!r}: an override is written key=value, such as optim.learning_rate=1e-4"
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        return f"{override!r}: the value is not readable as YAML: {' '.join(str(error).split())}"
    *sections, leaf = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            return f"{override!r}: {section} is a value, not a section"
    tree[leaf] = value
    return None


def _describe(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    given = problem["input"]
    known = [name for name, _ in _leaves(Config)]
    if problem["type"] == "extra_forbidden":
        # A key of the right name in the wrong section is nearer than one that is merely spelt alike.
        leaf = key.rsplit(".", 1)[-1]
        near = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
        near = near or difflib.get_close_matches(key, known, n=2, cutoff=0.6)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `python run.py keys` lists them all"
        return f"{key}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"{key}: required, not given"
    if problem["type"] == "literal_error":
        near = difflib.get_close_matches(str(given), re.findall(r"'([^']*)'", problem["ctx"]["expected"]), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{key}: {given!r} given, expected {problem['ctx']['expected']}{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {given!r} given; {message[0].lower()}{message[1:]}"
