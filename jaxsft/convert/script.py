"""What a Python script of another trainer says: the values that stand in it, of the calls that train.

In: its text. Out: key -> value by TRL's names, and sentences on what is computed, or chosen among the rows, which the
values alone do not say. It is read and never run.
"""

import ast
import contextlib
import pathlib
import re
from typing import Any

from jaxsft.config import ConfigError
from jaxsft.foreign_keys import is_secret

CALLS: dict[str, dict[str, str]] = {
    "SFTConfig": {},
    "TrainingArguments": {},
    "Seq2SeqTrainingArguments": {},
    "ModelConfig": {},
    "ScriptArguments": {},
    "LoraConfig": {
        "r": "lora_r",
        "target_modules": "lora_target_modules",
        "modules_to_save": "lora_modules_to_save",
        "rank_pattern": "lora_rank_pattern",
        "alpha_pattern": "lora_alpha_pattern",
        "task_type": "lora_task_type",
        "bias": "lora_bias",
    },
    "BitsAndBytesConfig": {},
    "EarlyStoppingCallback": {},
    "SFTTrainer": {"model": "model_name_or_path"},
}
"""Calls in a script whose arguments count -> arguments that have another name among TRL's."""

_BY_PLACE: dict[str, tuple[str, ...]] = {
    "SFTConfig": ("output_dir",),
    "TrainingArguments": ("output_dir",),
    "Seq2SeqTrainingArguments": ("output_dir",),
    "EarlyStoppingCallback": ("early_stopping_patience", "early_stopping_threshold"),
    "SFTTrainer": ("model",),
}
"""What their arguments are called that are given without a name."""

_OTHERS = re.compile(
    "(DPO|GRPO|KTO|PPO|RLOO|ORPO|CPO|BCO|GKD|XPO|TPO|PRM|Reward|OnlineDPO|NashMD|AsyncGRPO|SDFT|SDPO|SSD|GOLD)"
    "(Config|Trainer)"
)
"""Calls of other methods than supervised fine-tuning."""

_OF_TRAINER = ("model", "max_seq_length", "packing", "dataset_text_field", "neftune_noise_alpha", "dataset_kwargs")
"""Arguments of `SFTTrainer` that say something; older versions had some of SFTConfig's."""


def from_python(text: str, path: pathlib.Path, missing: list[str]) -> dict[str, Any]:
    """The arguments of `CALLS`; those that are computed go to `missing`."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as Python: {error}") from None
    values = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    theirs: dict[str, Any] = {}
    loaded: list[dict[str, Any]] = []
    changed: list[str] = []
    computed: list[tuple[str, str]] = []
    split = None
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if _OTHERS.fullmatch(called):
            raise ConfigError(f"{path}: {called}: supervised fine-tuning alone is trained here (SFTConfig)")
        if called in CALLS:
            given = [*zip(_BY_PLACE.get(called, ()), call.args, strict=False)]
            given += [(keyword.arg or "**", keyword.value) for keyword in call.keywords]
            for argument, value in given:
                if called == "SFTTrainer" and argument == "train_dataset":
                    split = _split_of(value, values)
                if called == "SFTTrainer" and argument == "eval_dataset" and not _is_none(value):
                    missing.append(f"data.eval: the rows of SFTTrainer(eval_dataset={ast.unparse(value)[:40]})")
                if called == "SFTTrainer" and argument not in _OF_TRAINER:
                    continue
                name = CALLS[called].get(argument, argument)
                try:
                    theirs[name] = _model_name(value, values) if called == "SFTTrainer" and argument == "model" else (
                        _literal(value, values)
                    )  # fmt: skip
                except ValueError:
                    is_shown = isinstance(value, ast.Name) or not (is_secret(argument) or argument == "**")
                    shown = ast.unparse(value)[:40] if is_shown else "..."
                    computed.append((name, f"{called}({argument}={shown})"))
            if called == "LoraConfig":
                theirs["use_peft"] = True
            if called == "EarlyStoppingCallback" and "early_stopping_patience" not in [name for name, _ in given]:
                theirs["early_stopping_patience"] = 1  # what transformers takes
        elif called == "load_dataset":
            loaded.append(_dataset(call, values))
        elif called == "from_pretrained" and (kind := _class_of(call)):
            with contextlib.suppress(ValueError):
                theirs.setdefault(kind, _pretrained(call, values))
        elif called in _OF_ROWS and isinstance(call.func, ast.Attribute) and _of_name(call.func) not in _NO_ROWS:
            changed.append(f".{called}({', '.join(ast.unparse(one) for one in call.args)[:40]})")
    first = next((dataset for dataset in loaded if dataset), {})
    if split is not None and "dataset_name" in first:
        first.setdefault("dataset_train_split", split)
    if not theirs.keys() & {"dataset_name", "datasets"}:
        theirs |= first
    if loaded[1:]:
        names = ", ".join(str(_path_of(one) or "a computed one") for one in loaded if one is not first)
        missing.append(f"data.train, data.eval: load_dataset is called {len(loaded)} times; left out: {names}")
    if loaded and changed:
        missing.append(f"data.train: the script chooses or changes rows by {', '.join(dict.fromkeys(changed))}, which "
                       "is not done here; org/name:train[:100] is a part, or write such rows into a file")  # fmt: skip
    if not theirs:
        raise ConfigError(f"{path}: no SFTConfig, TrainingArguments or LoraConfig with values is called in it")
    missing += [f"{said}: no value that stands in the script" for name, said in computed if name not in theirs]
    return theirs


def _literal(node: ast.expr, values: dict[str, ast.expr], depth: int = 0) -> Any:
    """The value of an expression, of names that are given one, and of `torch.bfloat16` and the like their last name.

    Raises:
        ValueError: it is computed.
    """
    if depth > 20:
        raise ValueError("a name that stands for itself")
    if isinstance(node, ast.Name) and node.id in values:
        return _literal(values[node.id], values, depth + 1)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        return node.attr
    if isinstance(node, ast.Dict) and all(node.keys):
        keys = [_literal(key, values, depth + 1) for key in node.keys if key is not None]
        return dict(zip(map(str, keys), (_literal(value, values, depth + 1) for value in node.values), strict=True))
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_literal(one, values, depth + 1) for one in node.elts]
    try:
        value = ast.literal_eval(node)
    except (TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not (value is None or isinstance(value, str | int | float)):
        raise ValueError(f"a {type(value).__name__}")
    return value


_OF_ROWS = ("select", "filter", "take", "skip", "shard", "train_test_split", "map")
"""Methods of a dataset after which its rows are others. Orders and columns are of no effect here."""

_NO_ROWS = ("np", "numpy", "jnp", "torch", "pd", "tf", "pool", "executor")
"""Names that have such methods and are no dataset."""

_SAME_ROWS = frozenset(
    ["cache_dir", "token", "use_auth_token", "trust_remote_code", "num_proc", "keep_in_memory", "verification_mode",
     "download_mode", "download_config", "save_infos", "features", "storage_options", "ignore_verifications",
     "streaming"]
)  # fmt: skip
"""Arguments of `load_dataset` by which the rows are no others."""


def _class_of(call: ast.Call) -> str | None:
    """What `CLASS.from_pretrained` names, by its class: the model, the tokenizer, or nothing that is taken."""
    name = _of_name(call.func)
    if name.endswith(("Tokenizer", "TokenizerFast")):
        return "tokenizer_name"
    return "model_name_or_path" if "Model" in name else None


def _of_name(function: ast.expr) -> str:
    """The name before the last dot; empty: there is none."""
    owner = function.value if isinstance(function, ast.Attribute) else None
    return owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")


def _pretrained(call: ast.Call, values: dict[str, ast.expr]) -> str:
    """The name that a call of `from_pretrained` gives.

    Raises:
        ValueError: it is computed.
    """
    named = ("pretrained_model_name_or_path", "model_name")
    nodes = [*call.args[:1], *(keyword.value for keyword in call.keywords if keyword.arg in named)]
    name = _literal(nodes[0], values) if nodes else None
    if not isinstance(name, str):
        raise ValueError("no name of a model")
    return name


def _model_name(node: ast.expr, values: dict[str, ast.expr]) -> Any:
    """The model that a trainer is given: its name, or what `from_pretrained` was called with.

    Raises:
        ValueError: it is computed.
    """
    named = values.get(node.id) if isinstance(node, ast.Name) else node
    if isinstance(named, ast.Call) and isinstance(named.func, ast.Attribute) and named.func.attr == "from_pretrained":
        return _pretrained(named, values)
    return _literal(node, values)


def _split_of(node: ast.expr, values: dict[str, ast.expr]) -> str | None:
    """The split that `rows["test"]` takes; None: no other part of the rows than all."""
    node = values.get(node.id, node) if isinstance(node, ast.Name) else node
    of = node.slice.value if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) else None
    return of if isinstance(of, str) else None


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _dataset(call: ast.Call, values: dict[str, ast.expr]) -> dict[str, Any]:
    """What `load_dataset` names, all that chooses among its rows included; nothing where that is computed, so that the
    rows are missing."""
    try:
        places = ("path", "name", "data_dir", "data_files", "split")
        given = dict(zip(places, (_literal(arg, values) for arg in call.args), strict=False))
        given |= {keyword.arg or "**": _literal(keyword.value, values) for keyword in call.keywords
                  if keyword.arg not in _SAME_ROWS}  # fmt: skip
    except ValueError:
        return {}
    given = {name: value for name, value in given.items() if value is not None}
    streams = {"dataset_streaming": True} if any(
        keyword.arg == "streaming" and ast.unparse(keyword.value) == "True" for keyword in call.keywords
    ) else {}  # fmt: skip
    if not isinstance(given.get("path"), str):
        return {}
    if given.keys() <= {"path", "name", "split"} and all(isinstance(value, str) for value in given.values()):
        names = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
        return {names[name]: value for name, value in given.items()} | streams
    return {"datasets": [given]} | streams


def _path_of(theirs: dict[str, Any]) -> str | None:
    """What `_dataset` found, by its path and split."""
    entry = theirs["datasets"][0] if "datasets" in theirs else theirs
    path = entry.get("path") or entry.get("dataset_name")
    split = entry.get("split") or entry.get("dataset_train_split")
    return f"{path}:{split}" if path and isinstance(split, str) else path
