"""What rows could be that no format fits: the nearest formats, and how to map their columns.

In: the columns of one row, with their values. Out: words for an error: what the row holds, and the one line that helps.
A guess is only ever said, never taken: whoever knows the data decides.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxsft.rows.readings import FORMATS

NEAR = 3
"""Formats that are listed; docs/formats.md has all."""
_CLOSE = 0.8
_QUESTIONS = frozenset([
    "prompt", "input", "instruction", "question", "query", "user", "human", "source", "request", "problem", "task",
    "ask", "asked", "patient", "client", "src", "q", "context", "message", "post",
])  # fmt: skip
_ANSWERS = frozenset([
    "completion", "response", "output", "target", "answer", "assistant", "reply", "bot", "gpt", "label", "doctor",
    "solution", "summary", "result", "tgt", "gold", "translation", "verdict", "a", "chosen", "correct", "model",
])  # fmt: skip
_IDS = frozenset(["token", "id"])
_SPEAKER, _SPEECH = ("role", "from", "speaker"), ("content", "value", "text", "message")


class Guess(NamedTuple):
    """A format that the rows have under other names."""

    format: str
    columns: dict[str, str]
    """ours -> theirs."""
    condition: str = ""
    """What must be true of it, where names alone do not say so."""


def describe_columns(fields: Mapping[str, Any]) -> str:
    """`inputs (text), meta (object)`."""
    return ", ".join(f"{name} ({kind})" if (kind := _kind(value)) else name for name, value in fields.items())


def guess(fields: Mapping[str, Any]) -> Guess | None:
    """The format that a row's columns could be meant as; None where nothing speaks for one.

        guess({"q": "Why?", "reply": "So."}) == Guess("prompt_completion", {"prompt": "q", "completion": "reply"})

    Args:
        fields: of a row that no format fits.
    """
    if (turns := _turns_within(fields)) is not None:
        return Guess("messages", {"messages": turns})
    texts = [name for name, value in fields.items() if isinstance(value, str)]
    asked = [name for name in texts if _is_like(name, _QUESTIONS) and not _is_like(name, _ANSWERS)]
    answered = [name for name in texts if _is_like(name, _ANSWERS) and not _is_like(name, _QUESTIONS)]
    others = [name for name in texts if name not in [*asked, *answered]]
    if asked and answered:
        return _pair(asked[0], answered[0])
    if (misspelt := _misspelt(fields)) is not None:
        return misspelt
    ids = [name for name, value in fields.items() if _kind(value) == "list of numbers" and _is_like(name, _IDS)]
    if ids:
        return Guess("input_ids", {"input_ids": ids[0]}, "if these are the ids of the model's own tokenizer")
    if len(texts) == 2:
        question, answer = (asked or others)[0], (answered or others)[-1]
        return _pair(question, answer, f"if {question} is the question and {answer} the answer")
    if len(texts) == 1 and others:
        return Guess("text", {"text": others[0]}, "if it is plain text, all of which is to be trained")
    return None


def nearest(columns: Sequence[str]) -> list[str]:
    """The formats whose columns are most like some given ones, the nearest first."""

    def distance(name: str) -> float:
        needed = FORMATS[name].columns
        ratios = (max((_likeness(one, other) for other in columns), default=0.0) for one in needed)
        return 1 - sum(ratios) / len(needed)

    return sorted(FORMATS, key=distance)[:NEAR]


def as_yaml(columns: Mapping[str, str]) -> str:
    """`{prompt: q, completion: '2'}`."""
    plain = re.compile(r"[A-Za-z_][\w.-]*")
    said = {ours: theirs if plain.fullmatch(theirs) else json.dumps(theirs) for ours, theirs in columns.items()}
    return "{" + ", ".join(f"{ours}: {theirs}" for ours, theirs in said.items()) + "}"


def _pair(question: str, answer: str, condition: str = "") -> Guess:
    columns = {"prompt": question, "completion": answer}
    return Guess("prompt_completion", {ours: theirs for ours, theirs in columns.items() if ours != theirs}, condition)


def _turns_within(fields: Mapping[str, Any]) -> str | None:
    """The column, or a key of one, that holds a list of turns."""
    for name, value in fields.items():
        if _are_turns(value):
            return name
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if _are_turns(inner):
                    return f"{name}.{key}"
    return None


def _are_turns(value: Any) -> bool:
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    if not isinstance(value, list) or not value or not all(isinstance(turn, Mapping) for turn in value):
        return False
    return any(key in value[0] for key in _SPEAKER) and any(key in value[0] for key in _SPEECH)


def _misspelt(fields: Mapping[str, Any]) -> Guess | None:
    """The first format whose columns are all there but for a letter or two."""
    for name, known in FORMATS.items():
        columns: dict[str, str] = {}
        for ours in known.columns:
            left = [
                theirs
                for theirs, value in fields.items()
                if theirs not in (*known.columns, *columns.values()) and _may_be(ours, value)
            ]
            found = difflib.get_close_matches(ours, left, n=1, cutoff=_CLOSE) if ours not in fields else []
            columns |= {ours: found[0]} if found else {}
        if columns and all(ours in fields or ours in columns for ours in known.columns):
            return Guess(name, columns)
    return None


def _may_be(ours: str, value: Any) -> bool:
    """Whether a column of ours could hold such a value; one that is not known could be any."""
    is_list = ours in ("messages", "conversations", "conversation", "input_ids", "segments", "Instances")
    return value is None or isinstance(value, list) == is_list or _are_turns(value)


def _is_like(name: str, words: frozenset[str]) -> bool:
    """Whether one of the words of a column's name, in the singular, is among these."""
    parts = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    return any(part in words or part.removesuffix("s") in words for part in parts)


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.lower(), other.lower()).ratio()


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "turns as JSON text" if _are_turns(value) else "text"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, Mapping):
        return "object"
    if isinstance(value, list):
        kinds = {_kind(each) for each in value}
        return "turns" if _are_turns(value) else f"list of {kinds.pop()}s" if len(kinds) == 1 else "list"
    return ""
