"""Where rows come from: files, folders, globs and hub datasets become rows, lossless, each with its file and line.

In: one path of the config. Out: `Row`s in a fixed order, and a `Problem` in the place of each row that cannot be read.
What a row means is left to `formats.py`. Files are read by our own readers (`READERS`) and not by `datasets`, whose
schema merging adds null keys and whose errors name neither file nor line.
"""

import collections
import functools
import gzip
import hashlib
import itertools
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft.disk.buckets import BucketPath, is_bucket
from jaxsft.disk.writing import at_home, place
from jaxsft.rows import splits
from jaxsft.rows.arrow_files import read_arrow, read_parquet
from jaxsft.rows.columns import parse_rows, row_reader, without_nulls
from jaxsft.rows.csv_files import read_csv, read_tsv
from jaxsft.rows.files import COMPRESSIONS, Parse, Records, lost
from jaxsft.rows.json_files import read_json, read_jsonl
from jaxsft.rows.strict import BadRow, DataError

__all__ = ["DataError", "Problem", "Row", "bad_rows", "is_hub", "read_rows", "source_digest", "source_files"]


READERS: dict[str, Callable[[Path, str], Records]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".csv": read_csv,
    ".tsv": read_tsv,
}
"""What reads a file, by the end of its name; (path, how it is compressed) -> records."""


class Row(NamedTuple):
    """One row as it stands in the source."""

    fields: dict[str, Any]
    """Column -> value."""
    origin: str
    """`path:line`, the line from 1 where the record starts; `path:line:column` for a further element on a line of JSON;
    for Parquet and the hub `path:row`, from 1."""


class Problem(NamedTuple):
    """One bad row."""

    code: str
    """A stable word such as `bad-json`."""
    origin: str
    """Like that of a row."""
    reason: str
    """What was found, what was expected, what would help."""


def read_rows(
    source: str, *, limit: int | None = None, skip: int = 0, stream: bool = False, held_out: bool = False
) -> Iterator[Row | Problem]:
    """The rows of a source, file after file in sorted order; a row that cannot be read comes as a `Problem`.

    A source is a file, a folder (the data files in it and in its subfolders, but see `splits.py`), a glob, or a hub
    dataset `org/name[@config][:split]` with split "train" unless given. A string is local when something of that name
    exists, when it holds `*` or `?`, ends like a data file, or starts like a path; else it is a hub id if it looks like
    one.

    `skip` passes over so many records, good or bad, and `limit` then yields so many: what is passed over is not parsed
    where the format allows that. With `stream`, a hub dataset is read as it is downloaded. With `held_out`, of a folder
    with splits those files are read that are for evaluation, and else those for training.

    Raises:
        DataError: a source that is missing or empty; a place from which on a file cannot be read, since the rows lost
            there cannot be counted.
    """
    if is_hub(source):
        records = itertools.islice(_read_hub(source, skip, stream=stream), limit)
    else:
        stop = None if limit is None else skip + limit
        records = itertools.islice(_read_files(source_files(source, held_out=held_out)), skip, stop)
    for origin, parse in records:
        try:
            yield Row(parse(), origin)
        except BadRow as bad:
            yield Problem(bad.code, origin, str(bad))


def source_files(source: str, *, held_out: bool = False) -> list[Path]:
    """The data files of a local source, sorted by name, of the split that is meant.

    Raises:
        DataError: no such file, no data file in a folder, nothing that fits a glob, or a file of an unknown kind.
    """
    return choose_files(source, held_out=held_out).files


def choose_files(source: str, *, held_out: bool = False) -> splits.Chosen:
    """The files of `source_files`, and which other splits were left out.

    Raises:
        DataError: as `source_files`.
    """
    path = place(source)
    root = path
    in_bucket = isinstance(path, BucketPath)
    if path.is_dir():
        inside = path.files() if in_bucket else [file for file in path.rglob("*") if not file.is_dir()]
        found = [file for file in inside if _kind(file) and file.name not in _METADATA]
        found = [file for file in found if not _CACHED.fullmatch(file.name)]
        found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not found:
            raise DataError(f"{source}: no data files in this folder (looked for {_kinds()})")
    elif path.exists():
        found, root = [path], path.parent
    elif re.search(r"[*?\[]", source):
        # The folders that the pattern spells out are the same for all its files, and so name no split.
        root = type(path)(*itertools.takewhile(lambda part: not re.search(r"[*?\[]", part), path.parts))
        found = [file for file in root.glob(str(path.relative_to(root))) if in_bucket or not file.is_dir()]
        if not found:
            raise DataError(f"{source}: no file fits this pattern")
    else:
        raise DataError(f"{source}: no such file or folder")
    if odd := [str(file) for file in found if not in_bucket and not file.is_file()]:
        raise DataError(f"{', '.join(odd[:10])}: not a regular file (a pipe, a device, or a link to nothing)")
    unknown = [str(file) for file in found if not _kind(file)]
    if unknown:
        raise DataError(f"{', '.join(unknown[:10])}: not a known kind of data file (known: {_kinds()})")
    return splits.choose(sorted(found, key=lambda file: file.as_posix()), root, held_out=held_out)


def source_digest(source: str, *, held_out: bool = False) -> str:
    """Changes when the rows of the source change: a hash of the bytes of all its files, or the hub's fingerprint.

    Raises:
        DataError: a file that is missing or may not be read.
    """
    if is_hub(source):
        return f"{source} {_load_hub(source)._fingerprint}"
    digest = hashlib.sha256()
    for path in source_files(source, held_out=held_out):
        try:
            with path.open("rb") as file:
                kind = "".join(_kind(path) or ())
                digest.update(f"{kind} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        except OSError as error:
            raise DataError(f"{path}: not readable: {error.strerror}") from None
    return digest.hexdigest()


def bad_rows(problems: Sequence[Problem], what: str) -> DataError:
    """One error for many rows: how many of each code, and the first 10 as `origin: code: reason`."""
    counted = collections.Counter(problem.code for problem in problems).most_common()
    lines = [
        f"{len(problems)} {what} row{'s' * (len(problems) > 1)}: {', '.join(f'{n} {code}' for code, n in counted)}"
    ]
    lines += [f"  {problem.origin}: {problem.code}: {problem.reason}" for problem in problems[:10]]
    if len(problems) > 10:
        lines.append(f"  ... and {len(problems) - 10} more")
    return DataError("\n".join(lines))


def _read_files(paths: Sequence[Path]) -> Iterator[tuple[str, Parse]]:
    for path in paths:
        suffix, compression = _kind(path) or ("", "")
        name = str(path)
        place: int | str = 0
        try:
            for place, parse in READERS[suffix](path, compression):
                yield f"{name}:{place}", parse
        except (EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
            if not compression or isinstance(error, PermissionError):
                raise DataError(f"{path}: not readable: {getattr(error, 'strerror', None) or error}") from None
            after = int(str(place).split(":")[0]) + 1
            raise lost(path, after, "truncated-file", f"compressed data broken off or damaged ({error})") from None
        if place == 0:
            raise DataError(f"{path}: no rows in this file")


def _kind(path: Path) -> tuple[str, str] | None:
    """The ending that says what reads a file, and how it is compressed: (".jsonl", ".gz"), (".csv", "")."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1], compression) if suffixes and suffixes[-1] in READERS else None


def _kinds() -> str:
    return f"{', '.join(READERS)}, also with {' or '.join(COMPRESSIONS)}"


_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+(\[[\d:%]+\])?))?")


def is_hub(source: str) -> bool:
    """Whether a source is a hub dataset, see `read_rows`.

    Raises:
        DataError: neither a file nor a hub dataset could have such a name.
    """
    try:
        exists = is_bucket(source) or at_home(source).exists()
    except OSError:  # A name too long for a file.
        exists = False
    local = exists or re.search(r"[*?]", source) or source.startswith((".", "/", "~"))
    if local or _kind(Path(source)):
        return False
    if _HUB_ID.fullmatch(source):
        return True
    if "[" in source:
        return False
    raise DataError(f"{source}: no such file or folder, and not a hub dataset (org/name, org/name@config:split)")


def _load_hub(source: str, **options: Any) -> Any:
    import datasets

    match = _HUB_ID.fullmatch(source)
    assert match, source
    try:
        return datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train", **options)
    except Exception as error:  # Whatever the hub, the network or the dataset's files have to complain of.
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{source}: no such file or folder here, and not loaded from the hub: {reason}") from error


def _read_hub(source: str, skip: int, *, stream: bool) -> Iterator[tuple[str, Parse]]:
    dataset: Any = _load_hub(source, streaming=True) if stream else _load_hub(source)
    dataset = dataset.skip(skip) if skip else dataset
    number = skip
    for parse in _parse_hub(dataset):
        number += 1
        yield f"{source}:{number}", parse
    if number == skip == 0:
        raise DataError(f"{source}: no rows in this dataset")


def _parse_hub(dataset: Any) -> Iterator[Parse]:
    """The rows of a dataset, taken from Arrow: as objects of `datasets`, nulls of the data would look like those that
    it fills in."""
    if dataset.features is None:  # A stream whose types nobody knows beforehand.
        for fields in dataset:
            yield functools.partial(without_nulls, fields)
        return
    for table in dataset.with_format("arrow").iter(batch_size=_HUB_BATCH):
        yield from parse_rows(row_reader(table.schema), table)


_HUB_BATCH = 256


# What `datasets` writes beside the data; what it computed from them later has names of its own.
_CACHED = re.compile(r"(cache|indices|tmp)[\w-]*\.arrow")
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
