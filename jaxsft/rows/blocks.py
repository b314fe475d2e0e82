"""Content that is a list of blocks (text, reasoning, calls, results) in the one order that a message can keep.

In: the blocks of one turn. Out: its text and reasoning, each with the flags of its parts, its calls, and the results
that become messages of their own.
"""

import json
from typing import Any, NamedTuple

from jaxsft.rows.calls import read_call
from jaxsft.rows.flags import read_flags
from jaxsft.rows.strict import BadRow, check_text, kind_of, short

Pieces = list[tuple[int, int, dict[str, Any]]]
"""Parts of a text: (first character, end, flags of that part alone)."""


class Parts(NamedTuple):
    """What the blocks of a turn say."""

    text: str
    pieces: Pieces
    reasoning: str
    reasoning_pieces: Pieces
    calls: list[dict[str, Any]]
    results: list[dict[str, Any]]
    """Messages of role tool."""
    unknown: dict[str, list[Any]]
    """Keys of blocks that are not read, and their values."""


_TEXT = ("text", "input_text", "output_text")
_REASONING = ("thinking", "reasoning", "reasoning_content")
_CALLS = ("tool_use", "tool_call", "function_call")
_RESULTS = ("tool_result", "tool_response", "function_response", "tool_use_result")
_MEDIA = ("image", "audio", "video", "file", "document")
_TEXT_KEYS = ("text", "value", "content", "thinking", "reasoning")
_KNOWN_KEYS = {"type", "signature", "cache_control", "annotations", "logprobs", *_TEXT, *_REASONING, *_TEXT_KEYS}


def read_parts(parts: list[Any], role: str, where: str, *, text_is: str = "text") -> Parts:
    """The blocks of a turn of a role.

    A message has its reasoning, text and calls in this order, and results come before a user's text: blocks in another
    order cannot be kept, and are refused.

    Args:
        parts: blocks, or plain texts.
        role: of the turn.
        where: for errors.
        text_is: what blocks of text are, "text" or "reasoning" (a reasoning that is given as blocks).
    """
    texts: dict[str, str] = {"text": "", "reasoning": ""}
    pieces: dict[str, Pieces] = {"text": [], "reasoning": []}
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    unknown: dict[str, list[Any]] = {}
    reached = 0
    for index, part in enumerate(parts):
        at = f"{where}[{index}]"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise BadRow("wrong-type", f"{at}: expected a block such as type text, got {kind_of(part)}")
        part = {key: value for key, value in part.items() if value is not None}
        kind = part.get("type", "text" if "text" in part else None)
        if not isinstance(kind, str):
            raise BadRow("unknown-block", f"{at}: expected a block with `type`, got {short(part)}")
        if any(word in kind for word in _MEDIA):
            raise BadRow("image-or-audio", f"{at}: a block of type {kind}; only text is supported, no images or audio")
        flags = read_flags(part, at)
        if kind in _TEXT or (kind in _REASONING and role == "assistant"):
            step = int(kind in _TEXT)
            said = "reasoning" if kind in _REASONING else text_is
            start, text = len(texts[said]), _text(part, kind, at)
            texts[said] += text
            pieces[said].append((start, start + len(text), flags))
            for key in part.keys() - _KNOWN_KEYS:
                unknown.setdefault(key, []).append(part[key])
        elif kind in _CALLS or (kind in _RESULTS and role in ("tool", "user")):
            if flags:
                reason = f"{at}: a block of type {kind} has flags of its own; only text and reasoning have parts"
                raise BadRow("train-detail", reason)
            step = 2 if kind in _CALLS else int(role == "tool")
            if kind in _CALLS:
                calls.append(read_call(_call(part), where))
            elif role == "tool":
                start, text = len(texts["text"]), _result_text(part, at)
                texts["text"] += text
                pieces["text"].append((start, start + len(text), {}))
            else:
                results.append(_result(part, at))
        else:
            known = ", ".join((*_TEXT[:1], *_REASONING[:2], *_CALLS[:2], *_RESULTS[:1]))
            raise BadRow("unknown-block", f"{at}: a block of type {kind!r} in a turn of {role} (known: {known})")
        if step < reached:
            reason = f"{at}: {kind} after later blocks; a turn is reasoning, text, calls in this order"
            raise BadRow("block-order", reason)
        reached = step
    return Parts(texts["text"], pieces["text"], texts["reasoning"], pieces["reasoning"], calls, results, unknown)


def is_part(part: Any) -> bool:
    """Whether an element of a tool's result is a block, and not just data."""
    return isinstance(part, dict) and part.get("type") in (*_TEXT, *_RESULTS, "image", "image_url")


def _text(part: dict[str, Any], kind: str, where: str) -> str:
    for key in (kind, *_TEXT_KEYS):
        if key in part:
            return check_text(part[key], f"{where}: {key}")
    raise BadRow("missing-content", f"{where}: a block of type {kind} without text")


def _call(part: dict[str, Any]) -> Any:
    """A call block is the call itself, or has it as `value`."""
    if "value" in part:
        return part["value"]
    return {key: value for key, value in part.items() if key != "type"}


def _result(part: dict[str, Any], where: str) -> dict[str, Any]:
    result = {"role": "tool", "content": _result_text(part, where)}
    call_id = part.get("tool_use_id", part.get("tool_call_id"))
    return {**result, "tool_call_id": call_id} if isinstance(call_id, str) else result


def _result_text(part: dict[str, Any], where: str) -> str:
    found = next((part[key] for key in ("content", "value", "text", "output", "response") if key in part), "")
    if isinstance(found, list) and found and all(map(is_part, found)):
        return read_parts(found, "tool", f"{where}: content").text
    return check_text(found, where) if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
