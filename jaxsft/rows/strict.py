"""JSON as the standard has it, and what else makes a row of a file bad before anyone asks what it means.

In: text. Out: values, or a `BadRow` with the code of what is wrong: no key twice, no NaN, no number that floats cannot
hold, no half of a surrogate pair, no endless nesting.
"""

import json
import math
from collections.abc import Iterable
from typing import Any

MAX_ROW_BYTES = 64 * 2**20
"""Longest line or JSON element that is read: a guard against files that are no rows."""
MAX_DEPTH = 200
"""Deepest nesting of a row: what comes later (templates, copies) is recursive."""
TOO_DEEP = f"nested too deep: at most {MAX_DEPTH} levels are read"


class DataError(ValueError):
    """A mistake of the user in the data; its text is shown as it is."""

    exit_code = 65


class BadRow(ValueError):
    """Why one row is bad: `code` for counting, the text for the user. Becomes a `Problem` where the origin is known."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class ObjectAsWritten(dict):
    """An object that may also be meant as the text that it was decoded from."""

    def __init__(self, value: dict[str, Any], written: str) -> None:
        super().__init__(value)
        self.written = written


class ListAsWritten(list):
    """A list that may also be meant as the text that it was decoded from."""

    def __init__(self, value: list[Any], written: str) -> None:
        super().__init__(value)
        self.written = written


def parse_json(text: str) -> Any:
    """The value that the text spells.

    Raises:
        BadRow: text that spells none, with its code.
    """
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BadRow("bad-json", f"not readable as JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadRow("too-deep", TOO_DEEP) from None
    except BadRow:
        raise
    except ValueError:  # Python's own guard against whole numbers of thousands of digits.
        raise BadRow("number-overflow", "holds a whole number of too many digits") from None
    check_value(value, text)
    return value


def check_value(value: Any, text: str) -> None:
    """Refuses what Python's decoder lets through; `text` is the JSON that the value came from."""
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise BadRow("too-deep", TOO_DEEP)
    if "\\u" in text and not _is_unicode(value):
        # JSON can escape half a surrogate pair, which is no text and which no tokenizer takes.
        raise BadRow("lone-surrogate", "holds half of a surrogate pair (an escape such as \\ud800), which is not text")


def as_row(value: Any) -> dict[str, Any]:
    """The value, if it is a row."""
    if not isinstance(value, dict):
        raise BadRow("not-an-object", f"a row is a JSON object, this is {kind_of(value)}")
    if not value:
        raise BadRow("empty-row", "an object without any column")
    return value


def inner_json(text: str, code: str, where: str) -> Any:
    """JSON that stands in the row as text."""
    try:
        return parse_json(text)
    except BadRow as bad:
        raise BadRow(code, f"{where}{bad}; got {short(text)}") from None


def check_text(text: Any, where: str) -> str:
    """Text as it is, unless it holds what no text has."""
    if type(text) is not str:
        text = text.written if isinstance(text, ObjectAsWritten | ListAsWritten) else text
        if not isinstance(text, str):
            raise BadRow("wrong-type", f"{where} must be text, got {short(text)}")
    if "\0" in text:
        raise BadRow("nul-character", f"{where} holds a NUL character (\\u0000) at offset {text.index(chr(0))}")
    return text


def short(value: Any) -> str:
    """The value, or its beginning."""
    text = repr(value) if not isinstance(value, list | dict) else repr(value)[:400]
    return text if len(text) <= 60 else f"{text[:57]}..."


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    kinds = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def bad_utf8(byte: int, at: int, where: str = "") -> BadRow:
    return BadRow("bad-utf8", f"{where}not valid UTF-8 (byte 0x{byte:02x} at offset {at}); save the file as UTF-8")


def check_utf8(text: str, where: str = "") -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad_utf8(ord(text[error.start]) & 0xFF, error.start, where) from None


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
        repeated = first_repeated([name for name, _ in pairs])
        raise BadRow("duplicate-key", f"key {repeated!r} is given twice in one object")
    return fields


def first_repeated(names: Iterable[str]) -> str | None:
    """The first name that was there before; None where each is given once."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _refuse_constant(name: str) -> Any:
    raise BadRow("not-finite", f"{name} is not JSON; expected a finite number or null")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise BadRow("number-overflow", f"the number {text} is too large")
    return number


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite)
