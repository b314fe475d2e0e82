"""Tool calls in what a model has said.

In: the text of an answer, and the tools that the model was offered. Out: the calls in it, in the spelling that chat
templates take, and what was said beside them. Calls are found where they are JSON objects with a name and arguments, as
most families write them, whatever stands around them.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxsft.rows.calls import read_call
from jaxsft.rows.strict import BadRow

_OPENING = re.compile(r"(<\|?[^<>\s]*>|\[[A-Z_]+\]|```\w*|\[)\s*$")
"""What stands right before a call: `<tool_call>`, `[TOOL_CALLS]`, `<|python_tag|>`, a fence, the bracket of a list."""


class Said(NamedTuple):
    """An answer, taken apart."""

    content: str
    """What was said before the first call."""
    calls: list[dict[str, Any]]
    """`{"type": "function", "id": ..., "function": {"name": ..., "arguments": {...}}}`."""


def take_apart(text: str, tools: Sequence[dict[str, Any]], *, first_id: int = 1) -> Said:
    """The calls of an answer to tools that were offered; other JSON is text.

    'I look.<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>' -> "I look." and a call of f.

    Args:
        text: of the answer.
        tools: as `read_tools` gives them.
        first_id: the number of the first call in this conversation; its id has nine characters, as some templates want.
    """
    names = {tool["function"]["name"] for tool in tools}
    calls: list[dict[str, Any]] = []
    content, at = text, 0
    decoder = json.JSONDecoder()
    while (at := text.find("{", at)) >= 0:
        try:
            found, end = decoder.raw_decode(text, at)
            call = read_call(found, "the answer")
        except (ValueError, RecursionError, BadRow):
            at += 1
            continue
        if call["function"]["name"] not in names:
            at += 1
            continue
        if not calls:
            content = _without_opening(text[:at])
        calls.append(call | {"id": f"call{first_id + len(calls):05d}"})
        at = end
    return Said(content.strip(), calls)


def show_call(call: dict[str, Any]) -> str:
    """A call in a line: `look_up({"word": "fern"})`."""
    function = call["function"]
    return f"{function['name']}({json.dumps(function['arguments'], ensure_ascii=False)})"


def _without_opening(text: str) -> str:
    while (shorter := _OPENING.sub("", text)) != text:
        text = shorter
    return text
