"""Which files of a folder belong to which split, by the words in their names, as data sets are laid out everywhere.

In: the files of a folder or a pattern. Out: those that are for training, or those that are held out, and what is left
out so. `data/train-00000.parquet`, `train/a.jsonl` and `a.jsonl` are for training; `test-00000.parquet` and
`validation/a.jsonl` are held out.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TRAIN = "train"
SPLITS: dict[str, tuple[str, ...]] = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "tests", "testing", "eval", "evaluation", "heldout", "holdout"),
}
"""Split -> words that name it; of what is held out, the first that is there is examined."""

_SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}


class Chosen(NamedTuple):
    """The files that are read."""

    files: list[Path]
    left_out: dict[str, int]
    """Split -> files of it that are there and not read."""


def choose(files: Sequence[Path], root: Path, *, held_out: bool = False) -> Chosen:
    """The files of the split that is asked for; all of them where there is only one kind.

    Args:
        files: those that were found, under `root`.
        root: where their names begin to say something.
        held_out: examined and not trained: the validation split, or else the test split.
    """
    splits = [split_of(file.relative_to(root)) for file in files]
    there = set(splits)
    wanted: set[str | None] = there - {"validation", "test"}
    if held_out and wanted and wanted != there:
        wanted = {"validation" if "validation" in there else "test"}
    if not wanted:
        wanted = there
    left_out: dict[str, int] = {}
    for split in splits:
        if split not in wanted:
            name = split or "no split"
            left_out[name] = left_out.get(name, 0) + 1
    return Chosen([file for file, split in zip(files, splits, strict=True) if split in wanted], left_out)


def split_of(path: Path) -> str | None:
    """The split that a path names, in its outermost folder that names one, or in the file's own name."""
    for part in path.parts:
        named = {_SPLIT_OF[word] for word in re.split(r"[^a-z]+", part.lower()) if word in _SPLIT_OF}
        if len(named) == 1:
            return named.pop()
    return None
