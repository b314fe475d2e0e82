"""Text that knows where each of its characters comes from.

A chat template is a program over strings. Given `Traced` strings, it renders the same text, and every character of it
still names the piece of data that it was taken from, through slicing, trimming, splitting, joining and JSON. So nothing
has to be searched for in the text: not content that stands there twice, that is trimmed, or that is empty.

    content = trace("  4  ", source=7)
    text = "Answer: " + content.strip() + "."
    text.runs == ((8, 0, 0), (1, 7, 2), (1, 0, 0))      (length, source, offset in that source); 0 is the template

What the operations below do not know (`%`, regular expressions) gives plain text without provenance: the text stays
right, and what became of the data is then said to be unknown, never guessed.
"""

import json
import operator
from collections.abc import Callable, Iterable, Iterator
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any, SupportsIndex

Run = tuple[int, int, int]
"""Length, source, and offset of the first character in that source; the template is source 0."""

TEMPLATE = 0
UNKNOWN = 1 << 39
"""Of text that was computed from data in a way that is not followed: it may be anybody's."""


class Traced(str):
    """A string whose characters know their source; everything else about it is `str`."""

    # The underscore keeps templates out: their sandbox refuses such attributes.
    __slots__ = ("_runs",)
    _runs: tuple[Run, ...]

    def __new__(cls, text: str = "") -> "Traced":
        traced = str.__new__(cls, text)
        traced._runs = ((len(text), TEMPLATE, 0),) if text else ()
        return traced

    @property
    def runs(self) -> tuple[Run, ...]:
        """The sources of the characters, from first to last; lengths add up to that of the text."""
        return self._runs

    def marked(self, mark: int) -> "Traced":
        """The same text, `mark` added to every source that lacks it."""
        return _make(str.__str__(self), tuple((length, source | mark, offset) for length, source, offset in self._runs))

    def __str__(self) -> str:
        return self

    def __format__(self, spec: str) -> str:
        return str.__format__(str.__str__(self), spec)

    def __reduce__(self) -> Any:
        return _make, (str.__str__(self), self._runs)

    def __add__(self, other: str) -> "Traced":
        if not isinstance(other, str):
            return NotImplemented
        return _make(str.__add__(self, other), self._runs + runs_of(other))

    def __radd__(self, other: str) -> "Traced":
        if not isinstance(other, str):
            return NotImplemented
        return _make(str.__add__(other, self), runs_of(other) + self._runs)

    def __mul__(self, count: SupportsIndex) -> "Traced":
        return _make(str.__mul__(self, count), self._runs * max(count.__index__(), 0))

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> "Traced":
        start, stop, stride = (
            index.indices(len(self)) if isinstance(index, slice) else (*_one(operator.index(index), len(self)), 1)
        )
        if stride == 1:
            return self._cut(start, max(stop, start))
        return join(self._cut(at, at + 1) for at in range(start, stop, stride))

    def __iter__(self) -> Iterator[str]:
        at = 0
        for length, source, offset in self._runs:
            for here in range(length):
                yield _make(str.__getitem__(self, at + here), ((1, source, offset + here),))
            at += length

    def _cut(self, start: int, stop: int) -> "Traced":
        runs = []
        at = 0
        for length, source, offset in self._runs:
            first, last = max(start, at), min(stop, at + length)
            if first < last:
                runs.append((last - first, source, offset + first - at))
            at += length
        return _make(str.__getitem__(self, slice(start, stop)), tuple(runs))

    def strip(self, chars: str | None = None) -> "Traced":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> "Traced":
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None) -> "Traced":
        return self._cut(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str) -> "Traced":
        return self._cut(len(prefix) if str.startswith(self, prefix) else 0, len(self))

    def removesuffix(self, suffix: str) -> "Traced":
        return self._cut(0, len(self) - (len(suffix) if suffix and str.endswith(self, suffix) else 0))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        bounds, at = [], 0
        for kept, line in zip(str.splitlines(self, True), str.splitlines(self, keepends), strict=True):
            bounds.append((at, at + len(line)))
            at += len(kept)
        return self._cuts(bounds)

    def partition(self, sep: str) -> tuple[str, str, str]:
        before, found, _ = str.partition(self, sep)
        return self._thirds(len(before), len(found))

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        before, found, _ = str.rpartition(self, sep)
        return self._thirds(len(before), len(found))

    def _thirds(self, at: int, length: int) -> tuple[str, str, str]:
        return self._cut(0, at), self._cut(at, at + length), self._cut(at + length, len(self))

    def _located(self, parts: list[str], sep: str | None) -> list[str]:
        """The parts of a split, which stand in the text in order."""
        bounds: list[tuple[int, int]] = []
        at = 0
        for part in parts:
            if sep is None:
                at = str.index(self, part, at)
            elif bounds:
                at += len(sep)
            bounds.append((at, at + len(part)))
            at += len(part)
        return self._cuts(bounds)

    def _cuts(self, bounds: list[tuple[int, int]]) -> list[str]:
        """Many parts, in order and apart, in one walk along the text."""
        cuts: list[str] = []
        runs, number, at = self._runs, 0, 0
        for start, stop in bounds:
            while number < len(runs) and at + runs[number][0] <= start:
                at += runs[number][0]
                number += 1
            found, here, each = [], at, number
            while each < len(runs) and here < stop:
                length, source, offset = runs[each]
                first, last = max(start, here), min(stop, here + length)
                if first < last:
                    found.append((last - first, source, offset + first - here))
                here += length
                each += 1
            cuts.append(_make(str.__getitem__(self, slice(start, stop)), tuple(found)))
        return cuts

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> "Traced":
        if not old:
            return unknown(str.replace(self, old, new, count))
        parts = self.split(old, count.__index__())
        return trace_plain(new).join(parts)

    def join(self, parts: Iterable[str]) -> "Traced":
        joined: list[str] = []
        for at, part in enumerate(parts):
            if not isinstance(part, str):
                raise TypeError(f"sequence item {at}: expected str instance, {type(part).__name__} found")
            joined += [self, part] if at else [part]
        return join(joined)

    def _mapped(self, text: str) -> "Traced":
        """Another spelling, character for character; where the length changes, nothing is known of it."""
        return _make(text, self._runs) if len(text) == len(self) else unknown(text)

    def upper(self) -> "Traced":
        return self._mapped(str.upper(self))

    def lower(self) -> "Traced":
        return self._mapped(str.lower(self))

    def title(self) -> "Traced":
        return self._mapped(str.title(self))

    def capitalize(self) -> "Traced":
        return self._mapped(str.capitalize(self))

    def casefold(self) -> "Traced":
        return self._mapped(str.casefold(self))

    def swapcase(self) -> "Traced":
        return self._mapped(str.swapcase(self))


class TracedMarkup(Traced):
    """What the filter `safe` gives: text that escapes for HTML whatever is added to it, as Jinja has it.

    No chat template means that, but some get it, and the text is then what transformers makes of it.
    """

    __slots__ = ()

    @staticmethod
    def of(text: Traced) -> "TracedMarkup":
        markup = str.__new__(TracedMarkup, str.__str__(text))
        markup._runs = text._runs
        return markup

    def __add__(self, other: str) -> Traced:
        return TracedMarkup.of(join([self, _html(other)]))

    def __radd__(self, other: str) -> Traced:
        return TracedMarkup.of(join([_html(other), self]))


_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&#39;", '"': "&#34;"}


def _html(text: str) -> str:
    if isinstance(text, TracedMarkup):
        return text
    escaped = "".join(_HTML.get(char, char) for char in str.__str__(text))
    quoted = _escaped(trace_plain(text), f'"{escaped}"', lambda char: _HTML.get(char, char))
    return quoted[1:-1]


def trace(text: str, source: int) -> Traced:
    """A piece of data: its characters are those of `source`, from 0."""
    return _make(text, ((len(text), source, 0),) if text else ())


def unknown(text: str) -> Traced:
    """Text of data of which nobody can tell any more where it comes from."""
    return _make(text, ((len(text), UNKNOWN, 0),) if text else ())


def trace_plain(text: str) -> Traced:
    """A string as it is, the template's own where it has no provenance."""
    return text if isinstance(text, Traced) else _make(text, None)


def runs_of(text: str) -> tuple[Run, ...]:
    """The sources of the characters of a string."""
    if isinstance(text, Traced):
        return text._runs
    return ((len(text), TEMPLATE, 0),) if text else ()


def join(parts: Iterable[str]) -> Traced:
    """All parts one after the other."""
    parts = list(parts)
    runs: list[Run] = []
    length, source, offset = 0, TEMPLATE, 0
    for part in parts:
        for more, of, since in runs_of(part):
            if of == source and (source == TEMPLATE or since == offset + length):
                length += more
            else:
                if length:
                    runs.append((length, source, offset))
                length, source, offset = more, of, since
    if length:
        runs.append((length, source, offset))
    return _make("".join(parts), tuple(runs))


def trace_values(value: Any, make: Callable[[str], str]) -> Any:
    """A copy of plain data (dicts, lists, scalars) whose strings, keys included, are what `make` makes of them."""
    if isinstance(value, str):
        return make(value)
    if isinstance(value, dict):
        return {trace_values(key, make): trace_values(item, make) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [trace_values(item, make) for item in value]
    return value


def holds_traced(value: Any) -> bool:
    """Whether plain data holds a string with provenance."""
    if isinstance(value, dict):
        return any(holds_traced(key) or holds_traced(item) for key, item in value.items())
    if isinstance(value, list | tuple | set | type({}.items()) | type({}.keys()) | type({}.values())):
        return any(map(holds_traced, value))
    return isinstance(value, Traced)


def dump_json(value: Any, *, ensure_ascii: bool, indent: Any, separators: Any, sort_keys: bool) -> str:
    """`json.dumps`, to the letter, with the provenance of the strings inside."""
    options: dict[str, Any] = {"ensure_ascii": ensure_ascii, "sort_keys": sort_keys}
    plain = json.dumps(value, indent=indent, separators=separators, **options)
    if not holds_traced(value):
        return plain
    item_separator, key_separator = separators or (", " if indent is None else ",", ": ")
    step = " " * indent if isinstance(indent, int) else indent
    parts: list[str] = []

    def dump(value: Any, depth: int) -> None:
        if isinstance(value, dict):
            items = sorted(value.items()) if sort_keys else list(value.items())
            within("{", "}", [((quoted(key), key_separator), item) for key, item in items], depth)
        elif isinstance(value, list | tuple):
            within("[", "]", [((), item) for item in value], depth)
        elif isinstance(value, Traced):
            parts.append(_quoted(value, ensure_ascii))
        else:
            parts.append(json.dumps(value, **options))

    def quoted(key: Any) -> str:
        return _quoted(key, ensure_ascii) if isinstance(key, Traced) else json.dumps({key: 0}, **options)[1:-4]

    def within(opening: str, closing: str, items: list[tuple[tuple[str, ...], Any]], depth: int) -> None:
        between = "" if step is None else "\n" + step * (depth + 1)
        parts.append(opening)
        for at, (before, item) in enumerate(items):
            parts.extend((item_separator + between if at else between, *before))
            dump(item, depth + 1)
        parts.append(("" if step is None or not items else "\n" + step * depth) + closing)

    dump(value, 0)
    traced = join(parts)
    return traced if traced == plain else unknown(plain)


def dump_python(value: Any) -> str:
    """`str` of a dict, list or anything else, as Python writes it, with the provenance of the strings inside."""
    plain = str(value)

    def dump(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield "{"
            for at, (key, item) in enumerate(value.items()):
                yield ", " if at else ""
                yield from dump(key)
                yield ": "
                yield from dump(item)
            yield "}"
        elif isinstance(value, list):
            yield "["
            for at, item in enumerate(value):
                yield ", " if at else ""
                yield from dump(item)
            yield "]"
        elif isinstance(value, Traced):
            quoted = repr(str.__str__(value))
            escapes = {"'": "'", '"': '"', quoted[0]: "\\" + quoted[0]}
            yield _escaped(value, quoted, lambda char: escapes.get(char) or repr(char)[1:-1])
        else:
            yield unknown(repr(value)) if holds_traced(value) else repr(value)

    traced = join(dump(value))
    return traced if traced == plain else unknown(plain)


def _quoted(text: Traced, ensure_ascii: bool) -> str:
    """A JSON string; each character of the data owns the escape that it is written as."""
    quote = encode_basestring_ascii if ensure_ascii else encode_basestring
    return _escaped(text, quote(str.__str__(text)), lambda char: quote(char)[1:-1])


def _escaped(text: Traced, quoted: str, escape: Callable[[str], str]) -> str:
    """`quoted` as the spelling of `text`: each character of the data owns all of the escape that it is written as."""
    if len(quoted) == len(text) + 2:
        return join([quoted[0], _make(quoted[1:-1], text._runs), quoted[-1]])
    runs: list[Run] = [(1, TEMPLATE, 0)]
    plain, at = str.__str__(text), 0
    for length, source, offset in text._runs:
        since = at  # The first character that is not in `runs` yet.
        for end in range(at, at + length):
            size = len(escape(plain[end]))
            if size > 1:
                runs += [(end - since, source, offset + since - at)] * (end > since)
                runs += [(1, source, offset + end - at)] * size
                since = end + 1
        runs += [(at + length - since, source, offset + since - at)] * (at + length > since)
        at += length
    runs.append((1, TEMPLATE, 0))
    return _make(quoted, tuple(runs)) if sum(run[0] for run in runs) == len(quoted) else unknown(quoted)


def _one(index: int, length: int) -> tuple[int, int]:
    at = index + length if index < 0 else index
    if not 0 <= at < length:
        raise IndexError("string index out of range")
    return at, at + 1


def _make(text: str, runs: tuple[Run, ...] | None) -> Traced:
    traced = str.__new__(Traced, text)
    traced._runs = (((len(text), TEMPLATE, 0),) if text else ()) if runs is None else runs
    return traced
