"""What a row means: each format turns the fields of one row into a `Conversation` (or a `Document` of plain text).

In: rows of `sources.py`. Out: messages as Hugging Face chat templates take them, checked field by field. A new format
is one function and one entry in `FORMATS`. Tokens and masks are left to `chat.py`.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxsft.data.sources import DataError, Row, bad_rows, read_rows

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


class Conversation(NamedTuple):
    """Messages of one row, as chat templates take them."""

    messages: list[Message]
    """Dicts with role and content; tool_calls, tool_call_id, name and reasoning_content stay as they are."""
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = {}
    """Further variables of the chat template."""
    trained_from: int = 0
    """Messages before this index are never trained: the prompt of a prompt/completion row."""
    origin: str = ""


class Document(NamedTuple):
    """Plain text, all of it trained."""

    text: str
    origin: str = ""


class Format(NamedTuple):
    """How rows of one format are recognised and read."""

    columns: tuple[str, ...]
    """Columns that every row must have."""
    optional: tuple[str, ...]
    """Columns that are read where a row has them."""
    convert: Callable[[dict[str, Any]], Conversation | Document]
    """Raises ValueError with the reason why a row is bad."""


def detect_format(columns: Iterable[str]) -> str:
    """The first format of `FORMATS`, in its order, whose columns are all there.

        detect_format(["id", "messages", "prompt", "completion"]) == "messages"

    Raises:
        DataError: no format fits; lists the columns and what every format needs.
    """
    columns = list(columns)
    for name, known in FORMATS.items():
        if set(known.columns) <= set(columns):
            return name
    needs = "\n".join(f"  {name}: {', '.join(known.columns)}" for name, known in FORMATS.items())
    raise DataError(f"no known format has the columns {', '.join(columns) or '(none)'}; the formats need:\n{needs}")


class Loaded(NamedTuple):
    """All rows of a source, in the format that they were read as."""

    format: str
    columns: list[str]
    """of the first row"""
    conversations: list[Conversation | Document]


def load_conversations(source: str, *, format: str | None, limit: int | None = None) -> Loaded:
    """The rows of a source, or its first `limit`; without a format given, the first row's columns say which it is.

    Raises:
        DataError: an unreadable source, columns of no known format, or bad rows.
    """
    rows = list(read_rows(source, limit=limit))
    columns = list(rows[0].fields)
    format = format or detect_format(columns)
    return Loaded(format, columns, to_conversations(rows, format))


def to_conversations(rows: Iterable[Row], format: str) -> list[Conversation | Document]:
    """All rows in one format.

    Raises:
        DataError: all bad rows together, the first 10 with their file, line and reason.
    """
    convert = FORMATS[format].convert
    conversations, problems = [], []
    for row in rows:
        try:
            conversations.append(convert(row.fields)._replace(origin=row.origin))
        except ValueError as error:
            problems.append((row.origin, str(error)))
    if problems:
        raise bad_rows(problems, f"bad (format {format!r})")
    return conversations


def _from_messages(fields: dict[str, Any]) -> Conversation:
    return _conversation(fields, _list(fields, "messages"))


def _from_conversations(fields: dict[str, Any]) -> Conversation:
    messages = _system_message(fields)
    for index, turn in enumerate(_list(fields, "conversations")):
        if isinstance(turn, dict) and "from" not in turn and "role" in turn:
            messages.append(turn)
            continue
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise ValueError(f"conversations[{index}]: expected an object with `from` and `value`")
        role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise ValueError(f"conversations[{index}]: unknown role {turn['from']!r} in `from` (known: {known})")
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        messages.append({"role": role, "content": turn["value"], **rest})
    return _conversation(fields, messages)


def _from_prompt_completion(fields: dict[str, Any]) -> Conversation:
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(fields, prompt + completion, trained_from=len(prompt))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise ValueError("prompt and completion must both be text or both be lists of messages")
    return _conversation(fields, _turns(_text(fields, "prompt"), _text(fields, "completion")))


def _from_alpaca(fields: dict[str, Any]) -> Conversation:
    question = _text(fields, "instruction")
    if context := _optional_text(fields, "input"):
        question = f"{question}\n\n{context}"
    messages = _system_message(fields)
    for index, pair in enumerate(fields.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history[{index}]: expected a pair of instruction and answer")
        messages += _turns(*pair)
    return _conversation(fields, messages + _turns(question, _text(fields, "output")))


def _from_question_answer(fields: dict[str, Any]) -> Conversation:
    return _conversation(fields, _turns(_text(fields, "question"), _text(fields, "answer")))


def _from_text(fields: dict[str, Any]) -> Document:
    return Document(_text(fields, "text"))


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), ("tools", "chat_template_kwargs"), _from_messages),
    "conversations": Format(("conversations",), ("system", "tools", "chat_template_kwargs"), _from_conversations),
    "prompt_completion": Format(("prompt", "completion"), ("tools", "chat_template_kwargs"), _from_prompt_completion),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history"), _from_alpaca),
    "question_answer": Format(("question", "answer"), (), _from_question_answer),
    "text": Format(("text",), (), _from_text),
}
"""In the order of detection: a format that says more about the turns goes before one that says less."""

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
}

# Arguments of apply_chat_template; a row that sets one of them would change more than the template's variables.
_RESERVED = {
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip


def _conversation(fields: dict[str, Any], messages: list[Any], *, trained_from: int = 0) -> Conversation:
    checked = [_checked_message(message, index) for index, message in enumerate(messages)]
    for index, message in enumerate(checked):
        if message["role"] == "tool" and (index == 0 or checked[index - 1]["role"] not in ("assistant", "tool")):
            raise ValueError(f"message {index + 1} (tool): a tool's result must follow the assistant's call")
    if not any(message["role"] == "assistant" for message in checked[trained_from:]):
        raise ValueError("no assistant turn, so nothing to train" + " in the completion" * (trained_from > 0))
    kwargs = fields.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict) or _RESERVED & kwargs.keys():
        raise ValueError(f"chat_template_kwargs: expected an object of template variables, got {_short(kwargs)}")
    return Conversation(checked, _tools(fields.get("tools")), kwargs, trained_from)


def _checked_message(message: Any, index: int) -> Message:
    where = f"message {index + 1}"
    if not isinstance(message, dict):
        raise ValueError(f"{where}: expected an object with role and content, got {_short(message)}")
    # A null says that the key is not there, in columnar files and for transformers alike.
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if role is None:
        raise ValueError(f"{where}: no role")
    if role not in ROLES:
        raise ValueError(f"{where}: unknown role {_short(role)} (known: {', '.join(ROLES)})")
    where = f"{where} ({role})"
    for key in ("weight", "train"):
        if key in message:
            raise ValueError(f"{where}: {key!r} per message is not supported")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if not isinstance(message.get(key, ""), str):
            raise ValueError(f"{where}: {key} must be text, got {_short(message[key])}")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ValueError(f"{where}: tool_calls must be a list of objects, got {_short(calls)}")
    if calls and role != "assistant":
        raise ValueError(f"{where}: tool_calls in a turn that is not the assistant's")
    content = message.get("content")
    if isinstance(content, list):
        raise ValueError(f"{where}: content is a list of parts; only text is supported, no images or audio")
    if content is None and not calls:
        raise ValueError(f"{where}: no content")
    if content is not None and not isinstance(content, str):
        raise ValueError(f"{where}: content must be text, got {_short(content)}")
    if content is not None and not content.strip() and not calls and role != "tool":
        raise ValueError(f"{where}: content is blank")
    return message


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"tools: not readable as JSON: {error.msg} at column {error.colno}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools: expected a list of objects, got {_short(tools)}")
    return tools


def _turns(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system_message(fields: dict[str, Any]) -> list[Message]:
    text = _optional_text(fields, "system")
    return [{"role": "system", "content": text}] if text else []


def _list(fields: dict[str, Any], column: str) -> list[Any]:
    value = fields.get(column)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column}: expected a list of at least one message, got {_short(value)}")
    return value


def _text(fields: dict[str, Any], column: str) -> str:
    text = _optional_text(fields, column)
    if not text:
        raise ValueError(f"{column}: missing, null or blank")
    return text


def _optional_text(fields: dict[str, Any], column: str) -> str:
    value = fields.get(column)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{column}: must be text, got {_short(value)}")
    return value if value and value.strip() else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
