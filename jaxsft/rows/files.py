"""What every reader of files shares: a file opened, its lines, and how much of it is read at most.

In: a path and how the file is compressed. Out: bytes, or numbered lines. What the lines say is left to the modules that
read one kind of file each: `json_files.py`, `csv_files.py` and `arrow_files.py`.
"""

import gzip
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from jaxsft.rows.strict import MAX_ROW_BYTES, BadRow, DataError

Parse = Callable[[], dict[str, Any]]
"""Gives the columns of one record, or raises `BadRow`."""
Records = Iterator[tuple[int | str, Parse]]
"""Where each record starts (a line, or a number from 1), and what parses it: only where it is wanted, so that passing
over records is cheap."""

COMPRESSIONS = (".gz", ".zst")

MOST_WHOLE = 16 * 2**30
"""Bytes of a file that has to be read as a whole."""
MOST_INFLATED, MOST_RATIO = 2**30, 100
"""What a compressed file may become: so many bytes, or so many times its size, whichever is more."""
MOST_SKIPPED_BYTES = 16 * MAX_ROW_BYTES
"""Bytes of a line that is too large to be a row and is passed over; one that is longer still ends the reading."""

BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def most_bytes(size: int) -> int:
    """Bytes that a compressed file of so many bytes may become."""
    return max(MOST_INFLATED, MOST_RATIO * size)


def open_file(path: Path, compression: str) -> IO[bytes]:
    """A file opened for reading, whose bytes come without compression; `compression` is "" or one of `COMPRESSIONS`."""
    if compression == ".gz":
        return gzip.open(path.open("rb"))  # type: ignore[return-value]
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path.open("rb"), compression="zstd"))
    return path.open("rb")


def size_of(file: IO[bytes]) -> int:
    """Bytes of an open file, without compression."""
    at = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(at)
    return size


def read_rest(path: Path, file: IO[bytes]) -> bytes:
    """The rest of a file, all at once.

    Raises:
        DataError: more than any memory holds, or far more than the compressed file has.
    """
    size = path.stat().st_size
    most = min(MOST_WHOLE, most_bytes(size))
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


def read_lines(path: Path, compression: str) -> Iterator[tuple[int, bytes]]:
    """Lines from 1, cut at newlines only; of a line that is too long only the first MAX_ROW_BYTES + 1 bytes.

    Raises:
        DataError: a line without an end in sight.
    """
    with open_file(path, compression) as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if number == 1 and line.startswith(_UTF16):
                raise lost(path, 1, "bad-utf8", "this is UTF-16; save the file as UTF-8")
            yield number, line.removeprefix(BOM) if number == 1 else line
            length = len(line)
            while len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
                line = file.readline(MAX_ROW_BYTES + 1)
                length += len(line)
                if length > MOST_SKIPPED_BYTES:
                    reason = f"a line of more than {MOST_SKIPPED_BYTES // 2**20} MiB"
                    raise lost(path, number, "row-too-large", reason)


def read_text_lines(path: Path, compression: str) -> Iterator[tuple[int, str]]:
    """Lines from 1 as text; bytes that are not UTF-8 become half surrogates, so that the bad row can still be named.

    Raises:
        DataError: a line that is too large.
    """
    for number, line in read_lines(path, compression):
        if len(line) > MAX_ROW_BYTES:
            raise lost(path, number, "row-too-large", f"a line of more than {MAX_ROW_BYTES // 2**20} MiB")
        yield number, line.decode(errors="surrogateescape")


def refuse(code: str, reason: str) -> Any:
    """What parses a record that is bad: it raises `BadRow`."""
    raise BadRow(code, reason)


def lost(path: Path, line: int, code: str, reason: str) -> DataError:
    """The error for a place from which on a file cannot be read."""
    return DataError(f"{path}:{line}: {code}: {reason}; the rest of the file cannot be read, so it is never skipped")
