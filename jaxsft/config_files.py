"""Config files: from a YAML file and overrides to a validated `Config`, and back.

In: a YAML file and overrides such as `optim.learning_rate=1e-4`. Out: a `Config`, or one `ConfigError` that lists all
mistakes, with the nearest known key beside an unknown one. Also the way back (`dump_config`), what differs between two
configs, and the list of all keys. What can be set, and what it means, is `config.py`.
"""

import copy
import difflib
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from jaxsft.config import (
    EXCLUSIVE,
    KEYS_OF,
    SHARES,
    USUAL,
    Config,
    ConfigError,
    GroupConfig,
    OptimConfig,
    Section,
    SourceConfig,
    as_sources,
    idle_keys,
)
from jaxsft.disk.writing import place
from jaxsft.foreign_keys import looks_foreign, of_others

SHORTEST = {
    "model": "model: {path: ./my-model}",
    "data": "data: {train: ./train.jsonl}",
    "train": "train: {epochs: 2}",
    "optim": "optim: {learning_rate: 2e-5}",
    "loss": "loss: {label_smoothing: 0.1}",
    "lora": "lora: {rank: 16}",
    "mesh": "mesh: {fsdp: 8}",
    "eval": "eval: {every: 100}, with the rows under data.eval",
    "log": "log: {every: 10}",
    "checkpoint": "checkpoint: {every: 100}",
}
"""Section -> what one looks like."""

MOVED = {"train.log_every": "log.every"}
"""Keys that earlier versions had, and what they are called now."""


# Reading.


def load_config(
    source: str | pathlib.Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Config:
    """Reads a YAML file, or takes a dict; applies overrides such as `optim.learning_rate=1e-4`, and validates.

    Args:
        source: path of the file, or what one would hold.
        overrides: `key=value`, the value as in YAML. What they exclude, or leave without effect, is left out.
        say: is told what was left out so.

    Raises:
        ConfigError: every mistake in one report; unknown keys come with the nearest known ones.
    """
    config, problems = check_config(source, overrides, say=say)
    if config is None:
        raise mistakes("config" if isinstance(source, Mapping) else str(place(source)), problems)
    return config


def check_config(
    source: str | pathlib.Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Config | None, list[str]]:
    """As `load_config`, which tells mistakes by an error: the config, or None and all mistakes, a line each.

    Raises:
        ConfigError: the file is not there, or holds no mapping in YAML.
    """
    path: Any = "config" if isinstance(source, Mapping) else place(source)
    tree = copy.deepcopy(dict(source)) if isinstance(source, Mapping) else _read_yaml(path)
    if looks_foreign(tree) and not isinstance(source, Mapping):
        raise ConfigError(
            f"{path}: this is a config of another trainer; `python run.py convert {path} -o NEW.yaml` makes one of ours"
        )
    idle_before = set(_idle_keys(tree))
    problems = [problem for override in overrides if (problem := _apply_override(tree, override))]
    if left_out := _leave_out(tree, overrides, idle_before):
        say(f"{path}: left out because of the command line: {', '.join(left_out)}")
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        # A value that fits no member of a union is reported once for each member; only the first report is shown.
        described = [(_key(problem), _describe(problem)) for problem in error.errors()]
        problems += [text for at, (key, text) in enumerate(described) if not key or key not in dict(described[:at])]
    if problems:
        return None, problems
    if config.run_dir is None and not isinstance(source, Mapping):
        config = config.model_copy(update={"run_dir": f"runs/{path.stem}"})
    return config, []


def mistakes(where: str, problems: Sequence[str]) -> ConfigError:
    """One error of all mistakes in a config."""
    listed = "\n".join(f"  {problem}" for problem in problems)
    return ConfigError(f"{where}: {len(problems)} mistake{'s' * (len(problems) > 1)} in the config:\n{listed}")


def load_run_config(
    run_dir: str, overrides: Sequence[str] = (), *, say: Callable[[str], None] = lambda text: None
) -> Config:
    """The config of a run, from its folder; arguments as of `load_config`.

    Raises:
        ConfigError: it is not the folder of a run; or as `load_config`.
    """
    folder = place(run_dir).resolve()
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{run_dir}: not the folder of a run, which has a config.yaml")
    if given := next((each for each in overrides if each.partition("=")[0] == "run_dir"), None):
        raise ConfigError(f"{given}: the run is that of {run_dir}; leave run_dir out, or name the other run")
    config = load_config(str(folder / "config.yaml"), overrides, say=say)
    return config.model_copy(update={"run_dir": str(folder)})


def _read_yaml(path: pathlib.Path) -> dict[str, Any]:
    """What a file holds."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:  # a bad date or key is no YAMLError
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys, but this file holds a {type(tree).__name__}")
    return tree


def _apply_override(tree: dict, override: str) -> str | None:
    """Sets one key of the tree that a YAML file gave; says what is wrong with the override, None if nothing is."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return f"{override!r}: an override is written key=value, such as optim.learning_rate=1e-4"
    try:
        value = yaml.load(text, Loader)  # noqa: S506 (a SafeLoader)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        return f"{override!r}: the value is not readable as YAML: {' '.join(str(error).split())}"
    *sections, leaf = key.split(".")
    for section, inner in zip(sections, [*sections, leaf][1:], strict=True):
        found = tree.get(section)
        if inner.isdigit():
            # Sources may be given as a path, a list or one mapping; by number, as an override has them, they are a
            # mapping of such.
            if isinstance(found, dict) and not all(str(name).isdigit() for name in found):
                found = {0: found}
            elif isinstance(found, str | list):
                found = dict(enumerate(as_sources(found)))
            count = len(found or {})
            if inner != str(int(inner)) or int(inner) > count:
                there = f"there are {count}, from 0 on" if count else "there is none yet; the first is 0"
                return f"{override!r}: no number {inner} of {section}: {there}"
        tree[section] = {str(name): value for name, value in (found or {}).items()} if _is_open(found) else found
        tree = tree[section]
        if not isinstance(tree, dict):
            return f"{override!r}: {section} is a value, not a section"
    tree[leaf] = value
    return None


def _is_open(found: Any) -> bool:
    return found is None or isinstance(found, dict)


def _leave_out(tree: dict, overrides: Sequence[str], idle_before: set[str]) -> list[str]:
    """Takes out of a tree what overrides have put something else in the place of, and what now says nothing.

    With `epochs: 2` in the file and `train.steps=8`, train.epochs goes; with `optim.name=sgd`, `beta2: 0.9` does. What
    overrides say themselves stays, to be refused.
    """
    given = [override.partition("=")[0] for override in overrides]
    left_out = []

    def leave_out(key: str, reason: str) -> None:
        is_said = any(each == key or each.startswith(f"{key}.") or key.startswith(f"{each}.") for each in given)
        value = _value_at(tree, key)
        if is_said or not _asks(key, value):
            return
        *sections, leaf = key.split(".")
        _section_at(tree, sections).pop(leaf)
        left_out.append(f"{key}{'' if isinstance(value, dict) else f': {value}'} ({reason})")

    # A section that is given as a whole gives the keys in it.
    values = {key: _value_at(tree, key) for key in given}
    for key, inner in list(values.items()):
        values |= {f"{key}.{leaf}": each for leaf, each in inner.items()} if isinstance(inner, dict) else {}
    for key, value in values.items():
        if not _asks(key, value):
            continue
        for group in (*EXCLUSIVE, *_shares(key)):
            if any(key == each or key.startswith(f"{each}.") for each in group):
                for other in group:
                    if not (key == other or key.startswith(f"{other}.")):
                        leave_out(other, f"{key} is given")
    for key in _idle_keys(tree):
        if key not in idle_before:
            leave_out(key, "no effect now")
    return left_out


def _asks(key: str, value: Any) -> bool:
    """Whether a value says something; of steps and shares, 0 is a number like others."""
    return value is not None and not (key.startswith("loss.") and not value)


def _shares(key: str) -> list[tuple[str, ...]]:
    """The keys of a source that exclude each other, where `key` is one of them."""
    source, _, leaf = key.rpartition(".")
    is_share = leaf in SHARES and (source == "data.train" or source.startswith("data.train."))
    return [tuple(f"{source}.{each}" for each in SHARES)] if is_share else []


def _idle_keys(tree: dict) -> list[str]:
    """Those of a tree that may still hold mistakes."""

    def value(key: str) -> Any:
        section, _, leaf = key.partition(".")
        fields = Config.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        if (found := _value_at(tree, key)) is not None:
            return found
        usual = USUAL.get(optimizer, {}) if section == "optim" else {}
        return usual.get(leaf, fields[leaf].default)

    optimizer = _value_at(tree, "optim.name") or OptimConfig().name
    return idle_keys(value) if isinstance(optimizer, str) and optimizer in KEYS_OF else []


def _value_at(tree: Any, key: str) -> Any:
    """What a tree holds at a key such as "optim.name"; None where it holds nothing, or no section on the way."""
    *sections, leaf = key.split(".")
    section = _section_at(tree, sections)
    return section.get(leaf)


def _section_at(tree: Any, sections: Sequence[str]) -> dict:
    for name in sections:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


class Loader(yaml.SafeLoader):
    """YAML 1.2 numbers (`1e-3` is a number) and no silently repeated keys."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def _mapping_without_duplicates(loader: Loader, node: yaml.MappingNode) -> dict:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def keys_called(name: str) -> list[str]:
    """Our keys whose last part is this one's, however dashes and capitals are."""
    leaf = name.rsplit(".", 1)[-1].replace("-", "_").lower()
    return [key for key, _ in _leaves(Config) if key.rsplit(".", 1)[-1] == leaf]


def _key(problem: Any) -> str:
    """The config key of a mistake. pydantic also names the member of a union, in brackets, which is left out."""
    return ".".join(str(part) for part in problem["loc"] if "[" not in str(part))


def _describe(problem: Any) -> str:
    """A mistake that pydantic found, as one line: the key, what was given, what was expected."""
    key = _key(problem)
    given = problem["input"]
    known = [name for name, _ in _leaves(Config)]
    if key in MOVED:
        return f"{key}: unknown key; it is called {MOVED[key]} now"
    if problem["type"] == "extra_forbidden":
        # First the keys of exactly this name in other sections, then what others call so, then what is spelt alike.
        near = keys_called(key)
        if not near and (foreign := of_others(key)):
            return f"{key}: unknown key; {foreign.told()}"
        near = near or difflib.get_close_matches(key, known, n=2, cutoff=0.6)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `python run.py keys` lists them all"
        return f"{key}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"{key}: required, not given"
    if problem["type"] == "literal_error":
        near = difflib.get_close_matches(str(given), re.findall(r"'([^']*)'", problem["ctx"]["expected"]), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{key}: {given!r} given, expected {problem['ctx']['expected']}{hint}"
    if problem["type"] in ("model_type", "dict_type") and key in SHORTEST:
        return f"{key}: {given!r} given, expected a section, such as {SHORTEST[key]}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {given!r} given; {message[0].lower()}{message[1:]}"


# Writing, comparing, listing.


def dump_config(config: Config) -> str:
    """The resolved config as YAML that reproduces the run; keys whose default was taken and derived are included."""
    tree = config.model_dump()
    # Keys that have no effect with the others, or exclude them, would be refused when the file is read again.
    for key in idle_keys(lambda key: _value_at(tree, key)):
        *sections, leaf = key.split(".")
        _section_at(tree, sections).pop(leaf, None)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def config_changes(dumped: str, config: Config) -> list[str]:
    """What differs between a dumped config and this one, as `key: before -> now`.

    Raises:
        ValueError, yaml.YAMLError: that is no text that `dump_config` has written.
    """
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(dumped, yaml.SafeLoader)):
        raise ValueError("it holds aliases, by which a few lines may stand for any number of keys")

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
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        if field.annotation in (list[SourceConfig], list[GroupConfig]):
            (item,) = get_args(field.annotation)
            leaves += [(prefix + name, field), *_leaves(item, f"{prefix}{name}.N.")]
        elif inner := next((kind for kind in kinds if issubclass(kind, Section)), None):
            leaves += _leaves(inner, f"{prefix}{name}.")
        else:
            leaves.append((prefix + name, field))
    return leaves


def _type_text(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_text(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " | ".join(get_args(annotation))
    if get_origin(annotation) in (list, dict):
        return f"{get_origin(annotation).__name__} of {_type_text(get_args(annotation)[-1])}"
    if get_args(annotation):
        return " | ".join(_type_text(arg) for arg in get_args(annotation) if arg is not type(None))
    return getattr(annotation, "__name__", "any")
