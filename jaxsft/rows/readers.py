"""What a file holds: each kind of file gives its records, lossless, each with the line where it starts.

In: one file. Out: records that are parsed only when they are wanted, so that skipping is cheap; parsing one may raise
`BadRow`. A place from which on a file cannot be read is a `DataError`. Which files there are is left to `sources.py`.
"""

import collections
import csv
import functools
import gzip
import inspect
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from jaxsft.rows.columns import parse_rows, row_reader
from jaxsft.rows.strict import (
    DECODER,
    MAX_ROW_BYTES,
    TOO_DEEP,
    BadRow,
    DataError,
    as_row,
    bad_utf8,
    check_utf8,
    check_value,
    first_repeated,
    parse_json,
)

# A record: where it starts (a line, or a number from 1) and what parses it. It is parsed only when it is wanted.
Parse = Callable[[], dict[str, Any]]
Records = Iterator[tuple[int | str, Parse]]


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
        raise bad_utf8(error.object[error.start], error.start) from None
    return as_row(parse_json(text))


def _read_json(path: Path, compression: str) -> Records:
    """A list of objects, or (as many files named .json are) one object per line, or objects one after the other."""
    with _open(path, compression) as file:
        head = file.readline(MAX_ROW_BYTES + 1)
        if head.lstrip(_BOM).startswith(b"{") and _is_json(head):
            yield from _read_jsonl(path, compression)
            return
        # Bytes that are no UTF-8 survive as half surrogates, so that the element that holds them can be named.
        text = (head + _rest(path, file)).removeprefix(_BOM).decode(errors="surrogateescape")
    at = _skip_space(text, 0)
    if at == len(text):
        return
    listed = text[at] == "["
    if not listed and text[at] != "{":
        raise lost(path, 1, "not-a-list", "a .json data file holds a list of objects, or one object per line")
    at = _skip_space(text, at + listed)
    line, counted, before, line_start = 1, 0, 0, -1
    while at < len(text) and not (listed and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        if listed and before:
            if text[at] != ",":
                raise lost(path, line, "bad-json", "not readable as JSON: expected , or ] after an element")
            at = _skip_space(text, at + 1)
            line, counted = line + text.count("\n", counted, at), at
        # Of several on one line, the column says which.
        if line > before:
            line_start = text.rfind("\n", 0, at)
        column = at - line_start
        end, parse = _element(path, text, at, line)
        yield line if line > before else f"{line}:{column}", parse
        at, before = _skip_space(text, end), line
    line += text.count("\n", counted, at)
    if listed and at == len(text):
        raise lost(path, line, "bad-json", "not readable as JSON: the list is not closed")
    if listed and _skip_space(text, at + 1) != len(text):
        raise lost(path, line, "bad-json", "not readable as JSON: text after the end of the list")


def _element(path: Path, text: str, at: int, line: int) -> tuple[int, Parse]:
    """Where the JSON value ends that starts at `at`, and what gives it or says why it is bad."""
    try:
        value, end = DECODER.raw_decode(text, at)
        return end, functools.partial(_parse_element, text[at:end], value)
    except json.JSONDecodeError as error:
        line = text.count("\n", 0, error.pos) + 1
        raise lost(path, line, "bad-json", f"not readable as JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        close = _end_of(text, at)
        if close is None:
            raise lost(path, line, "too-deep", f"{TOO_DEEP}, and this element has no end") from None
        return close, functools.partial(_refuse, "too-deep", TOO_DEEP)
    except ValueError:
        # Not acceptable: what is wrong with it is said when it is parsed, if it has an end.
        close = _end_of(text, at)
        if close is None:
            raise lost(path, line, "bad-json", "not readable as JSON: an element that has no end") from None
        return close, functools.partial(_parse_element, text[at:close])


def _end_of(text: str, at: int) -> int | None:
    """Where the object or list that starts at `at` is closed, by its brackets alone; None where it is not."""
    depth = 0
    for found in _BRACKETS.finditer(text, at):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(found.group(), 0)
        if depth == 0:
            return found.end()
    return None


def _parse_element(text: str, value: Any = None) -> dict[str, Any]:
    if len(text) > MAX_ROW_BYTES:
        raise BadRow("row-too-large", f"an element of more than {MAX_ROW_BYTES // 2**20} MiB")
    check_utf8(text)
    if value is None:
        return as_row(parse_json(text))
    check_value(value, text)
    return as_row(value)


def _read_csv(path: Path, compression: str) -> Records:
    csv.field_size_limit(MAX_ROW_BYTES)  # The default refuses cells of more than 131,072 characters.
    lines = _text_lines(path, compression)
    first = next(lines, (0, ""))[1]
    # Excel may say in a line of its own what it writes between cells.
    said = re.fullmatch(r"sep=(.)\r?\n?", first)
    delimiter = said[1] if said else _delimiter(first)
    size = 0

    def texts() -> Iterator[str]:
        nonlocal size
        for line in itertools.chain([] if said else [first], (line for _, line in lines)):
            size += len(line)
            if size > MAX_ROW_BYTES:
                raise lost(path, start, "row-too-large", f"a record of more than {MAX_ROW_BYTES // 2**20} MiB")
            yield line

    reader = csv.reader(texts(), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    while True:
        start, size = reader.line_num + 1 + bool(said), 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                raise lost(path, start, "bad-csv", "a quoted cell that starts here is never closed") from None
            yield start, functools.partial(_refuse, "bad-csv", f"not readable as CSV: {error}")
            continue
        if not cells:
            continue
        if header is None:
            header = _header(path, cells)
            if header == cells:
                continue
        yield start, functools.partial(_parse_cells, header, cells)


def _delimiter(header: str) -> str:
    """What stands between the names of a header: a comma, unless it has none and another does."""
    plain = re.sub(r'"[^"]*"', "quoted", header)
    other = max(";\t|", key=plain.count)
    # A line of prose is no header, and parts nothing.
    are_names = other in plain and all(0 < len(cell.split()) <= 3 for cell in plain.replace("\n", "").split(other))
    return other if are_names and "," not in plain else ","


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
            taken = [(start, line)]
            whole = _quoted_cells(_joined(taken, ahead, lines))
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


def _joined(
    taken: list[tuple[int, str]], ahead: collections.deque[tuple[int, str]], lines: Iterator[tuple[int, str]]
) -> Iterator[str]:
    """The lines that a record may go on over, as far as they are wanted; each is added to `taken`, and stays ahead."""
    yield taken[0][1]
    size = len(taken[0][1])
    while len(taken) < _MAX_JOINED and (following := _peek(ahead, lines, len(taken) - 1)):
        size += len(following[1])
        if size > MAX_ROW_BYTES:
            return
        taken.append(following)
        yield following[1]


def _peek(
    ahead: collections.deque[tuple[int, str]], lines: Iterator[tuple[int, str]], at: int
) -> tuple[int, str] | None:
    """The line `at` lines ahead, which stays there; None at the end of the file."""
    ahead.extend(itertools.islice(lines, max(at + 1 - len(ahead), 0)))
    return ahead[at] if at < len(ahead) else None


def _quoted_cells(lines: Iterator[str]) -> list[str] | None:
    """The cells of one record by the rules of quoting, of as many lines as it takes; None if they are broken."""
    try:
        return next(csv.reader(lines, delimiter="\t", strict=True))
    except (csv.Error, StopIteration):
        return None


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def _header(path: Path, cells: list[str]) -> list[str]:
    """The names of the columns: the first line, or "1", "2", ... where that is a row already (no name is so long)."""
    if any(len(cell) > 60 or len(cell.split()) > 6 for cell in cells):
        return [str(number) for number in range(1, len(cells) + 1)]
    repeated = first_repeated(cells)
    if repeated is not None:
        raise DataError(f"{path}:1: column {repeated!r} is given twice in the header")
    return cells


def _parse_cells(header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise BadRow("cell-count", f"{len(cells)} cells, but the header has {len(header)} columns")
    for name, cell in zip(header, cells, strict=True):
        check_utf8(cell, f"column {name!r}: ")
    return dict(zip(header, cells, strict=True))


def _parquet_options() -> dict[str, Any]:
    """So that JSON has its type also in files that were not written by Arrow, where this pyarrow can tell."""
    import pyarrow.parquet

    name = "arrow_extensions_enabled"
    return {name: True} if name in inspect.signature(pyarrow.parquet.ParquetFile.__init__).parameters else {}


def _read_parquet(path: Path, compression: str) -> Records:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with _open(path, compression) as stream, pyarrow.parquet.ParquetFile(stream, **_parquet_options()) as file:
            _check_parquet(path, file.metadata, _size(stream))
            read_row = row_reader(file.schema_arrow)
            for batch in file.iter_batches(batch_size=1024):
                for parse in parse_rows(read_row, batch):
                    number += 1
                    yield number, parse
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(f"{path}: not readable as Parquet after row {number}: {_reason(error)}") from None


def _check_parquet(path: Path, metadata: Any, size: int) -> None:
    """Refuses a file that says of itself that it becomes far more than it holds."""
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            packed, whole = chunk.total_compressed_size, chunk.total_uncompressed_size
            if whole > max(MOST_INFLATED, MOST_RATIO * size) or packed > size:
                raise DataError(
                    f"{path}: not readable as Parquet: column {chunk.path_in_schema!r} of row group {group + 1} is "
                    f"said to have {packed:,} bytes, {whole:,} without compression; the file has {size:,}"
                )


def _read_arrow(path: Path, compression: str) -> Records:
    """A file of record batches, as a stream (what `datasets` saves) or with an index at its end."""
    import pyarrow

    number = 0
    try:
        with _open(path, compression) as stream:
            is_indexed = stream.peek(6)[:6] == b"ARROW1" if isinstance(stream, io.BufferedReader) else False
            opened: Any = pyarrow.ipc.open_file(stream) if is_indexed else pyarrow.ipc.open_stream(stream)
            read_row = row_reader(opened.schema)
            batches = map(opened.get_batch, range(opened.num_record_batches)) if is_indexed else opened
            for batch in batches:
                _check_arrow(batch)
                for parse in parse_rows(read_row, batch):
                    number += 1
                    yield number, parse
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(f"{path}: not readable as Arrow after row {number}: {_reason(error)}") from None


def _check_arrow(batch: Any) -> None:
    """Refuses columns whose offsets lead out of the file: nothing else would, and all there would be read.

    Bytes that are no text are those of a row, and make only that one bad.
    """
    import pyarrow

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise


# What pyarrow raises of a damaged file; its own errors are some of these.
_DAMAGED = (OSError, MemoryError, RecursionError, ValueError, KeyError, IndexError, TypeError, NotImplementedError)


def _reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, RecursionError):
        return TOO_DEEP
    return " ".join(str(error).split()) or "there is not enough memory for it"


READERS: dict[str, Callable[[Path, str], Records]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}
COMPRESSIONS = (".gz", ".zst")

MOST_WHOLE = 16 * 2**30
"""Bytes of a file that has to be read as a whole."""
MOST_INFLATED, MOST_RATIO = 2**30, 100
"""What a compressed file may become: so many bytes, or so many times its size, whichever is more."""
MOST_SKIPPED_BYTES = 16 * MAX_ROW_BYTES
"""Of a line that is too large to be a row: of longer ones, nobody looks for the end."""
_MAX_JOINED = 100
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\Z)|[{}\[\]]', re.DOTALL)
"""Brackets of JSON, and strings, in which they mean nothing."""
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_SPACE = re.compile(r"[ \t\n\r]*")


def _open(path: Path, compression: str) -> IO[bytes]:
    if compression == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _size(file: IO[bytes]) -> int:
    """Bytes of an open file, without compression."""
    at = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(at)
    return size


def _rest(path: Path, file: IO[bytes]) -> bytes:
    """The rest of a file, all at once.

    Raises:
        DataError: more than any memory holds, or far more than the compressed file has.
    """
    size = path.stat().st_size
    most = min(MOST_WHOLE, max(MOST_INFLATED, MOST_RATIO * size))
    parts, length = [], 0
    while part := file.read(2**20):
        parts.append(part)
        length += len(part)
        if length > most:
            raise DataError(
                f"{path}: becomes more than {most:,} bytes, too many to be read at once ({size:,} in the file); give "
                "it as .jsonl, one object per line"
            )
    return b"".join(parts)


def _lines(path: Path, compression: str) -> Iterator[tuple[int, bytes]]:
    """Lines from 1, cut at newlines only; of a line that is too long only the first MAX_ROW_BYTES + 1 bytes.

    Raises:
        DataError: a line without an end in sight.
    """
    with _open(path, compression) as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if number == 1 and line.startswith(_UTF16):
                raise lost(path, 1, "bad-utf8", "this is UTF-16; save the file as UTF-8")
            yield number, line.removeprefix(_BOM) if number == 1 else line
            length = len(line)
            while len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
                line = file.readline(MAX_ROW_BYTES + 1)
                length += len(line)
                if length > MOST_SKIPPED_BYTES:
                    reason = f"a line of more than {MOST_SKIPPED_BYTES // 2**20} MiB"
                    raise lost(path, number, "row-too-large", reason)


def _text_lines(path: Path, compression: str) -> Iterator[tuple[int, str]]:
    for number, line in _lines(path, compression):
        if len(line) > MAX_ROW_BYTES:
            raise lost(path, number, "row-too-large", f"a line of more than {MAX_ROW_BYTES // 2**20} MiB")
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


def _refuse(code: str, reason: str) -> Any:
    raise BadRow(code, reason)


def lost(path: Path, line: int, code: str, reason: str) -> DataError:
    return DataError(f"{path}:{line}: {code}: {reason}; the rest of the file cannot be read, so it is never skipped")
