"""adapter_config.json: what it says of an adapter, read without trust; what PEFT means by it; and the one we write.

In: a folder. Out: `Settings`, or one error that names every field that asks for what is not computed here. A field that
this file does not know must be empty, so that nothing that a later PEFT computes is passed over in silence.
"""

import math
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxsft.config import ConfigError
from jaxsft.folders.peft.places import Place
from jaxsft.folders.weights.stored import load_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]

NO_ACCOUNT = {
    *("auto_mapping", "inference_mode", "peft_version", "megatron_core", "qalora_group_size", "runtime_config"),
    *("eva_config", "loftq_config", "corda_config", "lora_ga_config"),
}
"""Fields that say nothing of what a finished adapter computes; of initialisations `init_lora_weights` says it."""

KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base model as it is; others subtract what A B is at first (PiSSA, OLoRA, CorDA, ...),
so that A and B fit another base than the one that is named."""

NOT_HERE = {
    "bias": ("none", "biases are not trained here"),
    "modules_to_save": (None, "modules that were trained whole are not read; merge the adapter with PEFT"),
    "ensure_weight_tying": (False, "adapters of the embedding that its projection shares are not read"),
}
"""Field -> the one value that is read, and why."""


class Settings(BaseModel):
    """What we read of an adapter_config.json."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    base_model_name_or_path: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    r: PositiveInt
    lora_alpha: PositiveFloat
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, PositiveFloat] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    trainable_token_indices: dict[str, list[TokenId]] | list[TokenId] | None = None

    def rank(self, name: str) -> int:
        """Of a place."""
        return _patterned(self.rank_pattern or {}, name, self.r)

    def scale(self, name: str) -> float:
        """Of a place: alpha / rank, with use_rslora alpha / sqrt(rank)."""
        rank, alpha = self.rank(name), _patterned(self.alpha_pattern or {}, name, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, place: Place) -> bool:
        """Whether PEFT puts an adapter on a place."""
        if place.kind == "parameter":
            return _ends(place.name, self.target_parameters or [])
        name, modules = place.name, self.target_modules
        if self.exclude_modules and _fits(name, self.exclude_modules):
            return False
        if modules is None:
            return False
        if isinstance(modules, str) and modules.lower() == "all-linear":
            return place.kind in ("linear", "conv") and not place.is_head
        if not _fits(name, modules):
            return False
        return isinstance(modules, str) or name in modules or self._is_layer(name)

    def _is_layer(self, name: str) -> bool:
        """What `layers_to_transform` says of a module that a list of targets names by its end."""
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        patterns = self.layers_pattern or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = next(filter(None, (re.match(rf"(?:^|.*?\.){each}\.(\d+)\.", name) for each in patterns)), None)
        return found is not None and int(found.group(1)) in ([wanted] if isinstance(wanted, int) else wanted)


def _fits(name: str, words: Sequence[str] | str) -> bool:
    return bool(re.fullmatch(words, name)) if isinstance(words, str) else _ends(name, words)


def _ends(name: str, words: Collection[str]) -> bool:
    return name in words or any(name.endswith(f".{word}") for word in words)


def _patterned(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def read_settings(folder: pathlib.Path) -> Settings:
    """Reads and checks the adapter_config.json of a folder.

    Raises:
        ConfigError: all that is wrong with it, each by the name of its field.
    """
    path = folder / CONFIG_FILE
    fields = load_json(path)
    problems = []
    try:
        settings = Settings.model_validate(fields)
    except ValidationError as error:
        for each in error.errors():
            key = str(each["loc"][0])
            given = "not given" if each["type"] == "missing" else f"{str(fields.get(key))[:60]!r} given"
            problems.append(f"{key}: {given}, {each['msg'][0].lower()}{each['msg'][1:]}")
    for key, (expected, why) in NOT_HERE.items():
        if fields.get(key, expected) not in (expected, None):
            problems.append(f"{key}: {str(fields[key])[:60]!r} given; {why}")
    scheme = fields.get("init_lora_weights", True)
    if not isinstance(scheme, str | bool) or scheme not in KEEPS_BASE:
        problems.append(
            f"init_lora_weights: {str(scheme)[:60]!r} given, which changes the base model so that the adapter fits no "
            "other; convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    known = {*Settings.model_fields, *NOT_HERE, *NO_ACCOUNT, "init_lora_weights"}
    problems += [
        f"{str(key)[:60]}: {str(value)[:60]!r} given, which is not known here"
        for key, value in fields.items()
        if key not in known and value
    ]
    for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        problems += [
            f"{key}: {text[:60]!r} is no regular expression: {error}"
            for text in _regexes(key, fields.get(key))
            if (error := _regex_error(text))
        ]
    if problems:
        raise ConfigError("\n  ".join([f"{path}: this adapter cannot be read:", *dict.fromkeys(problems)]))
    return settings


def _regexes(key: str, value: Any) -> list[str]:
    """Those texts of a field that are regular expressions: of targets only a single text is one."""
    if isinstance(value, str):
        return [value] if value.lower() != "all-linear" else []
    is_all = key in ("layers_pattern", "rank_pattern", "alpha_pattern")
    return [each for each in value if isinstance(each, str)] if is_all and isinstance(value, list | dict) else []


def _regex_error(text: str) -> str | None:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return None
