"""Held-out rows that are trained as well: their loss would tell what was memorised, and not what was learnt.

In: prepared rows of both kinds. Out: how many held-out rows are in the training data, by the file that they are read
from or by their content, token for token; it is an error unless the config allows it.
"""

from collections.abc import Callable, Sequence

import numpy as np

from jaxsft.batches.prepare import Prepared
from jaxsft.config import DataConfig, SourceConfig
from jaxsft.disk.buckets import is_bucket
from jaxsft.disk.writing import at_home
from jaxsft.rows.sources import DataError, is_hub, source_files

_SAMPLES = 8
"""Tokens of an example that are compared first: few examples agree in them and differ elsewhere."""


def check_overlap(
    config: DataConfig,
    name: str,
    held_out: Sequence[Prepared],
    train: Sequence[Prepared] | None,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Refuses held-out rows that are trained as well, or says how many where the config allows them.

    Args:
        config: the data section.
        name: of the held-out set.
        held_out: its rows.
        train: the rows that are trained; None where they are read while training, and only files can be compared.
        say: is told what is allowed.

    Raises:
        DataError: there are such rows.
    """
    if train is None:
        shared = _shared_files(config, config.eval[name])
        found = f"{', '.join(shared[:3])} of data.eval.{name} is read for training as well" if shared else ""
    else:
        number = sum(int(overlapping(source, train).sum()) for source in held_out)
        rows = sum(len(np.unique(source.origins[:, 2])) for source in held_out)
        found = f"{number:,} of {rows:,} held-out rows of data.eval.{name} are in data.train as well" if number else ""
    if not found:
        return
    if not config.allow_overlap:
        raise DataError(
            f"{found}, so their loss would not tell how the model does on what it has not seen; leave them out of one "
            "of the two, or set data.allow_overlap=true"
        )
    say(f"WARNING    {found} (data.allow_overlap)")


def overlapping(held_out: Prepared, train: Sequence[Prepared]) -> np.ndarray:
    """bool, for each held-out conversation or text: whether it is trained as well.

    It is where its file is read for training too, or where each of its examples is an example of the training data.
    """
    items, first = np.unique(held_out.origins[:, 2], return_index=True)
    trained_files = {_place(file) for source in train for file in source.report["files"]}
    is_shared = np.array([_place(file) in trained_files for file in held_out.report["files"]], bool)
    from_file = is_shared[held_out.origins[first, 0]]
    seen = np.zeros(len(held_out.lengths), bool)
    signatures = _signatures(held_out)
    for source in train:
        theirs = _signatures(source)
        candidates = np.flatnonzero(np.isin(theirs, signatures))
        texts = {source.example(int(at)).tokens.tobytes() for at in candidates}
        for at in np.flatnonzero(np.isin(signatures, theirs[candidates]) & ~seen):
            seen[at] = held_out.example(int(at)).tokens.tobytes() in texts
    num_seen = np.bincount(np.searchsorted(items, held_out.origins[:, 2]), weights=seen, minlength=len(items))
    num_examples = np.bincount(np.searchsorted(items, held_out.origins[:, 2]), minlength=len(items))
    return from_file | (num_seen == num_examples)


def _signatures(prepared: Prepared) -> np.ndarray:
    """uint64 [num_examples]: equal where examples are equal; of their lengths and a few of their tokens."""
    lengths = prepared.lengths
    found = lengths.astype(np.uint64)
    for number in range(_SAMPLES):
        at = prepared.offsets[:-1] + (lengths - 1) * number // (_SAMPLES - 1)
        # Arithmetic modulo 2^64, with an odd factor that spreads the bits.
        found = found * np.uint64(0x9E3779B97F4A7C15) + prepared.tokens[at].astype(np.uint64)
    return found


def _shared_files(config: DataConfig, held_out: SourceConfig) -> list[str]:
    trained = {place for source in config.train for place in _places(source, held_out=False)}
    return sorted(_places(held_out, held_out=True) & trained)


def _places(source: SourceConfig, *, held_out: bool) -> set[str]:
    if is_hub(source.path):
        return {source.path}
    return {_place(str(file)) for file in source_files(source.path, held_out=held_out)}


def _place(name: str) -> str:
    """A file by where it is, a hub dataset by its name."""
    if is_bucket(name):
        return name
    path = at_home(name)
    return str(path.resolve()) if path.exists() else name
