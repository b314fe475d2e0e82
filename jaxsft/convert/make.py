"""A config of another trainer becomes ours: the text of the file, and the report of what became of each key.

In: a path and, where its keys do not say it, whose it is. Out: `Converted`. Nothing is written here.
"""

import textwrap
from typing import Any, NamedTuple

import yaml

from jaxsft.config import ConfigError
from jaxsft.config_files import load_config
from jaxsft.convert.axolotl import convert_axolotl
from jaxsft.convert.conversion import Conversion, Taken, brief, flow
from jaxsft.convert.llama_factory import convert_llama_factory
from jaxsft.convert.reading import read
from jaxsft.convert.trl import convert_trl
from jaxsft.disk.writing import at_home

SECTIONS = ("model", "lora", "data", "train", "optim", "loss", "mesh", "eval", "log", "checkpoint")
"""In the order of the file; keys without a section stand before them."""


class Converted(NamedTuple):
    """What came of a file."""

    text: str
    """Our config, as YAML."""
    report: str
    missing: list[str]
    """What must be filled in; empty: the config can be used as it is."""
    template: str | None
    """The text of a chat template, to be written into the file that `text` names; None: there is none."""
    counts: dict[str, int]
    """Keys of theirs by what became of them: taken, other, without, idle, unknown."""


def convert(
    file: str, *, project: str | None = None, template_file: str = "chat_template.jinja", width: int = 80
) -> Converted:
    """Converts a file.

    Args:
        file: YAML, JSON, a saved command line or a Python script.
        template_file: where the text of a chat template will be written, if one stands in the config.
        project: "trl", "axolotl" or "llama-factory"; None: by its keys.
        width: columns of the report.

    Raises:
        ConfigError: it cannot be read, is no config of theirs, or of another method than supervised fine-tuning.
    """
    found = read(file, project)
    try:
        if found.project == "llama-factory":
            c = convert_llama_factory(found.theirs, beside=at_home(file).parent)
        else:
            c = {"trl": convert_trl, "axolotl": convert_axolotl}[found.project](found.theirs)
        c.missing += found.missing
        c.taken = [one._replace(value=template_file) if one.value is c.template_file else one for one in c.taken]
        _fit(c)
        unknown = c.close()
    except ConfigError as error:
        raise ConfigError("\n".join(f"{file}: {line}" for line in str(error).splitlines())) from None
    text = _as_yaml(c, file, _tree(c.taken))
    _check(text, c, file)
    other = {name for taken in c.taken if taken.note for name in taken.names}
    counts = {
        "taken": len({name for taken in c.taken for name in taken.names} - other),
        "other": len(other),
        "without": len(c.without),
        "idle": len(c.idle()),
        "unknown": len(unknown),
    }
    return Converted(text, _report(c, file, unknown, found.notes, counts, width), c.missing, c.template, counts)


def _fit(c: Conversion) -> None:
    """Leaves out what our config would refuse beside what else was taken."""
    for empty in [taken for taken in c.taken if taken.key == "data.train" and not taken.value]:
        c.taken.remove(empty)
        c.without |= dict.fromkeys(empty.names, "it names no rows")
        c.missing += [] if any(one.startswith("data.train") for one in c.missing) else ["data.train: the rows"]
    keys = {taken.key for taken in c.taken}
    if "data.eval" not in keys:
        _drop(c, "eval.", "held-out rows are not given (data.eval)")
        _drop(c, "checkpoint.export", "held-out rows are not given (data.eval)")
    if "loss.dft" in keys:
        _drop(c, "loss.label_smoothing", "not together with loss.dft")
    schedule = next((taken.value for taken in c.taken if taken.key == "optim.schedule"), "cosine")
    if schedule == "constant":
        _drop(c, "optim.final_ratio", "a constant rate does not fall")
    every = [taken.value for taken in c.taken if taken.key == "train.batch_size"]
    part = [taken.value for taken in c.taken if taken.key == "train.microbatch_size"]
    if every and part and every[0] % part[0]:
        _drop(c, "train.microbatch_size", "it does not divide train.batch_size")


def _drop(c: Conversion, begin: str, why: str) -> None:
    for taken in [taken for taken in c.taken if taken.key.startswith(begin)]:
        c.taken.remove(taken)
        remaining = {name for other in c.taken for name in other.names}
        c.without |= {name: f"{taken.key} is left out: {why}" for name in taken.names if name not in remaining}


def _tree(taken: list[Taken]) -> dict[str, Any]:
    """Section -> key -> (value, where it came from)."""
    tree: dict[str, Any] = {}
    for one in taken:
        section, _, leaf = one.key.rpartition(".")
        source = ", ".join(one.names) or ("not as there; see the report" if one.note else "")
        tree.setdefault(section, {})[leaf] = (one.value, source)
    return tree


def _as_yaml(c: Conversion, file: str, tree: dict[str, Any]) -> str:
    head = [f"Made from {file} ({c.project}) by `convert`; behind each key, theirs."]
    head += [f"to fill in: {sentence}" for sentence in c.missing]
    lines = [f"# {' '.join(sentence.split())}" for sentence in head]  # a line break would end the comment

    def put(leaf: str, value: Any, source: str, indent: str) -> list[str]:
        comment = f"  # {source or f'default of {c.project}'}"
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [
                f"{indent}{leaf}:{comment}",
                *(f"{indent}  - {flow(one['path'] if one.keys() == {'path'} else one)}" for one in value),
            ]
        if leaf == "eval" and isinstance(value, dict):
            return [f"{indent}{leaf}:{comment}", *(f"{indent}  {flow(n)}: {flow(v)}" for n, v in value.items())]
        return [f"{indent}{leaf}: {flow(value)}{comment}"]

    for leaf, (value, source) in tree.get("", {}).items():
        lines += put(leaf, value, source, "")
    for section in SECTIONS:
        if section in tree:
            lines.append(f"{section}:")
            for leaf, (value, source) in tree[section].items():
                lines += put(leaf, _shortest(leaf, value), source, "  ")
    return "\n".join(lines) + "\n"


def _shortest(leaf: str, value: Any) -> Any:
    """One source of a path alone is its path."""
    if leaf == "train" and isinstance(value, list) and len(value) == 1 and value[0].keys() == {"path"}:
        return value[0]["path"]
    return value


def _check(text: str, c: Conversion, file: str) -> None:
    """The config must load, as far as nothing is missing."""
    tree = yaml.safe_load(text)
    tree.setdefault("model", {}).setdefault("path", "to-fill-in")
    tree.setdefault("data", {}).setdefault("train", "to-fill-in")
    if isinstance(tree.get("lora"), dict):
        tree["lora"].setdefault("rank", 1)
    try:
        load_config(tree)
    except ConfigError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        named = [f"{line} (from {_origin(c, line)})" for line in lines]
        raise ConfigError("\n".join(f"{file}: {line}" for line in named)) from None


def _origin(c: Conversion, line: str) -> str:
    names = [name for taken in c.taken if line.startswith(taken.key) for name in taken.names]
    return ", ".join(names) or c.project


# The report.


def _report(c: Conversion, file: str, unknown: list[str], notes: list[str], counts: dict[str, int], width: int) -> str:
    width = max(60, min(width, 110))

    def wrap(text: str, *, indent: int = 2) -> list[str]:
        return textwrap.wrap(
            text, width, initial_indent=" " * indent, subsequent_indent=" " * (indent + 4), break_on_hyphens=False
        )

    total = len(c.theirs)
    lines = wrap(
        f"{file}: {c.project}, {total} key{'s' * (total != 1)}: {counts['taken']} taken, {counts['other']} taken that "
        f"mean something else here, {counts['without']} without a counterpart, {counts['idle']} not set, "
        f"{counts['unknown']} not known",
        indent=0,
    )
    if c.missing:
        lines += ["to fill in:", *(line for sentence in c.missing for line in wrap(sentence))]
    if unknown:
        lines += [
            "not known, and not taken:",
            *wrap(", ".join(unknown)),  # without values, of which one may be a token
        ]
    if other := [taken for taken in c.taken if taken.note]:
        lines.append("means something else here:")
        for taken in other:
            lines += wrap(_said(c, taken))
            lines += wrap(taken.note, indent=6)
    if same := [taken for taken in c.taken if taken.names and not taken.note]:
        lines += ["taken:", *(line for taken in same for line in wrap(_said(c, taken)))]
    if defaults := [taken for taken in c.taken if not taken.names and not taken.note]:
        said = ", ".join(f"{taken.key} {brief(taken.value)}" for taken in defaults)
        lines += [f"not given, and so as {c.project} has it:", *wrap(said)]
    if c.without:
        lines.append("no counterpart:")
        reasons: dict[str, list[str]] = {}
        for name, why in c.without.items():
            reasons.setdefault(why, []).append(name)
        lines += [line for why, names in reasons.items() for line in wrap(f"{', '.join(names)}: {why}")]
    if idle := c.idle():
        lines += ["not set, or off:", *wrap(", ".join(idle))]
    return "\n".join([*lines, *(line for note in notes for line in wrap(note, indent=0))])


def _said(c: Conversion, taken: Taken) -> str:
    theirs = ", ".join(f"{name} {brief(c.theirs[name])}" for name in taken.names)
    return f"{theirs or 'not given'} -> {taken.key}: {brief(taken.value)}"
