"""Files of Arrow tables: Parquet, and record batches with or without an index (`.arrow`).

In: one file. Out: its records (`files.py`), numbered from 1. A file that is damaged, or says of itself that it becomes
far more than it holds, is a `DataError`. How a row of a table becomes a dict is left to `columns.py`.
"""

import inspect
import io
from pathlib import Path
from typing import Any

from jaxsft.rows.columns import parse_rows, row_reader
from jaxsft.rows.files import Records, most_bytes, open_file, size_of
from jaxsft.rows.strict import TOO_DEEP, DataError


def read_parquet(path: Path, compression: str) -> Records:
    """Rows in the order of the file, a few at a time."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with open_file(path, compression) as stream, pyarrow.parquet.ParquetFile(stream, **_parquet_options()) as file:
            _check_parquet(path, file.metadata, size_of(stream))
            read_row = row_reader(file.schema_arrow)
            for batch in file.iter_batches(batch_size=1024):
                for parse in parse_rows(read_row, batch):
                    number += 1
                    yield number, parse
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(f"{path}: not readable as Parquet after row {number}: {_reason(error)}") from None


def _parquet_options() -> dict[str, Any]:
    """Options by which JSON columns have their type also in files of other writers; older pyarrow has none."""
    import pyarrow.parquet

    name = "arrow_extensions_enabled"
    return {name: True} if name in inspect.signature(pyarrow.parquet.ParquetFile.__init__).parameters else {}


def _check_parquet(path: Path, metadata: Any, size: int) -> None:
    """Refuses a file that says of itself that it becomes far more than it holds."""
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            packed, whole = chunk.total_compressed_size, chunk.total_uncompressed_size
            if whole > most_bytes(size) or packed > size:
                raise DataError(
                    f"{path}: not readable as Parquet: column {chunk.path_in_schema!r} of row group {group + 1} is "
                    f"said to have {packed:,} bytes, {whole:,} without compression; the file has {size:,}"
                )


def read_arrow(path: Path, compression: str) -> Records:
    """A file of record batches, as a stream (what `datasets` saves) or with an index at its end."""
    import pyarrow

    number = 0
    try:
        with open_file(path, compression) as stream:
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
    """Refuses columns whose offsets point outside of the file; pyarrow itself would read whatever memory is there.

    Bytes that are not UTF-8 pass here: they make only their own row bad, when it is parsed.
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
