"""What a file of another trainer says: YAML, JSON, a saved command line, or a Python script; and whose it is.

In: a path. Out: key -> value, and the project. Scripts are read and never run: only values that stand in them count.
"""

import datetime
import pathlib
import re
import shlex
from typing import Any, NamedTuple

import yaml

from jaxsft.config import ConfigError
from jaxsft.config_files import Loader
from jaxsft.convert.script import from_python
from jaxsft.disk.writing import at_home, is_file
from jaxsft.foreign_keys import FOREIGN

PROJECTS = ("trl", "axolotl", "llama-factory")

MARKS: dict[str, frozenset[str]] = {
    "axolotl": frozenset(["base_model", "sequence_len", "sample_packing", "val_set_size"]),
    "llama-factory": frozenset(
        ["finetuning_type", "cutoff_len", "dataset_dir", "lora_rank", "lora_target", "stage", "template", "dataset",
         "train_dataset", "model_class", "export_dir", "neat_packing", "train_on_prompt", "mask_history"]
    ),
    "trl": frozenset(
        ["model_name_or_path", "dataset_name", "dataset_mixture", "dataset_mixer", "assistant_only_loss", "use_peft",
         "per_device_train_batch_size", "num_train_epochs", "max_length", "max_seq_length", "dataset_text_field",
         "completion_only_loss", "lora_r", "gradient_accumulation_steps", "lr_scheduler_type", "output_dir"]
    ),
}  # fmt: skip
"""Project -> keys by which its configs are known; the first project that has one."""

MOST = 2**22
"""Bytes of a file that is read."""


class Read(NamedTuple):
    """A config of another trainer."""

    project: str
    theirs: dict[str, Any]
    notes: list[str]
    """What is to be known of how it was read."""
    missing: list[str]
    """What stands in a script without a value."""


def read(file: str, project: str | None) -> Read:
    """Reads a file.

    Args:
        file: its path.
        project: whose it is; None: found from its keys.

    Raises:
        ConfigError: it cannot be read, or is no config of theirs.
    """
    path = at_home(file)
    if path.is_dir():
        raise ConfigError(f"{path}: a folder; give the config file in it")
    if not path.exists():
        raise ConfigError(f"{path}: no such file; a YAML, JSON, saved command line or Python script of TRL, axolotl "
                          "or LLaMA-Factory is expected")  # fmt: skip
    if not is_file(path):
        raise ConfigError(f"{path}: no regular file")
    try:
        data = path.read_bytes()
        if len(data) > MOST:
            raise ConfigError(f"{path}: {len(data):,} bytes, which is no config")
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as text: {error}") from None
    notes: list[str] = []
    missing: list[str] = []
    if path.suffix == ".py":
        theirs = from_python(text, path, missing)
        project = project or "trl"  # whose classes `CALLS` are
        notes.append("a script: only values that stand in it were read, of SFTConfig, LoraConfig and the like")
    elif path.suffix in (".sh", ".bash", ".txt", ".slurm", ".sbatch", ".cmd"):
        theirs = _from_command(text, path)
    else:
        theirs = _from_yaml(text, path, notes)
    return Read(project or _whose(theirs, path), theirs, notes, missing)


def _whose(theirs: dict[str, Any], path: pathlib.Path) -> str:
    if isinstance(theirs.get("model"), dict) and isinstance(theirs.get("data"), dict):
        raise ConfigError(f"{path}: this is a config of ours already: python run.py train {path}")
    if "compute_environment" in theirs or "zero_optimization" in theirs:
        raise ConfigError(f"{path}: a config of accelerate or DeepSpeed, of which nothing is needed: all devices are "
                          "used, and mesh.fsdp cuts weights and rows over them")  # fmt: skip
    for project, marks in MARKS.items():
        if marks & theirs.keys():
            return project
    known = [name for name in theirs if name in FOREIGN]
    names = ", ".join(map(str, list(theirs)[:6])) or "none"
    if not known:
        raise ConfigError(f"{path}: no key of TRL, axolotl or LLaMA-Factory is in it; its keys are: {names}")
    raise ConfigError(f"{path}: whose config it is does not follow from its keys ({names}): give --from "
                      f"{' or '.join(PROJECTS)}")  # fmt: skip


class _Lenient(Loader):
    """As others read YAML: of a key that is given twice, the last one counts."""


def _mapping(loader: Loader, node: yaml.MappingNode) -> dict:
    return loader.construct_mapping(node, deep=True)


_Lenient.add_constructor("tag:yaml.org,2002:map", _mapping)


_UNREADABLE = (yaml.YAMLError, ValueError, TypeError, RecursionError)
"""What the reader of YAML raises: a date that is none is a ValueError, a key that is a list a TypeError."""


def _from_yaml(text: str, path: pathlib.Path, notes: list[str], *, is_named: bool = False) -> dict[str, Any]:
    """The keys of a YAML or JSON file; one that holds a command line is read as such, but not where it is what the
    `--config` of a command names, which might then be the same command again."""
    try:
        node = yaml.compose(text, _Lenient)
        _check_aliases(node)
        theirs = yaml.load(text, _Lenient)  # noqa: S506 (a SafeLoader)
    except _UNREADABLE as error:
        if not is_named and ("trl " in text or ".py" in text.split("\n", 1)[0]):
            return _from_command(text, path)
        raise ConfigError(f"{path}: not readable as YAML: {_why(error)}") from None
    if isinstance(theirs, str) and "--" in theirs and not is_named:
        return _from_command(text, path)
    if not isinstance(theirs, dict) or not theirs:
        kind = "nothing" if theirs is None or theirs == {} else f"a {type(theirs).__name__}"
        raise ConfigError(f"{path}: a mapping of keys is expected, but this file holds {kind}")
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        notes += [f"{key} is given twice; the last one counts, as with them" for key in twice]
    return {str(key): value for key, value in theirs.items()}


def _why(error: Exception) -> str:
    """What is wrong with a YAML, and where; without the line itself, in which a token may stand."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        at = f" in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        return f"{error.context}, {error.problem}{at}" if error.context else f"{error.problem}{at}"
    return " ".join(str(error).split())


def _check_aliases(node: yaml.Node | None) -> None:
    """Refuses aliases by which a few lines stand for more than any config has, or for themselves.

    Raises:
        ValueError: they do.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 10**9  # of what stands in itself
            parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else (
                node.value if isinstance(node, yaml.SequenceNode) else []
            )  # fmt: skip
            sizes[id(node)] = 1 + sum(size(part) for part in parts)
        return sizes[id(node)]

    if node is not None and size(node) > 100_000:
        raise ValueError("its aliases stand for more values than a config has")


def _from_command(text: str, path: pathlib.Path) -> dict[str, Any]:
    """`trl sft --key value ...` or `python sft.py --key value ...`, over several lines or behind a launcher."""
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as a command line: {error}") from None
    starts = [at for at, word in enumerate(words) if word == "sft" or re.search(r"(^|/)\w*(sft|train)\w*\.py$", word)]
    if not starts:
        files = [word for word in words if word.endswith((".yaml", ".yml"))]
        hint = f"; give {files[0]} itself" if files else ""
        raise ConfigError(f"{path}: no `trl sft` and no `...sft.py` in this command line{hint}")
    theirs: dict[str, Any] = {}
    name = None
    for word in words[starts[0] + 1 :]:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name.startswith("no_") and name not in FOREIGN:
                name, equals, value = name[3:], "=", "false"
            theirs[name] = _typed(value) if equals else True
        elif word in ("&&", ";", "||", "|", ">", "2>&1", "&"):
            break
        elif name is not None:
            given = theirs[name]
            earlier = given if isinstance(given, list) else [given]
            theirs[name] = _typed(word) if given is True else [*earlier, _typed(word)]
    if not theirs:
        raise ConfigError(f"{path}: no --key value behind {words[starts[0]]}")
    return _with_file(theirs, path)


def _with_file(theirs: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """With what stands in the file that `--config` names, before which the arguments go."""
    if not isinstance(theirs.get("config"), str):
        return theirs
    file = path.parent / theirs.pop("config")
    if not is_file(file):
        raise ConfigError(f"{path}: --config {file}: no such file; its keys are needed too")
    try:
        text = file.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise ConfigError(f"{path}: --config {file}: not readable: {error}") from None
    return _from_yaml(text, file, [], is_named=True) | theirs


def _typed(word: str) -> Any:
    """A word as YAML reads it, but for dates, which nothing of theirs is."""
    try:
        value = yaml.load(word, _Lenient)  # noqa: S506 (a SafeLoader)
    except _UNREADABLE:
        return word
    return word if isinstance(value, datetime.date) else value
