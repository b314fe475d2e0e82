"""Which format the rows of a source have: as the config says, or by the columns of its first rows.

In: some rows and the source's section of the config. Out: a `Chosen`: the format, how columns are renamed, and what is
said to the user about it. What each format reads is `readings.py`; what the rows then hold, `formats.py`.
"""

import collections
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxsft.config import SourceConfig
from jaxsft.rows.messages import READ_KEYS
from jaxsft.rows.nearest import as_yaml, describe_columns, guess, nearest
from jaxsft.rows.readings import FORMATS, PREFERENCE
from jaxsft.rows.roles import check_role
from jaxsft.rows.sources import DataError, Row
from jaxsft.rows.strict import BadRow

SAMPLE = 100
"""Rows from which a format is chosen."""


class Chosen(NamedTuple):
    """The format in which the rows of a source are read."""

    format: str
    reason: str
    """Why this one, for the user."""
    ignored: list[str]
    """Columns of the rows that it does not read."""
    columns: Mapping[str, str]
    """Ours -> theirs: those of the config, and names that differ from ours in capitals or blanks alone."""
    refused: frozenset[str]
    """Columns that no row may have: the format was detected, not given, and another format would read them."""


def choose_format(rows: Sequence[Row], source: SourceConfig) -> Chosen:
    """The format of a source, from the config or from the columns of its first rows; each row counts, so that one odd
    row decides nothing.

    Raises:
        DataError: no format fits, or the source's `format`, `columns` or `roles` cannot be right.
    """
    _check_settings(rows, source)
    columns, folded = dict(source.columns), _folded(rows, source)
    if source.format is not None:
        format, reason = source.format, "given in the config"
    else:
        found, error = _detected(rows, columns)
        if found is None:
            columns = folded | columns
            found, _ = _detected(rows, columns)
        if found is None:
            raise DataError(f"{source.path}: no rows that can be read" if error is None else str(error))
        format = found
        reason = f"has the columns {', '.join(columns.get(name, name) for name in FORMATS[format].columns)}"
    known = FORMATS[format]
    read = known.columns + known.optional
    columns |= {ours: theirs for ours, theirs in folded.items() if ours in read and ours not in columns}
    there = dict.fromkeys(name for row in rows for name in rename(row.fields, columns))
    refused: frozenset[str] = frozenset() if source.format is not None else _richer(format)
    in_part = {theirs.split(".")[0] for theirs in columns.values()}
    ignored = [name for name in there if name not in read and name not in in_part]
    return Chosen(format, reason, ignored, columns, refused - in_part)


def _detected(rows: Sequence[Row], columns: Mapping[str, str]) -> tuple[str | None, DataError | None]:
    """The format of most rows, or None where no format fits any row; and the error of the first row that none fits."""
    found: collections.Counter[str] = collections.Counter()
    first: DataError | None = None
    for row in rows:
        fields = rename(row.fields, columns)
        there = {name: value for name, value in fields.items() if value is not None}
        format = _fitting(there)
        if format is not None:
            found[format] += 1
        elif first is None:
            first = DataError(f"{row.origin}: {_no_format(there)}")
    return (found.most_common(1)[0][0] if found else None), first


def _folded(rows: Sequence[Row], source: SourceConfig) -> dict[str, str]:
    """Columns whose names differ from ours only in capitals, blanks or hyphens, as ours -> theirs."""
    there = dict.fromkeys(name for row in rows for name in row.fields)
    known = {name for format in FORMATS.values() for name in (*format.columns, *format.optional)}
    found: dict[str, list[str]] = {}
    for name in there:
        ours = re.sub(r"[\s-]+", "_", name.strip().lower())
        if ours in known and ours not in there and ours not in source.columns and name not in source.columns.values():
            found.setdefault(ours, []).append(name)
    return {ours: theirs[0] for ours, theirs in found.items() if len(theirs) == 1}


def _richer(format: str) -> frozenset[str]:
    """Columns that rows of a detected format may not have beside its own, since what they say would be lost.

    For plain text, these are the columns of all other formats. For a question and its answer, they are the columns that
    another format with the same question or answer reads as a part of either.
    """
    known = FORMATS[format]
    read = {*known.columns, *known.optional}
    others = [other for name, other in FORMATS.items() if name != format and other.context is not None]
    if format == "text":
        names = {name for other in FORMATS.values() for name in (*other.columns, *(other.context or ()))}
        return frozenset(names - read - _PROVENANCE)
    if known.context is None:
        return frozenset()
    return (
        frozenset(name for other in others if set(other.columns) & set(known.columns) for name in other.context or ())
        - read
    )


_PROVENANCE = {"source", "user", "SOURCE", "message_tree_id"}
"""Columns of other formats that, beside a plain text, only say where it comes from."""


def detect_format(columns: Iterable[str]) -> str:
    """The first format of `FORMATS`, in its order, whose columns are all there.

        detect_format(["id", "messages", "prompt", "completion"]) == "messages"

    Raises:
        DataError: no format fits; says what the columns could be, and how to map them.
    """
    fields = dict.fromkeys(columns)
    found = _fitting(fields)
    if found is None:
        raise _no_format(fields)
    return found


def _fitting(columns: Iterable[str]) -> str | None:
    there = set(columns)
    if set(_FLAT_TREE) <= there:
        return None
    return next((name for name, known in FORMATS.items() if set(known.columns) <= there), None)


def _no_format(fields: Mapping[str, Any]) -> DataError:
    """The error of a row that no format fits: the line that helps first, then the nearest formats."""
    if set(_FLAT_TREE) <= fields.keys():
        return DataError(
            f"columns {', '.join(_FLAT_TREE)}: messages of OpenAssistant's trees, one a row; use the files of whole "
            "trees, one tree a row (columns message_tree_id and prompt)"
        )
    given = f"no known format has the columns {describe_columns(fields) or '(none)'}"
    if {"chosen", "rejected"} <= fields.keys():
        return DataError(f"{given}: {PREFERENCE}")
    if fields and list(fields) == [str(number) for number in range(1, len(fields) + 1)]:
        given += " (numbers stand for a first line that holds no names)"
    near = nearest(list(fields))
    found = guess(fields)
    if found is not None:
        near = list(dict.fromkeys([found.format, *near]))
        condition = f", {found.condition}" if found.condition else ""
        help_ = f"they are {found.format} by columns={as_yaml(found.columns)}{condition}"
    else:
        lacking = [name for name in FORMATS[near[0]].columns if name not in fields]
        has_part = len(lacking) < len(FORMATS[near[0]].columns)
        help_ = f"{near[0]}, the nearest, lacks {', '.join(lacking)}; " * has_part
        help_ += "name them by `columns` (ours: theirs), such as columns={prompt: inputs, completion: targets}"
    needs = "\n".join(f"  {name}: {', '.join(FORMATS[name].columns)}" for name in near)
    return DataError(f"{given}; {help_}\nthe nearest formats and their columns (docs/formats.md has all):\n{needs}")


_FLAT_TREE = ("message_id", "parent_id", "text", "role")


def rename(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Columns under our names; a column that had such a name before is then not read.

    rename({"answers": {"text": ["a", "b"]}}, {"completion": "answers.text.0"}) == {"completion": "a"}
    """
    if not columns:
        return dict(fields)
    rest = {name: value for name, value in fields.items() if name not in columns and name not in columns.values()}
    found = {ours: _value_at(fields, theirs) for ours, theirs in columns.items()}
    return rest | {ours: value for ours, value in found.items() if value is not None}


def _value_at(fields: Mapping[str, Any], path: str) -> Any:
    """The column of that name, or what a path of keys and numbers from 0 leads to; None where there is nothing."""
    if path in fields:
        return fields[path]
    value: Any = fields
    for key in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list) and re.fullmatch(r"\d+", key) and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def _check_settings(rows: Sequence[Row], source: SourceConfig) -> None:
    if source.format is not None and source.format not in FORMATS:
        near = difflib.get_close_matches(source.format, FORMATS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise DataError(f"{source.path}: format {source.format!r} is not known{hint}; known: {', '.join(FORMATS)}")
    there = list(dict.fromkeys(name for row in rows for name in row.fields))
    formats = [FORMATS[source.format]] if source.format else list(FORMATS.values())
    known = list(dict.fromkeys(name for format in formats for name in (*format.columns, *format.optional)))
    for ours, theirs in source.columns.items():
        if ours not in known:
            near = difflib.get_close_matches(ours, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            of = f"format {source.format!r}" if source.format else "any format"
            raise DataError(
                f"{source.path}: columns: {ours!r} is no column of {of}{hint}; `columns` is ours: theirs, and ours are "
                f"{', '.join(known)}"
            )
        if rows and theirs not in there and all(_value_at(row.fields, theirs) is None for row in rows):
            raise DataError(
                f"{source.path}: columns: {ours}: {theirs}: the rows have no column {theirs!r}; theirs are "
                f"{', '.join(there)}, and `a.b.0` is the first of the list under key b of column a"
            )
    for theirs, ours in source.keys.items():
        if ours not in READ_KEYS:
            near = difflib.get_close_matches(ours, READ_KEYS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise DataError(
                f"{source.path}: keys: {theirs}: {ours!r} is no key of a turn{hint}; `keys` is theirs: ours, and ours "
                f"are {', '.join(READ_KEYS)}"
            )
    for theirs, ours in source.roles.items():
        try:
            check_role(ours, f"roles: {theirs}: {ours}")
        except BadRow as bad:
            raise DataError(f"{source.path}: {bad}; `roles` is theirs: ours, such as {{Doctor: assistant}}") from None
