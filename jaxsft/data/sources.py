"""Where rows come from: files, folders, globs and hub datasets become rows, lossless, each with its file and line.

In: one path of the config. Out: `Row`s in a fixed order, and a `Problem` in the place of each row that cannot be read.
What a row means is left to `formats.py`. JSON is read here and not by `datasets`, whose schema merging adds null keys
and whose errors name neither file nor line.
"""

import collections
import csv
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

MAX_ROW_BYTES = 64 * 2**20
"""Longest line or JSON element that is read: a guard against files that are no rows."""
MAX_DEPTH = 200
"""Deepest nesting of a row: what comes later (templates, copies) is recursive."""


class DataError(ValueError):
    """A mistake of the user in the data; its text is shown as it is."""

    exit_code = 65


class BadRow(ValueError):
    """Why one row is bad: `code` for counting, the text for the user. Becomes a `Problem` where the origin is known."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Row(NamedTuple):
    """One row as it stands in the source."""

    fields: dict[str, Any]
    """Column -> value."""
    origin: str
    """`path:line`, the line from 1 where the record starts; for Parquet and the hub `path:row`, from 1."""


class Problem(NamedTuple):
    """One bad row."""

    code: str
    """A stable word such as `bad-json`."""
    origin: str
    """Like that of a row."""
    reason: str
    """What was found, what was expected, what would help."""


def read_rows(source: str, *, limit: int | None = None, skip: int = 0, stream: bool = False) -> Iterator[Row | Problem]:
    """The rows of a source, file after file in sorted order; a row that cannot be read comes as a `Problem`.

    A source is a file, a folder (all data files in it, also in subfolders), a glob, or a hub dataset
    `org/name[@config][:split]` with split "train" unless given. A string is local when something of that name exists,
    when it holds `*` or `?`, ends like a data file, or starts like a path; else it is a hub id if it looks like one.

    `skip` passes over so many records, good or bad, and `limit` then yields so many: what is passed over is not parsed
    where the format allows that. With `stream`, a hub dataset is read as it is downloaded.

    Raises:
        DataError: a source that is missing or empty; a place from which on a file cannot be read, since the rows lost
            there cannot be counted.
    """
    if _is_hub(source):
        records = itertools.islice(_read_hub(source, skip, stream=stream), limit)
    else:
        stop = None if limit is None else skip + limit
        records = itertools.islice(_read_files(source_files(source)), skip, stop)
    for origin, parse in records:
        try:
            yield Row(parse(), origin)
        except BadRow as bad:
            yield Problem(bad.code, origin, str(bad))


def source_files(source: str) -> list[Path]:
    """The data files of a local source, sorted by name.

    Raises:
        DataError: no such file, no data file in a folder, nothing that fits a glob, or a file of an unknown kind.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and _kind(file) and file.name not in _METADATA]
        found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not found:
            raise DataError(f"{source}: no data files in this folder (looked for {_kinds()})")
    elif path.is_file():
        found = [path]
    elif re.search(r"[*?\[]", source):
        anchor = Path(path.anchor)
        found = [file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file()]
        if not found:
            raise DataError(f"{source}: no file fits this pattern")
    else:
        raise DataError(f"{source}: no such file or folder")
    unknown = [str(file) for file in found if not _kind(file)]
    if unknown:
        raise DataError(f"{', '.join(unknown[:10])}: not a known kind of data file (known: {_kinds()})")
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


def parse_json(text: str) -> Any:
    """JSON as the standard has it, but no key twice and no number that floats cannot hold.

    Raises:
        BadRow: anything else, with its code.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BadRow("bad-json", f"not readable as JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadRow("too-deep", f"nested too deep: at most {MAX_DEPTH} levels are read") from None
    except BadRow:
        raise
    except ValueError:  # Python's own guard against whole numbers of thousands of digits.
        raise BadRow("number-overflow", "holds a whole number of too many digits") from None


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    kinds = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


# A record: where it starts (a line, or a number from 1) and what parses it. It is parsed only when it is wanted.
Parse = Callable[[], dict[str, Any]]
Records = Iterator[tuple[int, Parse]]


def _read_files(paths: Sequence[Path]) -> Iterator[tuple[str, Parse]]:
    for path in paths:
        suffix, compression = _kind(path) or ("", "")
        number = 0
        try:
            for number, parse in READERS[suffix](path, compression):
                yield f"{path}:{number}", parse
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _lost(
                path, number + 1, "truncated-file", f"compressed data broken off or damaged ({error})"
            ) from None
        except OSError as error:
            if compression:  # What pyarrow raises for zstd.
                raise _lost(path, number + 1, "truncated-file", f"compressed data damaged ({error})") from None
            raise DataError(f"{path}: not readable: {error.strerror or error}") from None
        if number == 0:
            raise DataError(f"{path}: no rows in this file")


def _lost(path: Path, line: int, code: str, reason: str) -> DataError:
    return DataError(f"{path}:{line}: {code}: {reason}; the rest of the file cannot be read, so it is never skipped")


def _read_jsonl(path: Path, compression: str) -> Records:
    first = True
    for number, line in _lines(path, compression):
        if line.isspace():
            continue
        if first and line.startswith(b"[") and not _is_json(line):
            # One JSON list under the wrong name.
            yield from _read_json(path, compression)
            return
        first = False
        yield number, functools.partial(_parse_line, line)


def _parse_line(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_ROW_BYTES:
        raise BadRow("row-too-large", f"a line of more than {MAX_ROW_BYTES // 2**20} MiB")
    try:
        text = line.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        raise _bad_utf8(error.object[error.start], error.start) from None
    return _checked(parse_json(text), text)


def _read_json(path: Path, compression: str) -> Records:
    """A list of objects, or (as many files named .json are) one object per line, or objects one after the other."""
    with _open(path, compression) as file:
        head = file.readline(MAX_ROW_BYTES + 1)
        if head.lstrip(_BOM).startswith(b"{") and _is_json(head):
            yield from _read_jsonl(path, compression)
            return
        # Bytes that are no UTF-8 survive as half surrogates, so that the element that holds them can be named.
        text = (head + file.read()).removeprefix(_BOM).decode(errors="surrogateescape")
    at = _skip_space(text, 0)
    if at == len(text):
        return
    listed = text[at] == "["
    if not listed and text[at] != "{":
        raise DataError(f"{path}:1: not-a-list: a .json data file holds a list of objects, or one object per line")
    at = _skip_space(text, at + listed)
    line, counted, again = 1, 0, False
    while at < len(text) and not (listed and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        if listed and again:
            if text[at] != ",":
                raise _lost(path, line, "bad-json", f"not readable as JSON: expected , or ] after element at {at}")
            at = _skip_space(text, at + 1)
            line, counted = line + text.count("\n", counted, at), at
        at, parse = _element(path, text, at, line)
        yield line, parse
        at, again = _skip_space(text, at), True
    line += text.count("\n", counted, at)
    if listed and at == len(text):
        raise _lost(path, line, "bad-json", "not readable as JSON: the list is not closed")
    if listed and _skip_space(text, at + 1) != len(text):
        raise _lost(path, line, "bad-json", "not readable as JSON: text after the end of the list")


def _element(path: Path, text: str, at: int, line: int) -> tuple[int, Parse]:
    """Where the JSON value ends that starts at `at`, and what gives it or says why it is bad."""
    try:
        value, end = _DECODER.raw_decode(text, at)
        return end, functools.partial(_checked, value, text[at:end])
    except json.JSONDecodeError as error:
        line = text.count("\n", 0, error.pos) + 1
        raise _lost(path, line, "bad-json", f"not readable as JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise _lost(path, line, "too-deep", f"nested too deep: at most {MAX_DEPTH} levels are read") from None
    except ValueError:
        # Well-formed but not acceptable: find its end with a decoder that takes everything.
        end = json.JSONDecoder(parse_int=float).raw_decode(text, at)[1]
        return end, functools.partial(_parse_element, text[at:end])


def _parse_element(text: str) -> dict[str, Any]:
    return _checked(parse_json(text), text)


def _read_csv(path: Path, compression: str) -> Records:
    csv.field_size_limit(2**31 - 1)  # The default refuses cells of more than 131,072 characters.
    lines = _text_lines(path, compression)
    reader = csv.reader((line for _, line in lines), strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                raise _lost(path, start, "bad-csv", "a quoted cell that starts here is never closed") from None
            yield start, functools.partial(_refuse, "bad-csv", f"not readable as CSV: {error}")
            continue
        if not cells:
            continue
        if header is None:
            header = _header(path, cells)
            if header == cells:
                continue
        yield start, functools.partial(_parse_cells, header, cells)


def _read_tsv(path: Path, compression: str) -> Records:
    """Tab-separated cells; a quote opens a quoted cell only where the cells then come out right.

    Most TSV is written without quoting (a cell may start with a quotation); spreadsheets quote cells that hold tabs,
    newlines or quotes. So a quoted record over several lines is one that closes, has as many cells as the header, and
    whose lines are not as good as rows by themselves.
    """
    lines = _text_lines(path, compression)
    ahead: collections.deque[tuple[int, str]] = collections.deque()
    header: list[str] | None = None
    while True:
        start, line = ahead.popleft() if ahead else next(lines, (0, ""))
        if not start:
            return
        if not line.strip("\r\n"):
            continue
        cells = [_unquoted(cell) for cell in line.rstrip("\r\n").split("\t")]
        if '"' in line:
            taken, whole = [(start, line)], _quoted_cells(line)
            while whole == [] and len(taken) < _MAX_JOINED and (following := _peek(ahead, lines, len(taken) - 1)):
                taken.append(following)
                if '"' in following[1]:
                    whole = _quoted_cells("".join(text for _, text in taken))
            width = len(header or whole or ())
            rows_alone = len(taken) > 1 and all(text.count("\t") + 1 == width for _, text in taken)
            if whole and len(whole) == width and not rows_alone:
                cells = whole
                for _ in taken[1:]:
                    ahead.popleft()
        if header is None:
            header = _header(path, cells)
            if header == cells:
                continue
        yield start, functools.partial(_parse_cells, header, cells)


def _peek(
    ahead: collections.deque[tuple[int, str]], lines: Iterator[tuple[int, str]], at: int
) -> tuple[int, str] | None:
    """The line `at` lines ahead, which stays there; None at the end of the file."""
    ahead.extend(itertools.islice(lines, max(at + 1 - len(ahead), 0)))
    return ahead[at] if at < len(ahead) else None


def _quoted_cells(text: str) -> list[str] | None:
    """The cells of one record by the rules of quoting; [] if a quoted cell is still open, None if they are broken."""
    try:
        records = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True))
    except csv.Error as error:
        return [] if "end of data" in str(error) else None
    return records[0] if len(records) == 1 else None


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def _header(path: Path, cells: list[str]) -> list[str]:
    """The names of the columns: the first line, or "1", "2", ... where that is a row already (no name is so long)."""
    if any(len(cell) > 60 or len(cell.split()) > 6 for cell in cells):
        return [str(number) for number in range(1, len(cells) + 1)]
    repeated = sorted({name for name in cells if cells.count(name) > 1})
    if repeated:
        raise DataError(f"{path}:1: column {repeated[0]!r} is given twice in the header")
    return cells


def _parse_cells(header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise BadRow("cell-count", f"{len(cells)} cells, but the header has {len(header)} columns")
    for name, cell in zip(header, cells, strict=True):
        _check_utf8(cell, f"column {name!r}: ")
    return dict(zip(header, cells, strict=True))


def _read_parquet(path: Path, compression: str) -> Records:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with _open(path, compression) as stream, pyarrow.parquet.ParquetFile(stream) as file:
            for batch in file.iter_batches(batch_size=1024):
                for index in range(batch.num_rows):
                    number += 1
                    yield number, functools.partial(_parse_arrow, batch, index)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet after row {number}: {error}") from None


def _parse_arrow(batch: Any, index: int) -> dict[str, Any]:
    try:
        (fields,) = batch.slice(index, 1).to_pylist()
    except UnicodeDecodeError as error:
        raise _bad_utf8(error.object[error.start], error.start) from None
    return _columnar(fields)


READERS: dict[str, Callable[[Path, str], Records]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}
COMPRESSIONS = (".gz", ".zst")

# What `datasets` writes beside the data.
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_MAX_JOINED = 100
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")


def _kind(path: Path) -> tuple[str, str] | None:
    """What reads the file and how it is compressed: (".jsonl", ".gz"), (".csv", "")."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1], compression) if suffixes and suffixes[-1] in READERS else None


def _kinds() -> str:
    return f"{', '.join(READERS)}, also with {' or '.join(COMPRESSIONS)}"


def _open(path: Path, compression: str) -> IO[bytes]:
    if compression == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _lines(path: Path, compression: str) -> Iterator[tuple[int, bytes]]:
    """Lines from 1, cut at newlines only; of a line that is too long only the first MAX_ROW_BYTES + 1 bytes."""
    with _open(path, compression) as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            yield number, line.removeprefix(_BOM) if number == 1 else line
            while len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
                line = file.readline(MAX_ROW_BYTES + 1)


def _text_lines(path: Path, compression: str) -> Iterator[tuple[int, str]]:
    for number, line in _lines(path, compression):
        if len(line) > MAX_ROW_BYTES:
            raise _lost(path, number, "row-too-large", f"a line of more than {MAX_ROW_BYTES // 2**20} MiB")
        # Bytes that are no UTF-8 survive as half surrogates, so that the row that holds them can be named.
        yield number, line.decode(errors="surrogateescape")


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match
    return match.end()


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _bad_utf8(byte: int, at: int, where: str = "") -> BadRow:
    return BadRow("bad-utf8", f"{where}not valid UTF-8 (byte 0x{byte:02x} at offset {at}); save the file as UTF-8")


def _check_utf8(text: str, where: str = "") -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _bad_utf8(ord(text[error.start]) & 0xFF, error.start, where) from None


def _checked(value: Any, text: str) -> dict[str, Any]:
    """The value as a row; `text` is the JSON that it came from."""
    if len(text) > MAX_ROW_BYTES:
        raise BadRow("row-too-large", f"an element of more than {MAX_ROW_BYTES // 2**20} MiB")
    _check_utf8(text)
    if not isinstance(value, dict):
        raise BadRow("not-an-object", f"a row is a JSON object, this is {kind_of(value)}")
    if not value:
        raise BadRow("empty-row", "an object without any column")
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise BadRow("too-deep", f"nested too deep: at most {MAX_DEPTH} levels are read")
    if "\\u" in text and not _is_unicode(value):
        # JSON can escape half a surrogate pair, which is no text and which no tokenizer takes.
        raise BadRow("lone-surrogate", "holds half of a surrogate pair (an escape such as \\ud800), which is not text")
    return value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = [each for each in level if isinstance(each, dict | list)]
        level = [each for part in inner for each in (part.values() if isinstance(part, dict) else part)]
    return depth


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise BadRow("duplicate-key", f"key {repeated!r} is given twice in one object")
    return fields


def _refuse(code: str, reason: str) -> Any:
    raise BadRow(code, reason)


def _refuse_constant(name: str) -> Any:
    raise BadRow("not-finite", f"{name} is not JSON; expected a finite number or null")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise BadRow("number-overflow", f"the number {text} is too large")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite)

_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+(\[[\d:%]+\])?))?")


def _is_hub(source: str) -> bool:
    try:
        exists = Path(source).expanduser().exists()
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
    rows: Iterable[dict[str, Any]] = dataset.skip(skip) if skip else dataset
    number = 0
    for number, fields in enumerate(rows, start=1):
        yield f"{source}:{skip + number}", functools.partial(_columnar, fields)
    if number == skip == 0:
        raise DataError(f"{source}: no rows in this dataset")


def _columnar(value: Any) -> Any:
    """Columnar files have every key in every object, so a null says that it is not there: left out, at every depth."""
    if isinstance(value, dict):
        return {name: _columnar(part) for name, part in value.items() if part is not None}
    return [_columnar(part) for part in value] if isinstance(value, list) else value
