"""What a chat template looks at: a render that tells whether another content would be rendered in the same way.

In: the template and a conversation whose contents are `Watched`. Out: the text, as pieces of the template and of
contents, and the questions that the template asked of a content, with their answers. A template that only joins and
trims contents, and asks no more than whether one begins with, ends with or holds some words, does the very same with
every other conversation of these roles whose contents give the same answers. What else is done to a content is not
followed: then nothing is said of other conversations.

    {{ '<user>' + message.content | trim }}      content " Hi " gives "<user>", and the content without its blanks
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jinja2.runtime

from jaxsft.chat.metered import ELEMENT
from jaxsft.chat.provenance import Run, Traced, runs_of
from jaxsft.chat.template import GENERATED, TracingEnvironment, is_constructor

Trims = tuple[tuple[str, str | None], ...]
"""How a content is trimmed before it is shown: methods of `str`, and the blanks that each takes away."""

_STEP = 1 << 48
"""Added to the source of a content once for each way in which it is trimmed."""


class Symbol(NamedTuple):
    """A content as it is shown."""

    source: int
    trims: Trims


class Guard(NamedTuple):
    """A question about a content, and the answer."""

    symbol: Symbol
    method: str
    """Of `str`."""
    arguments: tuple[Any, ...]
    answer: bool


class Watch:
    """What became of the contents of one conversation in its renders."""

    def __init__(self) -> None:
        self.is_followed = True
        """Nothing was done to a content that is not followed."""
        self.guards: dict[Guard, None] = {}
        self.num_passes = 0
        """How often any content, or a text with one in it, was passed on: what a render costs beside its steps."""
        self.symbols: list[Symbol] = []

    def lose(self) -> None:
        """Something is done that depends on more of a content than can be said."""
        self.is_followed = False

    def number(self, symbol: Symbol) -> int:
        """The source by which the characters of a symbol are told from those of others."""
        if symbol not in self.symbols:
            self.symbols.append(symbol)
        return symbol.source + _STEP * (1 + self.symbols.index(symbol))

    def symbol(self, source: int) -> Symbol | None:
        """The symbol of a source; None where it is none."""
        at = (source & ~GENERATED) // _STEP
        return self.symbols[at - 1] if at else None


class Watched(Traced):
    """A content, or a text that holds one."""

    __slots__ = ("_symbol", "_watch")
    _watch: Watch
    _symbol: Symbol | None
    """None: of more than a content."""

    def marked(self, mark: int) -> "Watched":
        return _make(self, tuple((length, source | mark, offset) for length, source, offset in self._runs), self._watch)

    def __add__(self, other: str) -> "Watched":
        if not isinstance(other, str):
            return NotImplemented
        if not isinstance(other, Watched) and not other:
            return self
        return _make(str.__add__(self, other), self._runs + runs_of(other), self._watch)

    def __radd__(self, other: str) -> "Watched":
        if not isinstance(other, str):
            return NotImplemented
        if not isinstance(other, Watched) and not other:
            return self
        return _make(str.__add__(other, self), runs_of(other) + self._runs, self._watch)

    def __bool__(self) -> bool:
        return True  # No content is empty here, and what a symbol becomes is looked at again in every row.

    def strip(self, chars: str | None = None) -> Any:
        return self._trimmed("strip", chars)

    def lstrip(self, chars: str | None = None) -> Any:
        return self._trimmed("lstrip", chars)

    def rstrip(self, chars: str | None = None) -> Any:
        return self._trimmed("rstrip", chars)

    def _trimmed(self, method: str, chars: str | None) -> Any:
        if self._symbol is None or (chars is not None and (type(chars) is not str or chars.strip())):
            self._watch.lose()
            return getattr(Traced, method)(_traced(self), chars)
        trimmed = getattr(str, method)(str.__str__(self), chars)
        if not trimmed:
            self._watch.lose()
            return Traced()
        self._watch.num_passes += 1
        return watched(trimmed, self._symbol._replace(trims=(*self._symbol.trims, (method, chars))), self._watch)

    def startswith(self, *arguments: Any) -> bool:
        return self._asked("startswith", arguments)

    def endswith(self, *arguments: Any) -> bool:
        return self._asked("endswith", arguments)

    def __contains__(self, other: Any) -> bool:
        return self._asked("__contains__", (other,))

    def __eq__(self, other: Any) -> bool:
        return self._asked("__eq__", (other,)) if isinstance(other, str) else False

    def __ne__(self, other: Any) -> bool:
        return not self.__eq__(other)

    def __hash__(self) -> int:
        self._watch.lose()
        return str.__hash__(self)

    def _asked(self, method: str, arguments: tuple[Any, ...]) -> bool:
        answer = bool(getattr(str, method)(str.__str__(self), *arguments))
        if self._symbol is None or any(isinstance(each, Watched) or not isinstance(each, str) for each in arguments):
            self._watch.lose()
        else:
            plain = tuple(str.__str__(each) for each in arguments)
            self._watch.guards[Guard(self._symbol, method, plain, answer)] = None
        return answer


def _make(text: str, runs: tuple[Run, ...], watch: Watch, symbol: Symbol | None = None) -> Watched:
    made = str.__new__(Watched, str.__str__(text))
    made._runs, made._watch, made._symbol = runs, watch, symbol
    return made


def watched(text: str, symbol: Symbol, watch: Watch) -> Watched:
    """A content as it is shown."""
    return _make(text, ((len(text), watch.number(symbol), 0),), watch, symbol)


def _traced(text: Watched) -> Traced:
    """The same text, its characters those of the data again, in which nobody watches."""
    plain = Traced(str.__str__(text))
    plain._runs = tuple((length, source % _STEP, offset) for length, source, offset in text._runs)
    return plain


def _losing(name: str) -> Callable[..., Any]:
    def method(self: Watched, *args: Any, **kwargs: Any) -> Any:
        self._watch.lose()
        return getattr(Traced, name)(_traced(self), *args, **kwargs)

    return method


_HARMLESS = {
    "__class__", "__delattr__", "__dir__", "__doc__", "__getattribute__", "__getnewargs__", "__getstate__", "__init__",
    "__init_subclass__", "__new__", "__reduce__", "__reduce_ex__", "__setattr__", "__sizeof__", "__str__",
    "__subclasshook__",
}  # fmt: skip
"""Of `str`: what every object has, and `__str__`, which gives the very same object."""

# Whatever else can be done to a text, of which a later Python may know more, looks at its characters.
for _name in {*dir(str), *(name for name in dir(Traced) if callable(getattr(Traced, name)))} - _HARMLESS:
    if _name not in vars(Watched) and _name not in ("marked", "_cut", "_thirds", "_located", "_cuts", "_mapped"):
        setattr(Watched, _name, _losing(_name))


class _Haystack(str):
    """A text in which something is looked for: a content in it is looked at."""

    def __contains__(self, other: Any) -> bool:
        if isinstance(other, Watched):
            other._watch.lose()
        return str.__contains__(self, other)


_BLIND_TESTS = {
    "defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "boolean", "number", "integer",
    "float", "callable", "true", "false",
}  # fmt: skip
"""Tests that see the class of a value, and nothing of a text."""
_BLIND_FILTERS = {
    "length", "count", "first", "last", "list", "default", "d", "items", "reverse", "selectattr", "rejectattr", "map",
    "_looped",
}  # fmt: skip
"""Filters that see the elements of a list, and nothing of them but by the tests and filters that they are told."""


class WatchingEnvironment(TracingEnvironment):
    """Renders as ever, and tells the watch of each content what is done to it."""

    def meter(self) -> None:
        super().meter()
        self.filters = {name: _watching_filter(name, filter) for name, filter in self.filters.items()}
        self.tests = {name: _watching_test(name, test) for name, test in self.tests.items()}

    def made(self, value: Any) -> Any:
        if isinstance(value, Watched):
            self._pass_on(value)
            return value
        return super().made(value)

    def text(self, value: Any) -> Any:
        if isinstance(value, Watched):
            self._pass_on(value)
            return value
        _lose(value)
        return super().text(value)

    def walked(self, value: Any) -> Any:
        if isinstance(value, Watched):
            return value
        value = super().walked(value)
        return _Haystack(value) if isinstance(value, str) else value

    def concat(self, parts: Any) -> str:
        parts = list(parts)
        watch = _watch_in(parts)
        if watch is None:
            return super().concat(parts)
        joined = _make("".join(parts), tuple(run for part in parts for run in runs_of(part)), watch)
        self._pass_on(joined)
        return joined

    def getitem(self, obj: Any, argument: Any) -> Any:
        _lose(argument)
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(__obj, jinja2.runtime.Macro) and not is_constructor(__obj):
            # Jinja hands variables on for functions that ask for the context.
            asks = getattr(__obj, "jinja_pass_arg", None) is not None
            given = {name: value for name, value in kwargs.items() if asks or name not in ("_loop_vars", "_block_vars")}
            _lose([*args, *given.values()])
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _lose([left, right])
        return super().call_binop(context, operator, left, right)

    def _pass_on(self, value: Watched) -> None:
        value._watch.num_passes += len(value._runs)
        self.spend(str.__len__(value) + ELEMENT * len(value._runs))


def _watching_filter(name: str, filter: Any) -> Any:
    at = int(getattr(filter, "jinja_pass_arg", None) is not None)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        value = args[at] if len(args) > at else None
        if isinstance(value, Watched):
            if name == "trim":
                return value.strip(*args[at + 1 :], **kwargs)
            if name == "string":
                return value
            if name not in ("default", "d"):
                value._watch.lose()
        elif name not in _BLIND_FILTERS:
            _lose([*args[at:], *kwargs.values()])
        return filter(*args, **kwargs)

    wrapped.__dict__.update(getattr(filter, "__dict__", {}))
    return wrapped


def _watching_test(name: str, test: Any) -> Any:
    at = int(getattr(test, "jinja_pass_arg", None) is not None)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if name in _BLIND_TESTS:
            args = tuple(_traced(each) if isinstance(each, Watched) else each for each in args)
        else:
            _lose([*args[at:], *kwargs.values()])
        return test(*args, **kwargs)

    wrapped.__dict__.update(getattr(test, "__dict__", {}))
    return wrapped


def _lose(value: Any) -> None:
    """A value is used in a way that is not followed."""
    if (watch := _watch_in(value)) is not None:
        watch.lose()


def _watch_in(value: Any) -> Watch | None:
    """The watch of a content in a value, however deep."""
    if isinstance(value, Watched):
        return value._watch
    inner: Sequence[Any] = ()
    if isinstance(value, dict):
        inner = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | type({}.items()) | type({}.keys()) | type({}.values())):
        inner = list(value)
    return next((watch for each in inner if (watch := _watch_in(each)) is not None), None)
