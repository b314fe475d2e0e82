"""Files of cells: CSV, and TSV, which most programs write without quoting.

In: one file. Out: its records (`files.py`), each with the line where it starts; parsing one may raise `BadRow`. The
first line names the columns. A place from which on the file cannot be read is a `DataError`.
"""

import collections
import csv
import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsft.rows.files import Records, lost, read_text_lines, refuse
from jaxsft.rows.strict import MAX_ROW_BYTES, BadRow, DataError, check_utf8, first_repeated


def read_csv(path: Path, compression: str) -> Records:
    """Cells parted by commas, or by what else the header has between its names; quoted cells may hold newlines."""
    csv.field_size_limit(MAX_ROW_BYTES)  # The default refuses cells of more than 131,072 characters.
    lines = read_text_lines(path, compression)
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
            yield start, functools.partial(refuse, "bad-csv", f"not readable as CSV: {error}")
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
    # The names of columns have few words each; a line of prose is not cut at its semicolons.
    are_names = other in plain and all(0 < len(cell.split()) <= 3 for cell in plain.replace("\n", "").split(other))
    return other if are_names and "," not in plain else ","


def read_tsv(path: Path, compression: str) -> Records:
    """Tab-separated cells; a quote opens a quoted cell only where the cells then come out right.

    Most TSV is written without quoting (a cell may start with a quotation); spreadsheets quote cells that hold tabs,
    newlines or quotes. So several lines are read as one quoted record only if its quotes are closed, it has as many
    cells as the header, and the lines would not be good rows by themselves.
    """
    lines = read_text_lines(path, compression)
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


_MAX_JOINED = 100
"""Lines that one quoted record of TSV may go over."""


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
