"""How others name their rows, in our words: paths of the hub with config and split, and parts that are held out."""

import os
import re
from typing import Any, NamedTuple

from jaxsft.chat.named_templates import NAMED_TEMPLATES
from jaxsft.convert.conversion import Conversion

TEMPLATES = frozenset(NAMED_TEMPLATES)
"""Chat templates of ours; theirs of the same names write the same turns."""

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
    if re.fullmatch(r"[\w-]+", path) and not os.path.exists(path):
        return [Place(path, f"{path}: datasets of the hub are named org/name here")]
    if not is_hub(path):
        note = f"the split {split} of a local folder or file is not chosen" if split not in (None, "train") else ""
        return [Place(path, note)]
    name = path if config in (None, "", "default") else f"{path}@{config}"
    return [
        Place(name if part == "train" else f"{name}:{part}", "")
        for part in (str(split).replace(" ", "").split("+") if split else ["train"])
    ]


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
