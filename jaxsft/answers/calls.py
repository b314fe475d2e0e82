"""Tool calls in what a model has said.

In: the text of an answer, and the tools that the model was offered. Out: the calls in it, in the spelling that chat
templates take, and what was said beside them. Families spell calls in many ways; known here are those of `FINDERS`.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxsft.rows.calls import read_call
from jaxsft.rows.strict import BadRow

Tools = Mapping[str, Mapping[str, Any]]
"""Name -> schemas of its parameters, by name."""

_OPENING = re.compile(r"(<[^<>\s]*>|\[[A-Z_]+\]|```\w*|\[|\b(to=)?functions\.|\bto=|\bfunction)\s*$")
"""What stands right before a call: `<tool_call>`, `[TOOL_CALLS]`, `<|python_tag|>`, a fence, the bracket of a list."""


class Said(NamedTuple):
    """An answer, taken apart."""

    content: str
    """What was said before the first call."""
    calls: list[dict[str, Any]]
    """`{"type": "function", "id": ..., "function": {"name": ..., "arguments": {...}}}`."""


class _Found(NamedTuple):
    begin: int
    end: int
    call: dict[str, Any]


def take_apart(text: str, tools: Sequence[dict[str, Any]], *, first_id: int = 1) -> Said:
    """The calls of an answer to tools that were offered; all else is text.

    'I look.<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>' -> "I look." and a call of f.

    Args:
        text: of the answer.
        tools: as `read_tools` gives them.
        first_id: the number of the first call in this conversation; its id has nine characters, as some templates want.
    """
    known = {tool["function"]["name"]: _schemas(tool["function"]) for tool in tools}
    found: list[_Found] = []
    for finder in FINDERS:
        if not found and known:
            found = list(finder(text, known))
    if not found:
        return Said(text.strip(), [])
    calls = [each.call | {"id": f"call{first_id + number:05d}"} for number, each in enumerate(found)]
    return Said(_without_opening(text[: found[0].begin]).strip(), calls)


def show_call(call: dict[str, Any]) -> str:
    """A call in a line: `look_up({"word": "fern"})`."""
    function = call["function"]
    return f"{function['name']}({json.dumps(function['arguments'], ensure_ascii=False)})"


def _objects(text: str, tools: Tools) -> Iterator[_Found]:
    """`{"name": "f", "arguments": {"a": 1}}`, or with `parameters`."""
    at = 0
    while (at := text.find("{", at)) >= 0:
        value, end = _json_at(text, at)
        try:
            call = read_call(value, "the answer")
        except BadRow:
            call = None
        if call is None or call["function"]["name"] not in tools:
            at += 1
            continue
        yield _Found(at, end, call)
        at = end


def _names_and_objects(text: str, tools: Tools) -> Iterator[_Found]:
    """`f[ARGS]{"a": 1}`, and other marks or a fence between the name and its arguments."""
    pattern = rf"\b({_any(tools)})(?:[^\w\s{{][^{{}}]{{0,80}}?)?(?:\s*```json)?\s*(?={{)"
    end = 0
    for match in re.finditer(pattern, text):
        value, after = _json_at(text, match.end())
        if match.start() >= end and isinstance(value, dict) and value.keys() <= tools[match[1]].keys():
            end = after
            yield _Found(match.start(), end, _call(match[1], value))


def _elements(text: str, tools: Tools) -> Iterator[_Found]:
    """`<function=f><parameter=a>1</parameter></function>`, and `<invoke name="f"><parameter name="a">`."""
    for match in re.finditer(rf'<(function|invoke)(?:=| name=)"?({_any(tools)})"?>(.*?)</\1>', text, re.DOTALL):
        inner = re.findall(r'<parameter(?:=| name=)"?([^">]+)"?[^>]*>\n?(.*?)\n?</parameter>', match[3], re.DOTALL)
        schemas = tools[match[2]]
        arguments = {name: _typed(value, schemas.get(name)) for name, value in inner}
        yield _Found(match.start(), match.end(), _call(match[2], arguments))


FINDERS: tuple[Callable[[str, Tools], Iterator[_Found]], ...] = (_objects, _names_and_objects, _elements)
"""Ways in which calls are spelt; the first that finds one reads the answer."""


def _schemas(function: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return properties if isinstance(properties, dict) else {}


def _any(tools: Tools) -> str:
    return "|".join(re.escape(name) for name in sorted(tools, key=len, reverse=True))


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _typed(value: str, schema: Any) -> Any:
    """A value that is spelt without quotes, text or JSON as its schema has it."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _json_at(text: str, at: int) -> tuple[Any, int]:
    """What stands there in JSON, and where it ends; None where nothing does."""
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, at


def _without_opening(text: str) -> str:
    while (shorter := _OPENING.sub("", text)) != text:
        text = shorter
    return text
