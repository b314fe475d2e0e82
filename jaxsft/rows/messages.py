"""The turns of one row, however they are spelt, become messages as Hugging Face chat templates take them.

In: a list of turns (`role`/`content`, or ShareGPT's `from`/`value`), tools and template variables as they stand in a
row. Out: checked messages in one spelling, or a `BadRow` that says which turn is bad and why. Which column holds the
turns is left to `readings.py`; what a template makes of them to `chat/`.

What becomes one spelling:
- keys: those of the config's map first.
- roles: those of the config's map first, then the names of `roles.py`.
- calls: `tool_calls` of any usual shape, the older `function_call`, blocks (`tool_use`, `tool_call`) and turns of role
  function_call become `{"type": "function", "function": {"name", "arguments"}}` with arguments as an object.
  Consecutive function_call turns are parallel calls of one turn, and text of the assistant directly before them is the
  text of that same turn, since nothing came between.
- results: turns of observation, function, tool_response, ... and `tool_result` blocks become turns of role tool; a
  result that is no text becomes the JSON text of it, and none at all is empty.
- reasoning: `thinking`, `reasoning` and blocks of these kinds become `reasoning_content`.
- what says how a turn is trained (`flags.py`) becomes `weight` and `train`, and of its parts `content_weights` and
  `reasoning_weights`.
- no content beside calls or reasoning becomes empty content.

Two turns of one role in a row, several system turns, a system turn that is not the first, and empty system texts stay
as they are: templates decide what they make of them. Other keys stay too, and are counted.
"""

import collections
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jaxsft.config import RESERVED_TEMPLATE_KWARGS
from jaxsft.rows.blocks import Pieces, is_part, read_parts
from jaxsft.rows.calls import read_call
from jaxsft.rows.flags import (
    CONTENT_WEIGHTS,
    DETAILS,
    OURS,
    REASONING_WEIGHTS,
    SENSES,
    is_untrained,
    read_details,
    read_flags,
    refuse_flags,
    weigh_parts,
)
from jaxsft.rows.roles import CALLER, read_role
from jaxsft.rows.strict import BadRow, ListAsWritten, ObjectAsWritten, check_text, inner_json, kind_of, short

Message = dict[str, Any]

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a turn's reasoning; the first is ours."""

READ_KEYS = (
    "role", "content", "from", "value", "name", "tool_calls", "tool_call_id", "function_call", *REASONING, *SENSES,
    *DETAILS,
)  # fmt: skip
"""Keys of a turn that are read."""

_KNOWN = {"role", "content", "name", "tool_calls", "tool_call_id", REASONING[0], *OURS}
"""Keys that a message has once it is read."""


class Spelling(NamedTuple):
    """How the rows of a source spell what they say, beyond what is known anyway."""

    roles: Mapping[str, str] = {}
    """Theirs -> ours."""
    keys: Mapping[str, str] = {}
    """Keys of a turn, theirs -> ours."""
    ignored: Collection[str] = ()
    """Keys of a turn that say nothing."""
    template_keys: Collection[str] = ()
    """Further keys of a message that the chat template reads."""
    input_heading: str = ""
    """What stands before the `input` of Alpaca's rows."""


AS_USUAL = Spelling()
"""Nothing beyond what everybody does."""


def read_messages(
    turns: Sequence[Any], spelling: Spelling, *, after: Sequence[Message] = (), where: str = "message"
) -> list[Message]:
    """The turns of a row as messages; `after` is what comes before them, already read.

        read_messages([{"from": "human", "value": "Hi"}], Spelling()) == [{"role": "user", "content": "Hi"}]

    Raises:
        BadRow: the first turn that is bad, or a key that could say which turns are trained.
    """
    messages: list[Message] = []
    unknown: dict[str, list[Any]] = {}
    for number, turn in enumerate(turns, start=1):
        if (plain := _plain(turn, spelling)) is not None:
            messages.append(plain)
            continue
        read, is_call = _read_turn(turn, f"{where} {number}", spelling, unknown)
        for message in read:
            before: Message = (messages or after or [{}])[-1]
            if is_call and messages and _is_same_turn(before, message):
                messages[-1] = {**before, "tool_calls": before.get("tool_calls", []) + message["tool_calls"]}
                continue
            if message["role"] == "tool" and before.get("role") not in ("assistant", "tool"):
                reason = f"{where} {number} (tool): a tool's result must follow the assistant's call"
                raise BadRow("result-without-call", reason)
            messages.append(message)
    if unknown:
        refuse_flags(unknown, f"{where}s", {*spelling.ignored, *spelling.template_keys})
    return messages


def unread_keys(messages: Sequence[Message], spelling: Spelling) -> dict[str, int]:
    """Keys of messages that are not read, and how many messages have them."""
    if all(message.keys() <= _KNOWN for message in messages):
        return {}
    found = collections.Counter(key for message in messages for key in message.keys() - _KNOWN)
    return {key: count for key, count in found.items() if key not in spelling.template_keys}


def _is_same_turn(before: Message, call: Message) -> bool:
    """Whether a call without text belongs to the message before it. A call with reasoning is a turn of its own."""
    if before.get("role") != "assistant" or REASONING[0] in call:
        return False
    # Of parallel calls, the first may say for all of them whether they are trained.
    is_call = bool(before.get("tool_calls")) and not before["content"]
    return _flags(before) == _flags(call) or (is_call and not _flags(call))


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


def _plain(turn: Any, spelling: Spelling) -> Message | None:
    """Most turns are a role and a text and nothing else, and are as they stand; None where one needs reading."""
    if type(turn) is not dict or len(turn) != 2 or spelling.keys or spelling.ignored:
        return None
    role, content = turn.get("role"), turn.get("content")
    if role not in _SPEAKERS or spelling.roles.get(role, role) != role:
        return None
    if type(content) is not str or "\0" in content or not content or content.isspace():
        return None
    return {"role": role, "content": content}


_SPEAKERS = ("user", "assistant", "system")


def _read_turn(turn: Any, where: str, spelling: Spelling, unknown: dict[str, list[Any]]) -> tuple[list[Message], bool]:
    """The messages of one turn (blocks of tool results are messages of their own), and whether it is a bare call.

    Keys that are not known are added to `unknown`, with their values.
    """
    message = _with_role(turn, where, spelling)
    role = message["role"]
    where = f"{where} ({role})"
    if len(message) == 2 and type(message.get("content")) is str and role != CALLER:
        check_text(message["content"], f"{where}: content")
        _check_not_empty(message, where)
        return [message], False
    flags = read_flags(message, where)
    details = [message.pop(name) for name in DETAILS if name in message]
    calls = _read_calls(message, where)
    reasoning = [message.pop(name) for name in REASONING if name in message]
    content = message.pop("content", None)
    for key in () if message.keys() <= _KNOWN else message.keys() - _KNOWN:
        unknown.setdefault(key, []).append(message[key])
    if role == CALLER:
        if content is not None or not calls:
            calls += _spelt_calls(content, where)
        message |= {"role": "assistant", "content": "", "tool_calls": calls}
        _add_reasoning(message, [_as_pieces(each, where) for each in reasoning], flags, where)
        return [message], True
    results: list[Message] = []
    thoughts = [_as_pieces(each, where) for each in reasoning]
    pieces: Pieces = []
    if isinstance(content, ObjectAsWritten) or (isinstance(content, ListAsWritten) and not all(map(is_part, content))):
        content = content.written
    if isinstance(content, list) and (role != "tool" or content and all(map(is_part, content))):
        parts = read_parts(content, role, f"{where}: content")
        calls, results, pieces = calls + parts.calls, parts.results, parts.pieces
        thoughts += [(parts.reasoning, parts.reasoning_pieces)] * bool(parts.reasoning)
        content = parts.text if parts.text or not (calls or results) else None
        for key, values in parts.unknown.items():
            unknown.setdefault(f"content.{key}", []).extend(values)
    elif role == "tool" and not isinstance(content, str):
        content = "" if content is None else json.dumps(content, ensure_ascii=False)
    if content is not None:
        message["content"] = check_text(content, f"{where}: content")
    if details and any(details):
        pieces = _detailed(pieces, details, content or "", where)
    if calls:
        if role != "assistant":
            raise BadRow("calls-outside-assistant", f"{where}: tool calls in a turn that is not the assistant's")
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if not isinstance(message.get(key, ""), str):
            raise BadRow("wrong-type", f"{where}: {key} must be text, got {short(message[key])}")
    weights, flags = weigh_parts(pieces, role, flags)
    if weights:
        message[CONTENT_WEIGHTS] = weights
    _add_reasoning(message, thoughts, flags, where)
    results = [{**result, **flags} for result in results]
    if results and content is None:
        return results, False
    _check_not_empty(message, where)
    return [*results, message], False


def _with_role(turn: Any, where: str, spelling: Spelling) -> Message:
    """A turn as a message with our names of `role` and `content`; its other keys are as they were."""
    if isinstance(turn, str):
        turn = inner_json(turn, "wrong-type", f"{where}: expected an object with role and content; ")
    if not isinstance(turn, dict):
        raise BadRow("wrong-type", f"{where}: expected an object with role and content, got {kind_of(turn)}")
    # A null says that the key is not there, in columnar files and for transformers alike.
    message = {key: value for key, value in turn.items() if value is not None}
    if spelling.keys:
        message = _renamed(message, spelling.keys, where)
    for key in spelling.ignored:
        message.pop(key, None)
    theirs = message.pop("from", None)
    role = read_role(message.pop("role", theirs), where, spelling.roles)
    message = {"role": role, **message}
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    return message


def _renamed(message: Message, keys: Mapping[str, str], where: str) -> Message:
    renamed: Message = {}
    for key, value in message.items():
        ours = keys.get(key, key)
        if ours in renamed:
            raise BadRow("duplicate-key", f"{where}: {ours!r} is given twice, once as {key!r}")
        renamed[ours] = value
    return renamed


def _spelt_calls(spelt: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a turn whose text is their JSON."""
    if isinstance(spelt, str):
        spelt = inner_json(spelt, "bad-tool-call", f"{where}: ")
    if spelt == []:
        raise BadRow("bad-tool-call", f"{where}: no call in this turn")
    return [read_call(call, where) for call in (spelt if isinstance(spelt, list) else [spelt])]


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


def _detailed(pieces: Pieces, details: Sequence[Any], content: str, where: str) -> Pieces:
    if len(details) > 1 or any(flags for _, _, flags in pieces):
        raise BadRow("train-detail", f"{where}: which parts are trained is said twice, by {DETAILS[0]} and otherwise")
    return read_details(details[0], len(content), f"{where}: {DETAILS[0]}")


def _as_pieces(reasoning: Any, where: str) -> tuple[str, Pieces]:
    """Reasoning as a text, which may be given as blocks."""
    if isinstance(reasoning, list):
        parts = read_parts(reasoning, "assistant", f"{where}: {REASONING[0]}", text_is="reasoning")
        if parts.calls:
            raise BadRow("unknown-block", f"{where}: {REASONING[0]}: a call among the blocks of a reasoning")
        return parts.reasoning, parts.reasoning_pieces
    text = check_text(reasoning, f"{where}: {REASONING[0]}")
    return text, [(0, len(text), {})]


def _add_reasoning(message: Message, found: Sequence[tuple[str, Pieces]], flags: dict[str, Any], where: str) -> None:
    """Adds the reasoning and the flags of a turn; a turn of which no part is trained is not trained at all."""
    given = [(text, pieces) for text, pieces in found if text.strip()]
    if len({text for text, _ in given}) > 1:
        raise BadRow("two-reasonings", f"{where}: reasoning is given twice, in different words")
    if given:
        text, pieces = max(given, key=lambda each: sum(bool(flags) for _, _, flags in each[1]))
        message[REASONING[0]] = text
        weights, flags = weigh_parts(pieces, message["role"], flags)
        if weights:
            message[REASONING_WEIGHTS] = weights
    message |= flags
    if (CONTENT_WEIGHTS in message or REASONING_WEIGHTS in message) and not message.get("tool_calls"):
        texts = (
            (message.get("content", ""), message.get(CONTENT_WEIGHTS, [])),
            (message.get(REASONING[0], ""), message.get(REASONING_WEIGHTS, [])),
        )
        if all(is_untrained(*each) for each in texts):
            for key in OURS:
                message.pop(key, None)
            message["weight"] = 0.0


def _check_not_empty(message: Message, where: str) -> None:
    content, role = message.get("content"), message["role"]
    says_more = bool(message.get("tool_calls")) or REASONING[0] in message
    if content is None and not says_more:
        raise BadRow("missing-content", f"{where}: no content")
    if content is None:
        # Empty content, and not none: a template that takes calls without content also takes empty content, but not the
        # reverse.
        content = message["content"] = ""
    may_be_blank = says_more or role in ("system", "developer", "tool") or message.get("weight") == 0
    if not may_be_blank and not content.strip():
        raise BadRow("blank-content", f"{where}: content is blank")
