"""The turns of one row, however they are spelt, become messages as Hugging Face chat templates take them.

In: a list of turns (`role`/`content`, or ShareGPT's `from`/`value`), tools and template variables as they stand in a
row. Out: checked messages in one spelling, or a `BadRow` that says which turn is bad and why. Which column holds the
turns is left to `formats.py`; what a template makes of them to `chat.py`.

What becomes one spelling:
- roles: those of the config's map first; then, where turns are ShareGPT's, human, gpt, ... become user, assistant, ...
- calls: `tool_calls` of any usual shape, the older `function_call`, blocks (`tool_use`, `tool_call`) and ShareGPT turns
  of `function_call` become `{"type": "function", "function": {"name", "arguments"}}` with arguments as an object.
  Consecutive function_call turns are parallel calls of one turn, and text of the assistant directly before them is the
  text of that same turn, since nothing came between.
- results: turns of observation, function, tool_response, ... and `tool_result` blocks become turns of role tool; a
  result that is no text becomes the JSON text of it.
- reasoning: `thinking`, `reasoning` and blocks of these kinds become `reasoning_content`.
- `weight` and `train` become one float `weight`.
- no content beside calls or reasoning becomes empty content.

Two turns of one role in a row, several system turns, a system turn that is not the first, and empty system texts stay
as they are: templates decide what they make of them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsft.config import RESERVED_TEMPLATE_KWARGS
from jaxsft.data.calls import read_call
from jaxsft.data.strict import BadRow, inner_json, kind_of, short

Message = dict[str, Any]

ALIASES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_result": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "tool_output": "tool",
    "tool_call": "function_call",
    "tool_calls": "function_call",
    "function_calls": "function_call",
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function_call")},
}
"""Names of roles in ShareGPT's turns; `function_call` is the assistant's, with calls for a text. Others stay."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a turn's reasoning; the first is ours."""

MAX_WEIGHT = 1e6
"""Largest weight of a turn or a row: many times more than can be meant, and still far from what float32 sums lose."""

_ROLE = re.compile(r"[^\W\d_][\w.-]{0,63}")
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("thinking", "reasoning", "reasoning_content")
_CALL_PARTS = ("tool_use", "tool_call", "function_call")
_RESULT_PARTS = ("tool_result", "tool_response", "function_response", "tool_use_result")
_MEDIA = ("image", "audio", "video", "file", "document")


def read_messages(
    turns: Sequence[Any], roles: Mapping[str, str], *, aliases: bool = False, after: Sequence[Message] = ()
) -> list[Message]:
    """The turns of a row as messages; with `aliases`, roles are ShareGPT's whichever way the turns are spelt. `after`
    is what comes before them, already read.

        read_messages([{"from": "human", "value": "Hi"}], {}) == [{"role": "user", "content": "Hi"}]

    Raises:
        BadRow: the first turn that is bad.
    """
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        read, is_call = _read_turn(turn, f"message {number}", roles, aliases)
        for message in read:
            before: Message = (messages or after or [{}])[-1]
            same_turn = before.get("role") == "assistant" and _flags(before) == _flags(message)
            if is_call and same_turn and messages and REASONING[0] not in message:
                messages[-1] = {**before, "tool_calls": before.get("tool_calls", []) + message["tool_calls"]}
                continue
            if message["role"] == "tool" and before.get("role") not in ("assistant", "tool"):
                reason = f"message {number} (tool): a tool's result must follow the assistant's call"
                raise BadRow("result-without-call", reason)
            messages.append(message)
    return messages


def read_template_kwargs(kwargs: Any) -> dict[str, Any]:
    """Further variables of the chat template, given as an object or its JSON text."""
    where = "chat_template_kwargs: "
    if isinstance(kwargs, str):
        kwargs = inner_json(kwargs, "bad-template-kwargs", where)
    if not isinstance(kwargs, dict):
        reason = f"{where}expected an object of template variables, got {kind_of(kwargs)}"
        raise BadRow("bad-template-kwargs", reason)
    if reserved := sorted(RESERVED_TEMPLATE_KWARGS & kwargs.keys()):
        reason = f"{where}{', '.join(reserved)} cannot be set here: it is no variable of the template"
        raise BadRow("reserved-template-kwargs", reason)
    return kwargs


def read_weight(value: Any, where: str) -> float:
    """A weight: a number from 0 that float32 can hold and sum."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow("bad-weight", f"{where}weight must be a number, got {short(value)}")
    if not 0 <= value <= MAX_WEIGHT:
        raise BadRow("bad-weight", f"{where}weight must be from 0 to {MAX_WEIGHT:g}, got {short(value)}")
    return float(value)


def read_flag(value: Any, where: str) -> bool:
    """true or false, also as 1 or 0."""
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise BadRow("bad-flag", f"{where} must be true or false, got {short(value)}")
    return bool(value)


def check_role(role: Any, where: str) -> str:
    """A role is one plain word: a template writes it between its marks, where anything else could forge a turn."""
    if not isinstance(role, str):
        raise BadRow("wrong-type", f"{where}: role must be text, got {short(role)}")
    if not _ROLE.fullmatch(role):
        reason = f"{where}: {short(role)} is no role: expected one word of letters, digits, . _ -"
        raise BadRow("forged-role" if role.strip() else "missing-role", reason)
    return role


def check_text(text: Any, where: str) -> str:
    """Text as it is, unless it holds what no text has."""
    if not isinstance(text, str):
        raise BadRow("wrong-type", f"{where} must be text, got {short(text)}")
    if "\0" in text:
        raise BadRow("nul-character", f"{where} holds a NUL character (\\u0000) at offset {text.index(chr(0))}")
    return text


def _read_turn(turn: Any, where: str, roles: Mapping[str, str], aliases: bool) -> tuple[list[Message], bool]:
    """The messages of one turn (blocks of tool results are messages of their own), and whether it is a bare call."""
    if not isinstance(turn, dict):
        raise BadRow("wrong-type", f"{where}: expected an object with role and content, got {kind_of(turn)}")
    # A null says that the key is not there, in columnar files and for transformers alike.
    message = {key: value for key, value in turn.items() if value is not None}
    sharegpt = ("role" not in message and "from" in message) or ("content" not in message and "value" in message)
    role = _role(message.pop("role", None), message.pop("from", None), where, roles, aliases or sharegpt)
    message = {"role": role, **message}
    if sharegpt and "value" in message:
        message["content"] = message.pop("value")
    where = f"{where} ({role})"
    for key in ("train_detail", "training_detail"):
        if message.get(key):
            reason = f"{where}: {key} (training parts of a turn) is not supported; use `weight` or `train` of a turn"
            raise BadRow("train-detail", reason)
    _read_flags(message, where)
    calls = _read_calls(message, where)
    reasoning = [message.pop(name) for name in REASONING if name in message]
    if role == "function_call":
        _add_reasoning(message, reasoning, where)
        message["role"] = "assistant"
        spelt = message.pop("content", None)
        if isinstance(spelt, str):
            spelt = inner_json(spelt, "bad-tool-call", f"{where}: ")
        each = spelt if isinstance(spelt, list) else [spelt]
        message |= {"content": "", "tool_calls": calls + [read_call(call, where) for call in each]}
        if not message["tool_calls"]:
            raise BadRow("bad-tool-call", f"{where}: no call in this turn")
        return [message], True
    content = message.pop("content", None)
    results: list[Message] = []
    if isinstance(content, list) and (role != "tool" or content and all(map(_is_part, content))):
        text, thoughts, block_calls, results = _read_parts(content, role, where)
        calls, reasoning = calls + block_calls, reasoning + thoughts
        content = text if text or not (calls or results) else None
    elif role == "tool" and not isinstance(content, str) and content is not None:
        content = json.dumps(content, ensure_ascii=False)
    if content is not None:
        message["content"] = check_text(content, f"{where}: content")
    _add_reasoning(message, reasoning, where)
    if calls:
        if role != "assistant":
            raise BadRow("calls-outside-assistant", f"{where}: tool calls in a turn that is not the assistant's")
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if not isinstance(message.get(key, ""), str):
            raise BadRow("wrong-type", f"{where}: {key} must be text, got {short(message[key])}")
    if results:
        weight = _flags(message)
        results = [{**result, **weight} for result in results]
        if content is None:
            return results, False
    _check_not_empty(message, where)
    return [*results, message], False


def _role(role: Any, other: Any, where: str, roles: Mapping[str, str], aliases: bool) -> str:
    role = other if role is None else role
    if role is None:
        raise BadRow("missing-role", f"{where}: no role; expected `role` (or `from`)")
    if isinstance(role, str):
        role = roles.get(role, role)
        if aliases:
            role = ALIASES.get(role.lower(), role)
        elif role == "function":  # The older name of tool; what it answers becomes a tool call too.
            role = "tool"
    return check_role(role, where)


def _read_flags(message: Message, where: str) -> None:
    """`weight` becomes a float, 0 where `train` is false; where that is true, the turn is trained whatever its role."""
    if "weight" in message or "train" in message:
        message["weight"] = read_weight(message.get("weight", 1.0), f"{where}: ")
    if "train" in message and not read_flag(message["train"], f"{where}: train"):
        message["weight"] = 0.0
        del message["train"]
    elif "train" in message:
        message["train"] = True


def _flags(message: Message) -> dict[str, Any]:
    return {key: message[key] for key in ("weight", "train") if key in message}


def _read_calls(message: Message, where: str) -> list[dict[str, Any]]:
    calls = message.pop("tool_calls", [])
    if isinstance(calls, str):
        calls = inner_json(calls, "bad-tool-call", f"{where}: tool_calls: ") if calls.strip() else []
    if not isinstance(calls, list):
        raise BadRow("bad-tool-call", f"{where}: tool_calls must be a list of objects, got {kind_of(calls)}")
    if older := message.pop("function_call", None):
        calls = [*calls, older]
    return [read_call(call, where) for call in calls]


def _read_parts(parts: list[Any], role: str, where: str) -> tuple[str, list[str], list[dict[str, Any]], list[Message]]:
    """Text, reasoning, calls and results of a content that is a list of blocks.

    A message has its reasoning, text and calls in this order, and results come before a user's text: blocks in another
    order cannot be kept, and are refused.
    """
    text, thoughts, calls, results = "", "", [], []
    reached = 0
    for index, part in enumerate(parts):
        at = f"{where}: content[{index}]"
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
        if kind in _TEXT_PARTS:
            step, text = 1, text + _part_text(part, kind, at)
        elif kind in _REASONING_PARTS and role == "assistant":
            step, thoughts = 0, thoughts + _part_text(part, kind, at)
        elif kind in _CALL_PARTS:
            step = 2
            calls.append(read_call(_part_call(part), where))
        elif kind in _RESULT_PARTS and role == "tool":
            step, text = 1, text + _result_text(part, at)
        elif kind in _RESULT_PARTS and role == "user":
            step = 0
            result = {"role": "tool", "content": _result_text(part, at)}
            call_id = part.get("tool_use_id", part.get("tool_call_id"))
            results.append({**result, "tool_call_id": call_id} if isinstance(call_id, str) else result)
        else:
            known = ", ".join((*_TEXT_PARTS[:1], *_REASONING_PARTS[:2], *_CALL_PARTS[:2], *_RESULT_PARTS[:1]))
            raise BadRow("unknown-block", f"{at}: a block of type {kind!r} in a turn of {role} (known: {known})")
        if step < reached:
            raise BadRow(
                "block-order", f"{at}: {kind} after later blocks; a turn is reasoning, text, calls in this order"
            )
        reached = step
    return text, [thoughts] * bool(thoughts), calls, results


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in (*_TEXT_PARTS, *_RESULT_PARTS, "image", "image_url")


def _part_text(part: dict[str, Any], kind: str, where: str) -> str:
    for key in (kind, "text", "value", "content", "thinking", "reasoning"):
        if key in part:
            return check_text(part[key], f"{where}: {key}")
    raise BadRow("missing-content", f"{where}: a block of type {kind} without text")


def _part_call(part: dict[str, Any]) -> Any:
    """A call block is the call itself, or has it as `value`."""
    if "value" in part:
        return part["value"]
    return {key: value for key, value in part.items() if key != "type"}


def _result_text(part: dict[str, Any], where: str) -> str:
    found = next((part[key] for key in ("content", "value", "text", "output", "response") if key in part), "")
    if isinstance(found, list) and found and all(map(_is_part, found)):
        return _read_parts(found, "tool", where)[0]
    return check_text(found, where) if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


def _add_reasoning(message: Message, found: list[Any], where: str) -> None:
    texts = [check_text(text, f"{where}: {REASONING[0]}") for text in found]
    given = {text for text in texts if text.strip()}
    if len(given) > 1:
        raise BadRow("two-reasonings", f"{where}: reasoning is given twice, in different words")
    if given:
        message[REASONING[0]] = given.pop()


def _check_not_empty(message: Message, where: str) -> None:
    content, role = message.get("content"), message["role"]
    says_more = bool(message.get("tool_calls")) or REASONING[0] in message
    if content is None and not says_more:
        raise BadRow("missing-content", f"{where}: no content")
    if content is None:
        # Empty text, since templates that take no content at all beside calls take this too, but not the reverse.
        content = message["content"] = ""
    may_be_blank = says_more or role in ("system", "developer", "tool") or message.get("weight") == 0
    if not may_be_blank and not content.strip():
        raise BadRow("blank-content", f"{where}: content is blank")
