"""What a chat template does around every answer, and how it takes messages: learnt by rendering a few words.

In: a template, and the texts of the tokens that end an answer. Out: `Habits`, by which `turns.py`, `starts.py`,
`thinking.py` and `stops.py` work without knowing any template's markup.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxsft.chat.layout import Layout
from jaxsft.chat.likeness import held, parting, whole_length
from jaxsft.chat.provenance import Traced
from jaxsft.chat.template import REASONING, ChatTemplate, TemplateError, number_sources
from jaxsft.rows.messages import Message


class Habits(NamedTuple):
    """What a template does around every answer and expects of every message, seen in a conversation of two words."""

    header: str
    """What it writes between the question and the answer, as far as the prompt supplies that."""
    past_header: str
    """The part of the header that it also writes before earlier answers: some write thinking before the last one only.
    """
    ignores_prompt: bool
    """add_generation_prompt changes nothing, and no header stands at the end without it."""
    lead: str
    """What it writes between the header and the answer: the model's to write, such as an empty thought."""
    after: str
    """What it writes after the answer."""
    between: Traced
    """What it writes between an answer and the next question."""
    after_call: Traced
    """What it writes between a tool call and its result."""
    within: tuple[str, ...]
    """What it writes inside of an answer, between its reasoning and what follows that: words, or a call."""
    takes_blocks: frozenset[str]
    """Roles of which it shows only content that is a list of `{"type": "text", "text": ...}`."""
    takes_json_arguments: bool
    """It shows the arguments of a tool call only, or only as JSON, where they are a string."""


def writes_within(habits: Habits, stop: str) -> bool:
    """Whether a template writes the text of a stop token inside of one answer, between its reasoning and the rest."""
    return bool(stop.strip()) and any(stop in text for text in habits.within)


def fitted(messages: Sequence[Message], habits: Habits) -> list[Message]:
    """Messages in the form that a template takes."""
    fitting = []
    for message in messages:
        message = {key: value for key, value in message.items() if key not in ("weight", "train")}
        role = message["role"] if message["role"] in _ROLES else "user"
        if role in habits.takes_blocks and isinstance(message.get("content"), str):
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


_ROLES = ("system", "developer", "user", "assistant", "tool")
_RESULT: Message = {"role": "tool", "tool_call_id": "call00001", "name": "look_up", "content": "a plant"}
_THINKING = {"enable_thinking": True, "thinking": True}
"""What turns reasoning on where it is off by default."""
_MORE: Message = {"role": "user", "content": "and more"}
_SIDES: tuple[frozenset[str], ...] = (
    frozenset(), frozenset({"user", "assistant"}), frozenset({"user"}), frozenset({"assistant"}),
)  # fmt: skip
_OTHERS: dict[str, list[Message]] = {
    "system": [{"role": "system", "content": "a rule"}, _QUESTION, _ANSWER],
    "developer": [{"role": "developer", "content": "a rule"}, _QUESTION, _ANSWER],
    "tool": [_QUESTION, _CALL, _RESULT, _ANSWER],
}
"""Conversations to see how else the content of other roles is taken."""


def habits_of(template: ChatTemplate, stops: Sequence[str] = ()) -> Habits:
    """Learns them by rendering. If a template refuses every probe, its habits stay empty; the rows say then what it
    refuses.

    Args:
        template: to render with.
        stops: texts of tokens that end an answer; such a text belongs to the message before it, never to a header.
    """
    habits = Habits("", "", True, "", "", Traced(), Traced(), (), frozenset(), False)
    for sides in _SIDES:
        found = _around_answer(template, habits._replace(takes_blocks=sides), stops)
        if found is not None:
            habits = found
            break
    as_object, as_text = (
        _shown_call(template, habits._replace(takes_json_arguments=as_json)) for as_json in (False, True)
    )
    habits = habits._replace(takes_json_arguments=as_text and not as_object)
    for role, messages in _OTHERS.items():
        if _takes_blocks(template, habits, role, messages):
            habits = habits._replace(takes_blocks=habits.takes_blocks | {role})
    return habits._replace(after_call=_after_call(template, habits), within=_within(template, habits))


def _around_answer(template: ChatTemplate, habits: Habits, stops: Sequence[str]) -> Habits | None:
    for beginning in _BEGINNINGS:
        if len(beginning) > 1 and "user" in habits.takes_blocks:
            habits = habits._replace(takes_blocks=habits.takes_blocks | {"system"})
        traceable = number_sources(fitted([*beginning, _ANSWER], habits), None, {})
        num_messages = len(beginning) + 1
        try:
            past = Layout(template.render(traceable, len(beginning)), traceable, len(beginning))
            prompt = template.render(traceable, len(beginning), prompt=True)
            shown = Layout(template.render(traceable, num_messages), traceable, num_messages)
        except TemplateError:
            continue
        speech, asked = shown.speech(len(beginning)), shown.speech(len(beginning) - 1)
        question = past.speech(len(beginning) - 1)
        if speech is None or question is None or asked is None or asked[1] > speech[0]:
            continue
        gap, tail = _cut(shown.text, asked[1], speech[0]), _cut(past.text, question[1], None)
        between = _between(template, habits, [*beginning, _ANSWER], [_MORE, _ANSWER])
        is_asked = past.text != prompt
        if is_asked:
            # Only as far as the prompt has it: an empty thinking block is the model's to write.
            added = _cut(prompt, whole_length(past.text, prompt), None)
            header = _behind_stops(held(added, _cut(gap, whole_length(tail, gap), None)), stops)
        else:
            header, is_asked = _unasked(template, habits, beginning, (gap, tail, between), stops)
        return habits._replace(
            header=header,
            past_header=held(header, _between(template, habits, beginning, [_ANSWER, _MORE, _ANSWER])),
            lead=gap.rpartition(header)[2] if header else "",
            ignores_prompt=not is_asked,
            after=_cut(shown.text, speech[1], None),
            between=between,
        )
    return None


def _unasked(
    template: ChatTemplate, habits: Habits, beginning: list[Message], texts: tuple[str, str, str], stops: Sequence[str]
) -> tuple[str, bool]:
    """The header of a template that ignores add_generation_prompt, and whether its prompts have it nonetheless.

    The end of a message is told from a header by what follows a question that is not the last message: there, another
    header stands instead.

        gap         what it writes between question and answer      <eos>[A]
        tail        what it writes after a question at the end      <eos>[A]: its prompts have it;  <eos>: they have not
        between     what it writes between answer and question      <eos>[Q]
    """
    gap, tail, between = texts
    again = _between(template, habits, beginning, [_MORE])
    ending = max(whole_length(tail, again), whole_length(tail, between))
    rest = tail[ending:]
    for stop in sorted(stops, key=len, reverse=True):
        rest = rest.replace(stop, "")
    rest = rest.strip()
    if rest and not again:
        # The template takes no two questions in a row. Text that also ends a conversation whose last turn is an answer
        # does not end a question: it is a header.
        answered = _tail(template, habits, [*beginning, _ANSWER])
        rest = rest if answered and answered.rstrip().endswith(rest) else ""
    if rest and rest not in gap:
        # These words do not stand before an answer, so they are a header only if they also end the render of no
        # messages.
        nothing = _tail(template, habits, [])
        rest = rest if nothing is None or nothing.rstrip().endswith(rest) else ""
    if rest:
        asked = gap[: parting(tail, gap)]
        header = _behind_stops(asked, stops)
        return header if header.strip() != asked.strip() else asked[ending:], True
    if gap.startswith(tail):
        return gap[len(tail) :], False
    return _behind_stops(gap[whole_length(tail, gap) :], stops), False


def _behind_stops(text: str, stops: Sequence[str]) -> str:
    """What follows the stop tokens and blanks that a text begins with."""
    text = text.lstrip()
    while stop := next((stop for stop in stops if text.startswith(stop)), ""):
        text = text.removeprefix(stop).lstrip()
    return text


def _between(template: ChatTemplate, habits: Habits, before: list[Message], after: list[Message]) -> Traced:
    """What stands between the last message of one list and the first of the other; "" where they are refused."""
    messages = [*before, *after]
    traceable = number_sources(fitted(messages, habits), _TOOLS if before[-1].get("tool_calls") else None, {})
    try:
        layout = Layout(template.render(traceable, len(messages)), traceable, len(messages))
    except TemplateError:
        return Traced()
    one, other = layout.speech(len(before) - 1), layout.speech(len(before))
    return layout.text[one[1] : other[0]] if one and other else Traced()


def _after_call(template: ChatTemplate, habits: Habits) -> Traced:
    for beginning in _BEGINNINGS:
        if found := _between(template, habits, [*beginning, _CALL], [_RESULT, _ANSWER]):
            return found
    return Traced()


def _within(template: ChatTemplate, habits: Habits) -> tuple[str, ...]:
    found: list[str] = []
    for answer in (_ANSWER, _CALL):
        for beginning, variables in itertools.product(_BEGINNINGS, ({}, _THINKING)):
            messages = [*beginning, {**answer, REASONING: "a thought"}]
            tools = _TOOLS if "tool_calls" in answer else None
            traceable = number_sources(fitted(messages, habits), tools, variables)
            try:
                layout = Layout(template.render(traceable, len(messages)), traceable, len(messages))
            except TemplateError:
                continue
            parts = layout.parts(len(beginning))
            gaps = [
                _cut(layout.text, end, start)
                for (_, end, one), (start, _, other) in itertools.pairwise(parts)
                if one.field == REASONING and other.field != REASONING
            ]
            if gaps:
                found += gaps
                break
    return tuple(found)


def _tail(template: ChatTemplate, habits: Habits, messages: list[Message]) -> str | None:
    """What stands after the last word of anybody; None where the messages are refused."""
    traceable = number_sources(fitted(messages, habits), None, {})
    try:
        layout = Layout(template.render(traceable, len(messages)), traceable, len(messages))
    except TemplateError:
        return None
    return _cut(layout.text, layout.data[-1][1] if layout.data else 0, None)


def _cut(text: str, start: int, end: int | None) -> str:
    """A part of a text, without provenance."""
    return str.__getitem__(text, slice(start, end))


def _takes_blocks(template: ChatTemplate, habits: Habits, role: str, messages: list[Message]) -> bool:
    """Whether content of a role is shown as it is only where it is a list of blocks."""
    content = next(str(message["content"]) for message in messages if message["role"] == role)
    shown = []
    for roles in (habits.takes_blocks - {role}, habits.takes_blocks | {role}):
        fitting = fitted(messages, habits._replace(takes_blocks=roles))
        traceable = number_sources(fitting, _TOOLS if role == "tool" else None, {})
        try:
            text = str.__str__(template.render(traceable, len(messages)))
            shown.append(content in text and f"'text': '{content}'" not in text and f'"text": "{content}"' not in text)
        except TemplateError:
            shown.append(False)
    # Where neither form is shown, what holds for the user's content is taken to hold here.
    return shown[1] and not shown[0] if any(shown) else "user" in habits.takes_blocks


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
