"""Where rows come from: files, folders, globs and hub datasets become rows, lossless, each with its file and line.

In: one `source` string of the config. Out: `Row`s in a fixed order. What a row means is left to `formats.py`. JSONL is
read here and not by `datasets`, whose schema merging adds null keys and whose errors name neither file nor line.
"""

import csv
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class DataError(ValueError):
    """A mistake of the user in the data; its text is shown as it is."""

    exit_code = 65


class Row(NamedTuple):
    """One row as it stands in the source."""

    fields: dict[str, Any]
    """Column -> value."""
    origin: str
    """`path:line` for JSONL, CSV and TSV (the line where the record starts), `path:element` from 1 for the others."""


def read_rows(source: str, *, limit: int | None = None) -> Iterator[Row]:
    """The rows of a source, file after file in sorted order, or the first `limit` of them.

    A source is a file, a folder (all data files in it, also in subfolders), a glob, or a hub dataset
    `org/name[@config][:split]` with split "train" unless given. A string is local when something of that name exists,
    when it holds `*` or `?`, ends like a data file, or starts like a path; else it is a hub id if it looks like one.

    Raises:
        DataError: a source that is missing or empty, at once; unreadable rows, all of them together, after the last.
    """
    problems: list[tuple[str, str]] = []
    records = _read_hub(source) if _is_hub(source) else _read_files(source_files(source))
    for fields, origin in itertools.islice(records, limit):
        if isinstance(fields, str):
            problems.append((origin, fields))
        else:
            yield Row(fields, origin)
    if problems:
        raise bad_rows(problems, "unreadable")


def source_files(source: str) -> list[Path]:
    """The data files of a local source, sorted by name.

    Raises:
        DataError: no such file, no data file in a folder, nothing that fits a glob, or a file of an unknown kind.
    """
    path = Path(source).expanduser()
    kinds = ", ".join(READERS)
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in READERS]
        found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not found:
            raise DataError(f"{source}: no data files in this folder (looked for {kinds})")
    elif path.is_file():
        found = [path]
    elif re.search(r"[*?\[]", source):
        anchor = Path(path.anchor)
        found = [file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file()]
        if not found:
            raise DataError(f"{source}: no file fits this pattern")
    else:
        raise DataError(f"{source}: no such file or folder")
    unknown = [str(file) for file in found if file.suffix.lower() not in READERS]
    if unknown:
        raise DataError(f"{', '.join(unknown[:10])}: not a known kind of data file (known: {kinds})")
    return sorted(found, key=lambda file: file.as_posix())


def source_digest(source: str) -> str:
    """Changes when the rows of the source change: a hash of the bytes of all its files, or the hub's fingerprint.

    Raises:
        DataError: a file that is missing or may not be read.
    """
    if _is_hub(source):
        return f"{source} {_load_hub(source)._fingerprint}"
    digest = hashlib.sha256()
    for path in source_files(source):
        try:
            with path.open("rb") as file:
                digest.update(f"{path.suffix.lower()} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        except OSError as error:
            raise DataError(f"{path}: not readable: {error.strerror}") from None
    return digest.hexdigest()


def bad_rows(problems: Sequence[tuple[str, str]], what: str) -> DataError:
    """One error for many rows: the first 10 as `origin: reason`, and how many there are."""
    lines = [f"{len(problems)} {what} row{'s' * (len(problems) > 1)}:"]
    lines += [f"  {origin}: {reason}" for origin, reason in problems[:10]]
    if len(problems) > 10:
        lines.append(f"  ... and {len(problems) - 10} more")
    return DataError("\n".join(lines))


def _read_files(paths: Sequence[Path]) -> Iterator[tuple[dict[str, Any] | str, str]]:
    for path in paths:
        number = 0
        for number, fields in READERS[path.suffix.lower()](path):
            yield fields, f"{path}:{number}"
        if number == 0:
            raise DataError(f"{path}: no rows in this file")


# A reader yields (number, fields), or (number, reason) for a row that cannot be read.
Records = Iterator[tuple[int, dict[str, Any] | str]]


def _read_jsonl(path: Path) -> Records:
    for number, line in _lines(path):
        if isinstance(line, UnicodeDecodeError):
            yield number, _utf8_reason(line)
        elif line.strip():
            yield number, _parse_object(line)


def _read_json(path: Path) -> Records:
    try:
        elements = _DECODER.decode(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {_utf8_reason(error)}") from None
    except json.JSONDecodeError as error:
        hint = "; a file of one JSON object per line must be named .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not readable as JSON: {error.msg}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(elements, list):
        found = type(elements).__name__
        raise DataError(f"{path}: a .json data file holds one list of objects, this one holds a {found}")
    for number, element in enumerate(elements, start=1):
        yield number, _checked_object(element)


def _read_csv(path: Path) -> Records:
    return _read_delimited(path, ",")


def _read_tsv(path: Path) -> Records:
    return _read_delimited(path, "\t")


def _read_delimited(path: Path, delimiter: str) -> Records:
    csv.field_size_limit(2**31 - 1)  # The default refuses cells of more than 131,072 characters.

    def lines() -> Iterator[str]:
        for _, line in _lines(path):
            if isinstance(line, UnicodeDecodeError):
                raise line
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    start = 1
    try:
        header = next(reader, [])
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise DataError(f"{path}:1: column {repeated[0]!r} is given twice in the header")
        start = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield start, dict(zip(header, cells, strict=True))
            elif cells:
                yield start, f"{len(cells)} cells, but the header has {len(header)} columns"
            start = reader.line_num + 1
    except UnicodeDecodeError as error:
        yield reader.line_num + 1, f"{_utf8_reason(error)}; the rest of the file was not read"
    except csv.Error as error:
        yield start, f"not readable as CSV: {error}; the rest of the file was not read"


def _read_parquet(path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                for fields in file.read_row_group(group).to_pylist():
                    number += 1
                    yield number, _without_nulls(fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet after element {number}: {error}") from None


READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}


def _lines(path: Path) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    """Lines as JSONL and CSV understand them (cut at newlines only, not at every Unicode line separator), from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, error


def _utf8_reason(error: UnicodeDecodeError) -> str:
    return f"not valid UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start})"


def _parse_object(text: str) -> dict[str, Any] | str:
    try:
        return _checked_object(_DECODER.decode(text))
    except json.JSONDecodeError as error:
        return f"not readable as JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        return "not readable as JSON: nested too deep"
    except ValueError as error:
        return f"not readable as JSON: {error}"


def _checked_object(value: Any) -> dict[str, Any] | str:
    if not isinstance(value, dict):
        return f"a row is a JSON object, this is a {type(value).__name__}"
    try:
        # JSON can escape half a surrogate pair, which is no text and which no tokenizer takes.
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "holds half of a surrogate pair (an escape such as \\ud800), which is not text"
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return fields


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is too large")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite)

_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+(\[[\d:%]+\])?))?")


def _is_hub(source: str) -> bool:
    try:
        exists = Path(source).expanduser().exists()
    except OSError:  # A name too long for a file.
        exists = False
    local = exists or re.search(r"[*?]", source) or source.startswith((".", "/", "~"))
    if local or Path(source).suffix.lower() in READERS:
        return False
    if _HUB_ID.fullmatch(source):
        return True
    if "[" in source:
        return False
    raise DataError(f"{source}: no such file or folder, and not a hub dataset (org/name, org/name@config:split)")


def _load_hub(source: str) -> Any:
    import datasets

    match = _HUB_ID.fullmatch(source)
    assert match, source
    try:
        return datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train")
    except Exception as error:  # Whatever the hub, the network or the dataset's files have to complain of.
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{source}: no such file or folder here, and not loaded from the hub: {reason}") from error


def _read_hub(source: str) -> Iterator[tuple[dict[str, Any] | str, str]]:
    dataset: Iterable[dict[str, Any]] = _load_hub(source)
    number = 0
    for number, fields in enumerate(dataset, start=1):
        yield _without_nulls(fields), f"{source}:{number}"
    if number == 0:
        raise DataError(f"{source}: no rows in this dataset")


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """Columnar files have every column in every row; a null there says that the row does not have it."""
    return {name: value for name, value in fields.items() if value is not None}
