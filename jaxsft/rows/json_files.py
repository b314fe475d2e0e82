"""Files of JSON: objects one per line, or in one list, or one after the other.

In: one file. Out: its records (`files.py`), each with the line where it starts; parsing one may raise `BadRow`. A place
from which on the file cannot be read is a `DataError`.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

from jaxsft.rows.files import BOM, Parse, Records, lost, open_file, read_lines, read_rest, refuse
from jaxsft.rows.strict import (
    DECODER,
    MAX_ROW_BYTES,
    TOO_DEEP,
    BadRow,
    as_row,
    bad_utf8,
    check_utf8,
    check_value,
    parse_json,
)


def read_jsonl(path: Path, compression: str) -> Records:
    """One object per line; blank lines are passed over."""
    first = True
    for number, line in read_lines(path, compression):
        if line.isspace():
            continue
        if first and line.startswith(b"[") and not _is_json(line):
            # One JSON list under the wrong name.
            yield from read_json(path, compression)
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


def read_json(path: Path, compression: str) -> Records:
    """A list of objects, or (as many files named .json are) one object per line, or objects one after the other."""
    with open_file(path, compression) as file:
        head = file.readline(MAX_ROW_BYTES + 1)
        if head.lstrip(BOM).startswith(b"{") and _is_json(head):
            yield from read_jsonl(path, compression)
            return
        # Bytes that are no UTF-8 survive as half surrogates, so that the element that holds them can be named.
        text = (head + read_rest(path, file)).removeprefix(BOM).decode(errors="surrogateescape")
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
        # Where several elements start on one line, the column tells them apart.
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
    """The end of the JSON value that starts at `at`, and a function that gives the value or says why it is bad."""
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
        return close, functools.partial(refuse, "too-deep", TOO_DEEP)
    except ValueError:
        # The value breaks a rule of ours. If it can be seen where it ends, parsing it says later which rule.
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


_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\Z)|[{}\[\]]', re.DOTALL)
"""Brackets of JSON, and strings, in which they mean nothing."""


def _parse_element(text: str, value: Any = None) -> dict[str, Any]:
    if len(text) > MAX_ROW_BYTES:
        raise BadRow("row-too-large", f"an element of more than {MAX_ROW_BYTES // 2**20} MiB")
    check_utf8(text)
    if value is None:
        return as_row(parse_json(text))
    check_value(value, text)
    return as_row(value)


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match
    return match.end()


_SPACE = re.compile(r"[ \t\n\r]*")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
