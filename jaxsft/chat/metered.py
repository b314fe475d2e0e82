"""A Jinja environment in which a render may only do so much: a template is a program, and rows decide what it does.

In: Jinja's sandbox. Out: the same, which counts what is made and gone through, and stops what goes beyond the allowance
of a conversation (`allowance`). Counted are characters and elements of what is made, before it is made where it can be
much longer than what it is made of, and `STEP` for each round of a loop and each call. Only what is counted decides, no
clock: so the fate of a row depends on nothing but the row and the template, in any thread and on any machine.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jinja2.nodes
import jinja2.sandbox
import jinja2.utils
from jinja2.compiler import CodeGenerator, Frame, optimizeconst

from jaxsft.rows.strict import DataError

STEP = 256
"""What a round of a loop costs, and a call: it takes about as long as making a text of so many characters."""
_BASE, _PER_MESSAGE, _PER_CHARACTER = 2**26, 2**20, 1024
PASSES = _PER_CHARACTER // 2
"""How often every character of a conversation may be passed on: half of what is allowed for each of them."""
ELEMENT = 32
"""What an element of a list costs, and a part of a text with a source of its own."""
_UNSIZED = frozenset([bool, int, float, type(None)])
_LARGEST_INTEGER = 2**20
"""Bits."""


class TemplateHogs(DataError):
    """A template does far more with a conversation than any template should."""


def allowance(num_messages: int, num_chars: int) -> int:
    """What a render of a conversation may cost.

    A quarter of a million steps for the smallest; what lets a template go through all characters four times, through
    all messages eight times for each of them, and add each to a text of all before.
    """
    size = _BASE + num_messages * _PER_MESSAGE + num_chars * _PER_CHARACTER
    return size + num_messages * (4 * num_chars + 8 * STEP * num_messages)


class _Generator(CodeGenerator):
    """Code that hands what it makes, and what it goes through, to its environment.

    The variables `environment` and `context` are those of the code that Jinja writes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counted: dict[int, Any] = {}
        """Sums whose length is counted with that of what they are a part of."""

    def _output_child_pre(self, node: Any, frame: Frame, finalize: Any) -> None:
        self._counted[id(node)] = node
        if frame.eval_ctx.volatile:
            self.write("(escape if context.eval_ctx.autoescape else str)(")
        elif frame.eval_ctx.autoescape:
            self.write("escape(")
        self.write("environment.text(")

    def _output_child_post(self, node: Any, frame: Frame, finalize: Any) -> None:
        self.write("))" if frame.eval_ctx.volatile or frame.eval_ctx.autoescape else ")")

    @optimizeconst
    def visit_Add(self, node: jinja2.nodes.BinExpr, frame: Frame) -> None:
        is_counted = self._counted.get(id(node)) is node
        self._counted |= {id(side): side for side in (node.left, node.right)}
        self.write("(" if is_counted else "environment.made(")
        self.visit(node.left, frame)
        self.write(" + ")
        self.visit(node.right, frame)
        self.write(")")

    @optimizeconst
    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Frame) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            self.write("environment.made(")
            super().visit_Concat(node, frame)
            self.write(")")
            return
        self.write("environment.concat(map(environment.text, (")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write(")))")

    @optimizeconst
    def visit_Getitem(self, node: jinja2.nodes.Getitem, frame: Frame) -> None:
        is_slice = isinstance(node.arg, jinja2.nodes.Slice)
        self.write("environment.made(" if is_slice else "")
        super().visit_Getitem(node, frame)
        self.write(")" if is_slice else "")

    def visit_Operand(self, node: jinja2.nodes.Operand, frame: Frame) -> None:
        if node.op not in ("in", "notin"):
            super().visit_Operand(node, frame)
            return
        self.write(" in environment.walked(" if node.op == "in" else " not in environment.walked(")
        self.visit(node.expr, frame)
        self.write(")")


class Metered(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment; `left` is to be set before a template is compiled or rendered, and `meter` to be called once.

    It is of one thread, since one number is all that it knows of the render.
    """

    code_generator_class = _Generator
    # Also so that no product of constants is made when a template is compiled.
    intercepted_binops = frozenset(["*", "**", "%"])
    text_class: Any = str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.left = _BASE
        """What the render may still cost."""

    def meter(self) -> None:
        """Counts what all filters make, and the tests and functions that go through much or make much."""
        self.filters = {
            name: filter if name in _SMALL else self._metered(name, filter) for name, filter in self.filters.items()
        } | {"_looped": _looped}
        is_in: Any = self.tests["in"]
        self.tests = self.tests | {"in": lambda value, seq: is_in(value, self.walked(seq))}
        self.globals["lipsum"] = self._lipsum

    def spend(self, cost: int) -> None:
        """Counts something.

        Raises:
            TemplateHogs: it is too much.
        """
        self.left -= cost
        if self.left < 0:
            raise self.hogs()

    def made(self, value: Any) -> Any:
        """The value, its length counted where it has one."""
        kind = type(value)
        if kind is str:
            self.left -= len(value)
        elif kind in _UNSIZED:
            return value
        elif kind is self.text_class:  # One that knows its sources.
            self.left -= len(value) + ELEMENT * len(value._runs)
        else:
            try:
                self.left -= ELEMENT * len(value)
            except TypeError:
                return value
        if self.left < 0:
            raise self.hogs()
        return value

    def text(self, value: Any) -> Any:
        """What `{{ value }}` prints."""
        if type(value) is self.text_class:
            self.left -= len(value)
            if self.left < 0:
                raise self.hogs()
            return value
        if isinstance(value, list | tuple | dict):
            self.walk(value)
        return self.made(value if isinstance(value, str) else self.spelling(value))

    def spelling(self, value: Any) -> str:
        """What is printed of anything that is no text."""
        return str(value)

    def walked(self, value: Any) -> Any:
        """The value, in which something is going to be looked for."""
        return value if type(value) is dict else self.made(value)

    def walk(self, value: Any, *, step: int = 0, depth: int = 1) -> None:
        """Counts the text of a list or dict with all that is in it, each line of it indented by `step` and more."""
        self.spend(16 + step * depth)
        if isinstance(value, dict):
            for key, item in value.items():
                self.walk(key, step=step, depth=depth + 1)
                self.walk(item, step=step, depth=depth + 1)
        elif isinstance(value, list | tuple):
            for item in value:
                self.walk(item, step=step, depth=depth + 1)
        elif isinstance(value, str):
            self.spend(len(value))

    def rounds(self, values: Any) -> Iterator[Any]:
        """The same of something that has no length."""
        for value in values:
            self.spend(STEP)
            yield value

    def join(self, parts: list[str]) -> str:
        """All parts one after the other."""
        return "".join(parts)

    def concat(self, parts: Any) -> str:
        parts = list(parts)
        if sum(map(len, parts)) > self.left:
            raise self.hogs()
        return self.made(self.join(parts))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.left -= STEP
        owner = getattr(__obj, "__self__", None)
        is_text = type(owner) in (str, __self.text_class)
        if not is_text:
            owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if is_text or isinstance(owner, str | bytes | int):
            cost = _METHODS.get(__obj.__name__)
            if cost is not None:
                args = tuple(_listed(each) for each in args)
                __self.spend(cost(__self, owner, *args, *kwargs.values()))
        if not is_text:
            return __self.made(super().call(__context, __obj, *args, **kwargs))
        # The methods of texts are all safe, and take no context: no need to look for that each time.
        kwargs.pop("_loop_vars", None)
        kwargs.pop("_block_vars", None)
        return __self.made(__obj(*args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            self.spend(_format_cost(self, left, right) if isinstance(left, str | bytes) else 0)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _LARGEST_INTEGER:
                self.spend(self.left + 1)
        elif operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(count, int) and isinstance(value, str | bytes | list | tuple):
                    self.spend(len(value) * max(count, 0) * (ELEMENT if isinstance(value, list | tuple) else 1))
        return super().call_binop(context, operator, left, right)

    def _parse(self, *args: Any) -> jinja2.nodes.Template:
        tree = super()._parse(*args)
        for loop in list(tree.find_all(jinja2.nodes.For)):
            loop.iter = jinja2.nodes.Filter(loop.iter, "_looped", [], [], None, None, lineno=loop.iter.lineno)
            loop.iter.set_environment(self)
        return tree

    def _metered(self, name: str, filter: Any) -> Any:
        at = int(getattr(filter, "jinja_pass_arg", None) is not None)
        cost = _FILTERS.get(name)

        @functools.wraps(filter)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            given = args[at:]
            if cost is not None and given:
                given = tuple(map(_listed, given))
                self.spend(STEP + cost(self, *given, *kwargs.values()))
                return self.made(filter(*args[:at], *given, **kwargs))
            self.left -= STEP
            if given and isinstance(given[0], str | list | tuple):
                self.spend(len(given[0]))
            return self.made(filter(*args, **kwargs))

        return wrapped

    def _lipsum(self, n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
        self.spend(n * max * STEP)
        return jinja2.utils.generate_lorem_ipsum(n, html, min, max)

    def hogs(self) -> TemplateHogs:
        """The error of a render that was stopped."""
        return TemplateHogs(
            "the template does far more with this conversation than its length allows (loops that hardly end, or texts "
            "of millions of characters), and was stopped"
        )


@jinja2.pass_context
def _looped(context: Any, value: Any) -> Any:
    """What a loop goes through, with a `STEP` for each round. With the context, so that it is no constant."""
    meter = context.environment
    try:
        meter.left -= STEP * len(value)
    except TypeError:
        return meter.rounds(value)
    if meter.left < 0:
        raise meter.hogs()
    return value


def _listed(value: Any) -> Any:
    """Something that can be gone through only once, as a list."""
    return list(value) if isinstance(value, Iterator) else value


def _width(meter: Metered, value: Any, *rest: Any) -> int:
    """Of what becomes as long as a number says."""
    return max([_size(value), *(each for each in rest if isinstance(each, int))])


def _product(meter: Metered, value: Any, *rest: Any) -> int:
    """Of what may write its other arguments once for each character, and of numbers so many."""
    return (_size(value) + 1) * (1 + sum(each if isinstance(each, int) else _size(each) for each in rest))


def _tabs(meter: Metered, value: Any, *rest: Any) -> int:
    size = next((each for each in rest if isinstance(each, int)), 8)
    return _size(value) + value.count(b"\t" if isinstance(value, bytes) else "\t") * max(size, 0)


def _replace_cost(meter: Metered, value: Any, *rest: Any) -> int:
    if len(rest) < 2 or not isinstance(rest[0], str | bytes):
        return _product(meter, value, *rest)
    try:
        return _size(value) + value.count(rest[0]) * (_size(rest[1]) + 4 * ELEMENT)
    except (TypeError, AttributeError):  # The call says what is wrong.
        return 0


def _join_cost(meter: Metered, between: Any, items: Any = (), *rest: Any) -> int:
    try:
        sizes = [_size(item) for item in items]
    except TypeError:
        return 0
    for item in items if not isinstance(items, str) else ():
        if isinstance(item, list | tuple | dict):
            meter.walk(item)
    return sum(sizes) + len(sizes) * _size(between)


def _format_cost(meter: Metered, text: Any, *rest: Any) -> int:
    """Of `%` and `format`: numbers in the text may be widths, and each field may show any value."""
    plain = text.decode("latin-1") if isinstance(text, bytes) else text
    before = meter.left
    meter.walk(list(rest))
    shown = before - meter.left
    numbers = [*map(_number, re.findall(r"\d+", plain)), *(each for each in _flat(rest) if isinstance(each, int))]
    return len(plain) + sum(max(each, 0) for each in numbers) + shown * (plain.count("%") + plain.count("{"))


def _number(digits: str) -> int:
    return int(digits) if len(digits) < 20 else 10**20


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        elif isinstance(value, dict):
            yield from _flat(value.values())
        else:
            yield value


def _translate_cost(meter: Metered, value: Any, table: Any = (), *rest: Any) -> int:
    longest = max([1, *map(_size, table.values())]) if isinstance(table, dict) else 1
    return _size(value) * longest


def _shown_cost(meter: Metered, value: Any, *rest: Any) -> int:
    """Of what shows all that is in a value."""
    numbers = [each for each in rest if isinstance(each, int)]
    texts = [len(each) for each in rest if isinstance(each, str)]
    meter.walk(value, step=max([0, *numbers, *texts]))
    return 0


def _indent_cost(meter: Metered, value: Any, width: Any = 4, *rest: Any) -> int:
    step = _size(width) if isinstance(width, str) else width
    lines = len(value.splitlines()) if isinstance(value, str) else 1
    return _size(value) + (lines + 1) * (step if isinstance(step, int) else 0)


def _round_cost(meter: Metered, value: Any, precision: Any = 0, *rest: Any) -> int:
    """It raises 10 to that power."""
    return meter.left + 1 if isinstance(precision, int) and abs(precision) > 1000 else 0


def _sum_cost(meter: Metered, value: Any, *rest: Any) -> int:
    """Lists are added one by one to all before."""
    sizes = [_size(item) for item in value if isinstance(item, list | tuple)] if isinstance(value, list | tuple) else []
    return _size(value) + sum(sizes) * len(sizes)


def _size(value: Any) -> int:
    try:
        return len(value)
    except TypeError:
        return 0


Cost = Callable[..., int]
"""Of a call: the environment, the value, and the other arguments in their order."""

_METHODS: dict[str, Cost] = {
    "center": _width, "ljust": _width, "rjust": _width, "zfill": _width, "to_bytes": _width,
    "expandtabs": _tabs, "replace": _replace_cost, "join": _join_cost, "translate": _translate_cost,
    "format": _format_cost, "format_map": _format_cost,
}  # fmt: skip
_FILTERS: dict[str, Cost] = {
    "center": _width, "batch": _width, "slice": _width, "truncate": _product, "wordwrap": _product,
    "urlize": _product, "indent": _indent_cost, "replace": _replace_cost, "round": _round_cost, "sum": _sum_cost,
    "join": lambda meter, value, between="", *rest: _join_cost(meter, between, value),
    "format": _format_cost, "tojson": _shown_cost, "string": _shown_cost, "pprint": _shown_cost,
    "xmlattr": _shown_cost, "urlencode": _shown_cost,
}  # fmt: skip
_SMALL = {"length", "count", "default", "d", "first", "attr", "abs", "float", "items", "safe"}
"""Filters that make nothing, and go through nothing."""
