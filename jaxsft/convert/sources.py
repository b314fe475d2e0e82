"""How others name their rows, in our words: paths of the hub with config and split, and parts that are held out."""

import os
import re
from typing import Any, NamedTuple

from jaxsft.chat.named_templates import NAMED_TEMPLATES
from jaxsft.convert.conversion import Conversion, as_list

TEMPLATES = frozenset(NAMED_TEMPLATES)
"""Chat templates of ours; theirs of the same names write the same turns."""

BUILDERS = ("json", "csv", "parquet", "text", "arrow")
"""What stands in place of a path where `data_files` are the rows."""

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILE = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet|arrow)(\.gz|\.zst)?$")


class Place(NamedTuple):
    """Where rows are."""

    path: str
    """As our config has it."""
    note: str
    """What is lost; empty: nothing."""


def hub_or_file(path: Any, config: Any = None, split: Any = None) -> list[Place]:
    """A source by its name, config and split, as `datasets.load_dataset` takes them; several where splits are added."""
    path = str(path)
    configs = [None if one in ("", "default") else one for one in (config if isinstance(config, list) else [config])]
    configs = configs or [None]
    splits = [part for one in (split if isinstance(split, list) and split else [split or "train"])
              for part in str(one).replace(" ", "").split("+")]  # fmt: skip
    asked = [f"the config {one}" for one in configs if one] + [f"the split {one}" for one in splits if one != "train"]
    if re.fullmatch(r"[\w-]+", path) and not os.path.exists(path):
        lost = f", and {' and '.join(asked)} is left out" if asked else ""
        return [Place(path, f"{path}: datasets of the hub are named org/name here{lost}")]
    if not is_hub(path):
        return [Place(path, f"{' and '.join(asked)} of a local folder or file is not chosen" if asked else "")]
    names = [f"{path}@{one}" if one else path for one in configs]
    return [Place(name if part == "train" else f"{name}:{part}", "") for name in names for part in splits]


def places_of(entry: dict[str, Any]) -> tuple[list[Place], list[str]]:
    """The sources of one dataset, as `datasets.load_dataset` takes its keys, and what is lost of them.

    Args:
        entry: path (or id), name (or config), split, data_files and data_dir.
    """
    path = str(entry.get("path") or entry.get("id"))
    config, split = entry.get("name") or entry.get("config"), entry.get("split")
    files, folder = entry.get("data_files"), entry.get("data_dir")
    lost = []
    if isinstance(files, dict):
        others = sorted(str(name) for name in files if name != "train")
        lost += [f"{path}: data_files of {', '.join(others)} are left out"] * bool(others)
        files = files.get("train")
    listed = [str(file) for file in as_list(files or [])]
    is_named = re.fullmatch(r"[\w-]+", path) is not None and path not in BUILDERS and not os.path.exists(path)
    if (listed or folder) and (is_hub(path) or is_named):
        of = [f"data_files {', '.join(listed)}"] * bool(listed) + [f"data_dir {folder}"] * bool(folder)
        lost.append(f"{path}: {' and '.join(of)}: no part of a hub dataset is chosen; download it and give its path")
    elif listed or folder:
        base = os.path.join("" if path in BUILDERS else path, str(folder or ""))
        joined = [file if "://" in file or not base else os.path.join(base, file) for file in listed]
        places = [place for one in joined or [base] for place in hub_or_file(one, config, split)]
        return places, [*lost, *(place.note for place in places if place.note)]
    places = hub_or_file(path, config, split)
    return places, [*lost, *(place.note for place in places if place.note)]


def lost_keys(entry: dict[str, Any], known: set[str], name: str) -> list[str]:
    """A sentence on the keys of a dataset that are not known, where there are such."""
    lost = sorted(str(key) for key in entry.keys() - known if entry[key] not in (None, False, "", [], {}))
    return [f"{name}: {', '.join(lost)} of a dataset has no counterpart"] * bool(lost)


def is_hub(path: str) -> bool:
    """Whether this is the id of a dataset on the hub, as far as its form says."""
    return bool(_HUB.fullmatch(path)) and not _FILE.search(path) and not os.path.exists(path)


def hold_out(c: Conversion, name: str, places: list[str]) -> None:
    """Takes a share of the rows as held-out ones, where this can be said without a file that is not there.

    Args:
        c: takes `data.eval`, or learns why not.
        name: of their key, whose value is the share, or a count.
        places: the paths of `data.train`.
    """
    share = c.number(name)
    if not share:
        return
    percent = round(100 * (1 - share)) if share < 1 else None
    if len(places) == 1 and is_hub(places[0].split(":")[0].split("@")[0]) and percent is not None and 0 < percent < 100:
        base, _, split = places[0].partition(":")
        if "[" not in split:
            c.taken = [one._replace(value=_cut(one.value, places[0], f"{base}:{split or 'train'}[:{percent}%]"))
                       if one.key == "data.train" else one for one in c.taken]  # fmt: skip
            note = "the last rows, where theirs are drawn"
            c.take("data.eval", f"{base}:{split or 'train'}[{percent}%:]", name, note=note)
            return
    why = "held-out rows are given here: cut the file with head and tail, or name splits, and give data.eval"
    c.leave(name, why=why)


def _cut(sources: Any, path: str, cut: str) -> Any:
    return [{**source, "path": cut} if source["path"] == path else source for source in sources]


def take_template(c: Conversion, name: Any, *names: str) -> None:
    """Takes a chat template by their name for it."""
    name = str(name)
    if name in TEMPLATES:
        note = "of ours; it begins with the bos token where there is one" if name == "chatml" else "of ours"
        c.take("data.chat_template", name, *names, note=f"{note} (docs/templates_named.md)")
    elif "{" in name:
        c.template = name
        c.take("data.chat_template", c.template_file, *names, note="the text is written into this file")
    elif name.endswith((".jinja", ".j2", ".txt")):
        c.take("data.chat_template", name, *names)
    else:
        why = f"{name} is none of ours; the tokenizer's own template is taken, or give data.chat_template"
        c.leave(*names, why=why)
