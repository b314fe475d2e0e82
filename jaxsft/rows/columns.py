"""Rows of columnar data (Parquet, Arrow files, the hub) as the objects that were written, lossless.

In: a table of Arrow. Out: functions that each make a dict of a row. Columns have one type, so a library that writes
objects of changing shape either gives each the keys of all, null where they are not there, or writes them as JSON text
in a column of type `arrow.json` (as `datasets` does from version 5). So a null of a struct says that the key is not
there, and is left out; JSON is decoded, and its nulls stay; a string that only looks like JSON stays a string.

`datasets` stores a string that is itself the JSON of something as it stands, so `4` may be the number or the text, and
`{"a": 1}` an object or the text. Where both can be meant, the text is kept: of a number that stands where a turn or a
row has its text, and (`AsWritten` of `strict.py`) of objects and lists that are not spaced as `datasets` writes them.
"""

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

from jaxsft.rows.strict import (
    MAX_ROW_BYTES,
    TOO_DEEP,
    BadRow,
    ListAsWritten,
    ObjectAsWritten,
    bad_utf8,
    parse_json,
)

Read = Callable[[Any], Any]
"""From the value that Arrow gives to the one that was written."""


def row_reader(schema: Any) -> Callable[[Any, int], dict[str, Any]]:
    """A function that gives row `index` of a table or record batch with this schema, as a dict without its nulls.

    The function raises BadRow for a text that should be JSON and is not, and for bytes that are not UTF-8.
    """
    features = _features(schema)
    readers = {
        field.name: read
        for field in schema
        if (read := _reader(field, features.get(field.name), (field.name,))) is not None
    }

    def read_row(table: Any, index: int) -> dict[str, Any]:
        try:
            (row,) = table.slice(index, 1).to_pylist()
        except UnicodeDecodeError as error:
            raise bad_utf8(error.object[error.start], error.start) from None
        except RecursionError:
            raise BadRow("too-deep", TOO_DEEP) from None
        fields = {}
        for name, value in row.items():
            if value is not None:
                read = readers.get(name)
                value = value if read is None else read(value)
                if value is not None:
                    fields[name] = value
        return fields

    return read_row


def parse_rows(read_row: Callable[[Any, int], dict[str, Any]], table: Any) -> Iterator[Callable[[], dict[str, Any]]]:
    """A function for each row of a table, which parses it when it is called.

    The functions raise BadRow: as `row_reader` says, and for a row that is too large.
    """
    has_large = table.nbytes > MAX_ROW_BYTES
    for index in range(table.num_rows):
        if has_large and table.slice(index, 1).nbytes > MAX_ROW_BYTES:
            yield _refuse_large
        else:
            yield functools.partial(read_row, table, index)


def _refuse_large() -> dict[str, Any]:
    raise BadRow("row-too-large", f"a row of more than {MAX_ROW_BYTES // 2**20} MiB")


def without_nulls(value: Any) -> Any:
    """The value without the nulls of its objects, at every depth: here a null says that the key is not there."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _features(schema: Any) -> dict[str, Any]:
    """The types that `datasets` wrote into the schema: they know of JSON even where the Arrow type was lost."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _reader(field: Any, feature: Any, path: tuple[str, ...]) -> Read | None:
    """A function that reads the values of a field; None where Arrow gives them as they were written. `path` is the
    names that lead to the field, without lists."""
    import pyarrow.types as types

    kind, metadata = field.type, field.metadata or {}
    extension = getattr(kind, "extension_name", None) or metadata.get(b"ARROW:extension:name", b"").decode()
    if extension == "arrow.json" or (isinstance(feature, dict) and feature.get("_type") == "Json"):
        return lambda value: _decoded(value, path)
    if types.is_struct(kind):
        parts = feature if isinstance(feature, dict) and not isinstance(feature.get("_type"), str) else {}
        readers = {part.name: _reader(part, parts.get(part.name), (*path, part.name)) for part in kind}
        return lambda value: _read_struct(value, readers)
    if types.is_map(kind):
        read_item = _reader(kind.item_field, None, (*path, ""))
        return lambda value: {key: item if read_item is None else _read(item, read_item) for key, item in value}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        if isinstance(feature, dict):
            feature = feature.get("feature")
        elif isinstance(feature, list):
            feature = feature[0] if feature else None
        read_part = _reader(kind.value_field, feature, path)
        return None if read_part is None else lambda value: [_read(part, read_part) for part in value]
    return None


def _read(value: Any, read: Read) -> Any:
    return None if value is None else read(value)


def _read_struct(value: dict[str, Any], readers: dict[str, Read | None]) -> dict[str, Any]:
    found = {}
    for name, part in value.items():
        if part is not None:
            read = readers.get(name)
            found[name] = part if read is None else read(part)
    return found


_TEXTS = ("content", "value", "text", "reasoning_content", "thinking", "reasoning")


def _decoded(text: Any, path: tuple[str, ...]) -> Any:
    if not isinstance(text, str):
        return text
    try:
        value = parse_json(text)
    except BadRow as bad:
        if bad.code != "bad-json":  # A text that only looks like JSON: `datasets` never writes a key twice.
            return text
        raise BadRow(bad.code, f"column {path[0]!r}: {bad}") from None
    if isinstance(value, dict | list):
        is_as_datasets = json.dumps(value, separators=(",", ":")).replace("/", "\\/") == text
        if is_as_datasets:
            return value
        return ObjectAsWritten(value, text) if isinstance(value, dict) else ListAsWritten(value, text)
    # Whether this is the text of a row or a turn, and not a value in the arguments of a call.
    has_text = (
        len(path) == 1 or (len(path) == 2 and path[1] in _TEXTS) or (path[1:2] == ("content",) and len(path) == 3)
    )
    return text if has_text and not isinstance(value, str) else value
