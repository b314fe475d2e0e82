"""A chat template as a function: messages in, the text that transformers would render of them out, with provenance.

The environment is that of transformers' `apply_chat_template`, rebuilt so that every character of the text names the
message and field it was taken from (`provenance.py`), and so that "today" is a day that the run records. That both give
the same text is not assumed: `encoder.py` compares them. A template is someone else's program: `probe.py` runs it
first.
"""

import datetime
import functools
import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
from markupsafe import soft_str

from jaxsft.chat.metered import Metered, TemplateHogs, allowance
from jaxsft.chat.provenance import (
    Traced,
    TracedMarkup,
    dump_json,
    dump_python,
    holds_traced,
    join,
    trace,
    trace_plain,
    trace_values,
    unknown,
)

Message = dict[str, Any]

GENERATED = 1 << 40
"""Added to the source of characters that stand inside `{% generation %}`."""

REASONING = "reasoning_content"


class TemplateError(ValueError):
    """What a template has against a conversation, in one line."""


class Source(NamedTuple):
    """A string of the data: source number `i + 1` of a rendered text is `sources[i]`."""

    message: int
    """Index of the message; TOOLS or KWARGS where it is of none."""
    field: str
    """Key of the message (of the call, for tool calls)."""
    text: str
    call: int = -1
    """Index of the tool call that it is of."""


TOOLS, KWARGS = -1, -2


class Traceable(NamedTuple):
    """A conversation whose strings are numbered, to be rendered any number of times."""

    messages: list[Message]
    tools: list[Any] | None
    template_kwargs: dict[str, Any]
    sources: list[Source]
    plain: tuple[list[Message], list[Any] | None, dict[str, Any]]
    """Messages, tools and variables without provenance."""
    allowance: int
    """What a render of it may cost."""


def number_sources(
    messages: Sequence[Message], tools: list[Any] | None, template_kwargs: Mapping[str, Any]
) -> Traceable:
    """Numbers every string of a conversation, as transformers would hand it to a template.

    Reasoning goes under two names there, `reasoning_content` and `thinking`: one source.
    """
    sources: list[Source] = []

    def numbered(message: int, field: str, call: int = -1) -> Any:
        def make(text: str) -> Traced:
            sources.append(Source(message, field, text, call))
            return trace(text, len(sources))

        return make

    traced, plain = [], []
    for index, message in enumerate(messages):
        given = {key: value for key, value in message.items() if value is not None}
        plain.append({"thinking": given[REASONING], **given} if REASONING in given else given)
        copy: dict[str, Any] = {}
        for key, value in given.items():
            if type(value) is str:
                sources.append(Source(index, key, value))
                copy[key] = trace(value, len(sources))
            elif key == "tool_calls":
                copy[key] = [_traced_call(call, index, at, numbered) for at, call in enumerate(value)]
            elif key == "content" and isinstance(value, list):
                copy[key] = [_traced_block(block, numbered(index, key)) for block in value]
            else:
                copy[key] = trace_values(value, numbered(index, key))
        if REASONING in copy:
            copy = {"thinking": copy[REASONING], **copy}
        traced.append(copy)
    return Traceable(
        traced,
        None if tools is None else [trace_values(tool, numbered(TOOLS, "tools")) for tool in tools],
        {key: trace_values(value, numbered(KWARGS, key)) for key, value in template_kwargs.items()},
        sources,
        (plain, tools, dict(template_kwargs)),
        allowance(len(messages), sum([len(source.text) for source in sources])),
    )


def _traced_block(block: dict[str, Any], make: Any) -> dict[str, Any]:
    return {key: make(value) if key == "text" else value for key, value in block.items()}


def _traced_call(call: Any, index: int, at: int, numbered: Any) -> Any:
    """A tool call: name and arguments are what the model says; id and type are bookkeeping that few templates show."""
    if not isinstance(call, dict):
        return call
    return {
        key: _traced_call(value, index, at, numbered)
        if key == "function"
        else trace_values(
            value, numbered(index, "tool call" if key in ("name", "arguments") else f"tool call {key}", at)
        )
        for key, value in call.items()
    }


class ChatTemplate:
    """A compiled template with the variables that a tokenizer gives to it."""

    def __init__(
        self, source: str | Mapping[str, str], variables: Mapping[str, Any], *, today: datetime.date | None = None
    ) -> None:
        """
        Args:
            source: the template, or several by name, of which "tool_use" is taken where there are tools.
            variables: the special tokens by name (`bos_token`, ...).
            today: what `strftime_now` tells; left out: the clock.
        """
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        self._variables, self._today = dict(variables), today

    @property
    def asks_for_date(self) -> bool:
        """Whether the text may depend on the day."""
        return any("strftime_now" in source for source in self._sources.values())

    def render(self, conversation: Traceable, num_messages: int, *, prompt: bool = False) -> Traced:
        """The text of the first messages, as a prompt for the next answer or not.

        Raises:
            TemplateError: the template refuses them.
            TemplateHogs: it would take far more time or memory than a conversation of this size should.
        """
        given = conversation.messages, conversation.tools, conversation.template_kwargs, conversation.allowance
        try:
            return trace_plain(self._render(TracingEnvironment, *given, num_messages, prompt))
        except TemplateError:
            # In the words of a template that sees plain strings.
            self.render_plain(conversation, num_messages, prompt=prompt)
            raise

    def render_plain(self, conversation: Traceable, num_messages: int, *, prompt: bool = False) -> str:
        """The same text without provenance, in less time."""
        return self._render(_Plain, *conversation.plain, conversation.allowance, num_messages, prompt)

    def render_with(self, kind: type[Metered], messages: list[Message], *, allowance: int, prompt: bool = False) -> str:
        """The text of messages alone, by another kind of environment."""
        return self._render(kind, messages, None, {}, allowance, len(messages), prompt)

    def _render(
        self,
        kind: type[Metered],
        messages: list[Message],
        tools: Any,
        kwargs: dict[str, Any],
        allowance: int,
        num_messages: int,
        prompt: bool,
    ) -> str:
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        try:
            template = _compiled(self._sources[name], self._today, kind, threading.get_ident())  # type: ignore[arg-type]
            template.environment.begin(messages, allowance)  # type: ignore[attr-defined]
            return template.render(
                **self._variables
                | {"messages": messages[:num_messages], "tools": tools}
                | {"documents": None, "add_generation_prompt": prompt}
                | kwargs
            )
        except TemplateHogs:
            raise
        except Exception as error:  # A template may raise anything.
            reason = f"{type(error).__name__}: {error}" if not isinstance(error, jinja2.TemplateError) else str(error)
            raise TemplateError(" ".join(_OUR_CLASSES.sub(_their_name, reason).split())[:300]) from error


_OUR_CLASSES = re.compile(r"\bjaxsft(?:\.\w+)+\.(\w+)|'(Traced(?:Markup)?|_Namespace|_Dict)'")


def _their_name(found: re.Match[str]) -> str:
    """What a template's author knows a class of ours as."""
    name = found[1] or found[2]
    known = {"_Namespace": "namespace", "_Dict": "dict"}.get(name, "str")
    return known if found[1] else f"'{known}'"


@functools.lru_cache(maxsize=128)
def _compiled(source: str, today: datetime.date | None, kind: type[Metered], thread: int) -> jinja2.Template:
    """For one thread, since its environment counts what the render costs."""
    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=EXTENSIONS)

    def strftime_now(format: str) -> str:
        now = datetime.datetime.now() if today is None else datetime.datetime.combine(today, datetime.time())
        return now.strftime(format)

    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    environment.meter()
    template = environment.from_string(source)
    template.globals = dict(template.globals)  # Read in every render, which a chain of maps makes slow.
    return template


class _Plain(Metered):
    """transformers' environment."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filters["tojson"] = _plain_json
        self._judged: dict[tuple[type, str], bool] = {}
        self._messages: list[Message] | None = None
        self._dumped: dict[tuple[Any, ...], tuple[Any, str, int]] = {}
        """What `tojson` made in renders of these messages, and what that cost."""

    def begin(self, messages: list[Message], allowance: int) -> None:
        """To be called before each render: what is rendered, and what that may cost."""
        self.left = allowance
        if messages is not self._messages:
            self._messages = messages
            self._dumped.clear()

    def meter(self) -> None:
        super().meter()
        self.filters["tojson"] = self._remembering(self.filters["tojson"])

    def _remembering(self, tojson: Any) -> Any:
        """The filter, which does once what each render of the same messages asks of it; tools are large.

        No template can change what it is given.
        """

        @functools.wraps(tojson)
        def wrapped(value: Any, *args: Any, **kwargs: Any) -> Any:
            options = *args, *kwargs.values()
            if not isinstance(value, dict | list) or any([type(each) not in _CONSTANTS for each in options]):
                return tojson(value, *args, **kwargs)
            key = id(value), len(args), *kwargs, *((type(each), each) for each in options)
            known = self._dumped.get(key)
            if known is not None:
                self.spend(known[2])
                return known[1]
            before = self.left
            dumped = tojson(value, *args, **kwargs)
            if len(self._dumped) < _MOST_DUMPED:
                self._dumped[key] = value, dumped, before - self.left
            return dumped

        return wrapped

    def getattr(self, obj: Any, attribute: str) -> Any:
        # What templates do most, `message.role`, without asking for an attribute that no dict has.
        if type(obj) is dict and attribute not in _OF_DICTS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        # What was found to be safe before, of objects of this class; but `format` is replaced by Jinja's own.
        if self._judged.get((type(obj), attribute)) and attribute not in _FORMATS:
            try:
                return getattr(obj, attribute)
            except AttributeError:
                pass
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # Depends on nothing but the class of the object; Jinja's own answer takes a dozen looks at it.
        judged = self._judged.get((type(obj), attr))
        if judged is None:
            judged = super().is_safe_attribute(obj, attr, value)
            if len(self._judged) < _MOST_JUDGED:
                self._judged[type(obj), attr] = judged
        return judged


_MOST_DUMPED = 128
"""Texts that are kept; a template may make ever new objects."""
_CONSTANTS = frozenset([bool, int, type(None)])
_OF_DICTS = frozenset(dir(dict))
_FORMATS = frozenset(["format", "format_map"])
_MOST_JUDGED = 1000
"""Names may come from the rows, so that they have no end."""


class TracingEnvironment(_Plain):
    """The same, but strings keep their provenance on the way through."""

    join = staticmethod(join)
    text_class = Traced

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filters = {name: _followed(filter) for name, filter in (self.filters | _FILTERS).items()}

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Methods of a literal, as in `", ".join(names)`, know nothing of provenance.
        owner = getattr(__obj, "__self__", None)
        if type(owner) is str and __obj.__name__ in ("join", "replace"):
            __obj = getattr(trace_plain(owner), __obj.__name__)
        result = super().call(__context, __obj, *args, **kwargs)
        is_lost = type(result) is str and holds_traced([owner, *args, *kwargs.values()])
        return unknown(result) if is_lost else result

    def spelling(self, value: Any) -> str:
        # `str` of lists and dicts would lose the provenance.
        return dump_python(value) if holds_traced(value) else str(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        result = super().call_binop(context, operator, left, right)
        return unknown(result) if type(result) is str and holds_traced([left, right]) else result


def _followed(filter: Any) -> Any:
    """A filter that says so where it loses track of the data."""

    @functools.wraps(filter)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = filter(*args, **kwargs)
        return unknown(result) if type(result) is str and holds_traced([*args, *kwargs.values()]) else result

    return wrapped


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: what the template's author says the model writes."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text = caller()
        return text.marked(GENERATED) if isinstance(text, Traced) else text


EXTENSIONS: list[Any] = [_Generation, jinja2.ext.loopcontrols]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Dict:
    """`dict`, and none of its class's inner life."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` without names that reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def is_constructor(value: Any) -> bool:
    """Whether a function of templates keeps what it is given, and does nothing else with it."""
    return value is _Namespace or isinstance(value, _Dict)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return dump_json(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _plain_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@jinja2.pass_environment
def _join(environment: Any, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
    return trace_plain(str(d)).join(map(str, value))


def _safe(value: Any) -> str:
    return TracedMarkup.of(trace_plain(str(value)))


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """As Jinja does it: each line after the first is indented, blank ones only if asked for."""
    step = width if isinstance(width, str) else " " * width
    text = trace_plain(str(s)) + "\n"
    if blank:
        return (step if first else "") + trace_plain("\n" + step).join(text.splitlines())
    lines = text.splitlines()
    shown = join([lines.pop(0)] + [part for line in lines for part in ("\n", step if line else "", line)])
    return step + shown if first else shown


def _string(value: Any) -> str:
    return dump_python(value) if isinstance(value, dict | list) and holds_traced(value) else soft_str(value)


_FILTERS = {"tojson": _tojson, "string": _string, "join": _join, "safe": _safe, "indent": _indent}
