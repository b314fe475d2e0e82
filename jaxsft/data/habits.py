"""What a chat template does around every answer, and how it takes messages: learnt by rendering a few words."""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxsft.data.formats import Message
from jaxsft.data.layout import Layout
from jaxsft.data.template import ChatTemplate, TemplateError, number_sources


def parting(tail: str, gap: str) -> int:
    """How far `gap` says the same as the end of a prompt, blanks aside, up to the end of a word or of a mark.

    parting("<turn>model\\n<think>", "<turn>model\\nYes")  is 12: the newline is in both
    parting("\\nAssistant:", "\\n\\nAssistant: Yes")      is 12: one newline more changes nothing
    parting("<|a|><|think|>", "<|a|><|text|>")          is 5: `<|t` is no common beginning
    """
    at = here = same = 0
    while True:
        if at < len(tail) and here < len(gap) and tail[at] == gap[here]:
            at, here = at + 1, here + 1
            is_end = at == len(tail) or tail[at].isspace() or tail[at] in "<["
            if is_end or tail[at - 1].isspace() or tail[at - 1] in ">]":
                same = here
        elif at < len(tail) and tail[at].isspace():
            at += 1
        elif here < len(gap) and gap[here].isspace():
            here += 1
        else:
            return same


class Habits(NamedTuple):
    """What a template does around every answer and expects of every message, seen in a conversation of two words."""

    header: str
    """What it writes between the question and the answer, as far as the prompt supplies that."""
    ignores_prompt: bool
    """add_generation_prompt changes nothing."""
    lead: str
    """What it writes between the header and the answer: the model's to write, such as an empty thought."""
    after: str
    """What it writes after the answer."""
    between: str
    """What it writes between an answer and the next question."""
    takes_blocks: bool
    """It shows only content that is a list of `{"type": "text", "text": ...}`."""
    takes_json_arguments: bool
    """It shows the arguments of a tool call only, or only as JSON, where they are a string."""


def fitted(messages: Sequence[Message], habits: Habits) -> list[Message]:
    """Messages in the form that a template takes."""
    fitting = []
    for message in messages:
        message = {key: value for key, value in message.items() if key not in ("weight", "train")}
        if habits.takes_blocks and isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        if habits.takes_json_arguments and message.get("tool_calls"):
            message["tool_calls"] = [_with_json_arguments(call) for call in message["tool_calls"]]
        fitting.append(message)
    return fitting


def _with_json_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_json_arguments(call["function"])}
    if isinstance(call.get("arguments"), dict | list):
        return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return call


_QUESTION: Message = {"role": "user", "content": "a question"}
_BEGINNINGS: list[list[Message]] = [[_QUESTION], [{"role": "system", "content": "a rule"}, _QUESTION]]
_ANSWER: Message = {"role": "assistant", "content": "the answer"}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": {"word": "tree"}}}
    ],
}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks up a word.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "The word."}},
                "required": ["word"],
            },
        },
    }
]


def habits_of(template: ChatTemplate) -> Habits:
    """Learns them by rendering; a template that refuses all of it is known by its refusals of rows."""
    habits = Habits("", True, "", "", "", False, False)
    for blocks in (False, True):
        found = _around_answer(template, habits._replace(takes_blocks=blocks))
        if found is not None:
            habits = found
            break
    as_object, as_text = (
        _shown_call(template, habits._replace(takes_json_arguments=as_json)) for as_json in (False, True)
    )
    return habits._replace(takes_json_arguments=as_text and not as_object)


def _around_answer(template: ChatTemplate, habits: Habits) -> Habits | None:
    for beginning in _BEGINNINGS:
        traceable = number_sources(fitted([*beginning, _ANSWER], habits), None, {})
        try:
            past = template.render(traceable, len(beginning))
            prompt = template.render(traceable, len(beginning), prompt=True)
            num_messages = len(beginning) + 1
            shown = Layout(template.render(traceable, num_messages), traceable, num_messages)
        except TemplateError:
            continue
        speech = shown.speech(len(beginning))
        if speech is None:
            continue
        same = len(os.path.commonprefix([past, shown.text]))
        since = max(min(same, speech[0]), shown.end_before(len(beginning)))
        header = str.__getitem__(shown.text, slice(since, speech[0]))
        if past != prompt:  # Only as far as the prompt has it: an empty thinking block is the model's to write.
            added = str.__getitem__(prompt, slice(len(os.path.commonprefix([past, prompt])), None))
            found = max(range(len(header) + 1), key=lambda at: parting(added, header[at:]))
            header = header[found : found + parting(added, header[found:])]
        elif not shown.text.startswith(past):  # It always ends with a header, which is then in the prompt as well.
            header = ""
        return habits._replace(
            header=header,
            lead=str.__getitem__(shown.text, slice(since, speech[0])).rpartition(header)[2] if header else "",
            ignores_prompt=past == prompt,
            after=str.__getitem__(shown.text, slice(speech[1], None)),
            between=_between(template, habits, beginning),
        )
    return None


def _between(template: ChatTemplate, habits: Habits, beginning: list[Message]) -> str:
    messages = [*beginning, _ANSWER, {"role": "user", "content": "and more"}, _ANSWER]
    traceable = number_sources(fitted(messages, habits), None, {})
    try:
        layout = Layout(template.render(traceable, len(messages)), traceable, len(messages))
    except TemplateError:
        return ""
    answer, question = layout.speech(len(beginning)), layout.speech(len(beginning) + 1)
    return str.__getitem__(layout.text, slice(answer[1], question[0])) if answer and question else ""


def _shown_call(template: ChatTemplate, habits: Habits) -> bool:
    """Whether a tool call is rendered with its arguments, and not in Python's spelling of them."""
    for beginning in _BEGINNINGS:
        traceable = number_sources(fitted([*beginning, _CALL], habits), _TOOLS, {})
        try:
            text = template.render(traceable, len(beginning) + 1)
        except TemplateError:
            continue
        return "tree" in text and "{'word'" not in text and '\\"tree' not in text
    return False
