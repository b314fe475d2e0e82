"""Reasoning of answers: told from their content by its tags, and refused or left out where a prompt forbids it.

A template that is told not to think (`enable_thinking: false`) ends its prompts with a thought that is closed before it
began, such as `<think>\\n\\n</think>`. An answer with reasoning does not fit behind such a prompt. In: a conversation,
or a render of it with its prompt. Out: messages whose reasoning has a key of its own, or a `ReasoningError`.
"""

import re
from collections.abc import Sequence

from jaxsft.chat.habits import Habits
from jaxsft.chat.layout import Layout
from jaxsft.chat.likeness import held
from jaxsft.chat.starts import MaskError
from jaxsft.chat.template import REASONING, Traceable
from jaxsft.rows.flags import CONTENT_WEIGHTS, REASONING_WEIGHTS, within
from jaxsft.rows.items import Conversation
from jaxsft.rows.messages import Message

USUAL_TAGS = ("<think>", "</think>")
"""What templates themselves take for reasoning in a content."""

_PIECE = re.compile(r"<[^<>]*>|\[[^\[\]]*\]|\S+")


class ReasoningError(MaskError):
    """An answer reasons where its template has no place for that."""


def read_tags(message: Message, tags: Sequence[tuple[str, str]]) -> Message:
    """The message with the reasoning that its content begins with under a key of its own.

    read_tags({"content": "<r>Hm.</r>Yes."}, [("<r>", "</r>")]) == {"content": "Yes.", "reasoning_content": "Hm."}
    """
    content = message.get("content")
    if message["role"] != "assistant" or message.get(REASONING) or not isinstance(content, str):
        return message
    for opening, closing in tags:
        begun = len(content) - len(content.lstrip()) + len(opening)
        end = content.find(closing, begun)
        if content.lstrip().startswith(opening) and end >= 0:
            start = begun + len(content[begun:end]) - len(content[begun:end].lstrip("\n"))
            thought, answer = content[start:end].rstrip("\n"), content[end + len(closing) :].lstrip("\n")
            apart: Message = {**message, REASONING: thought, "content": answer}
            if ranges := message.get(CONTENT_WEIGHTS):
                apart[REASONING_WEIGHTS] = within(ranges, start, start + len(thought))
                apart[CONTENT_WEIGHTS] = within(ranges, len(content) - len(answer), len(content))
            return apart
    return message


def without_reasoning(conversation: Conversation, tags: Sequence[tuple[str, str]]) -> tuple[Conversation, int]:
    """The conversation without what its answers think, and how many did."""
    messages, num_dropped = [], 0
    for message in conversation.messages:
        apart = read_tags(message, [*tags, USUAL_TAGS])
        if apart["role"] == "assistant" and apart.get(REASONING) is not None:
            message = {key: value for key, value in apart.items() if key not in (REASONING, REASONING_WEIGHTS)}
            num_dropped += 1
        messages.append(message)
    return conversation._replace(messages=messages), num_dropped


def thinks(traceable: Traceable, index: int) -> bool:
    """Whether a message reasons, in whatever place."""
    message = traceable.plain[0][index]
    content = message.get("content")
    return bool(message.get(REASONING)) or (isinstance(content, str) and USUAL_TAGS[1] in content)


def check_thinking(index: int, shown: Layout, asked: Layout, habits: Habits, *, name: str) -> None:
    """Refuses an answer that thinks although its prompt has closed the thought.

    Args:
        index: of its message.
        shown: a render with the answer.
        asked: its prompt.
        habits: what the template does in general.
        name: of the template.
    """
    text = str.__str__(asked.text)
    tail = text[asked.data[-1][1] if asked.data else 0 :]
    begun = _begun(tail, _before(shown, index), habits)
    for closing in _closings(shown, index):
        # Some templates write the closing as a part of every header, even before a content that thinks.
        if closing in begun or (closing == USUAL_TAGS[1] and closing in tail):
            raise ReasoningError(
                f"message {index + 1} (assistant): it reasons, but with {name} and these template variables its prompt "
                f"has closed the thought ({tail.strip()[-60:]!r}); turn thinking on, give rows without reasoning, or "
                f"set data.reasoning to drop",
                "reasoning",
            )


def _before(shown: Layout, index: int) -> str:
    """What the template writes before the first word of an answer, behind what anybody else says."""
    speech = shown.speech(index)
    start = shown.others_before(index, speech[0]) if speech else 0
    return str.__getitem__(shown.text, slice(start, speech[0])) if speech else ""


def _begun(tail: str, before: str, habits: Habits) -> str:
    """What the prompt begins of an answer, behind its header.

    Where all prompts close the thought, the closing looks like a part of the header: that ends where the answer, as it
    is shown, goes on otherwise.

    Args:
        tail: what the prompt ends with.
        before: what stands before the answer as it is shown.
        habits: what the template does in general.
    """
    for header in sorted((habits.header, habits.past_header), key=len):
        same = (held(header, before) or header).strip()
        if same and same in tail:
            return tail.rpartition(same)[2]
    return tail


def _closings(shown: Layout, index: int) -> list[str]:
    """The marks that end the thoughts of an answer, as it is shown."""
    parts = shown.parts(index)
    found = []
    for at, (_, end, source) in enumerate(parts):
        if source.field == REASONING and not (at + 1 < len(parts) and parts[at + 1][2].field == REASONING):
            following = parts[at + 1][0] if at + 1 < len(parts) else len(shown.text)
            mark = _PIECE.search(str.__getitem__(shown.text, slice(end, following)))
            found += [mark.group()] if mark else []
        elif source.field == "content" and USUAL_TAGS[1] in source.text:
            found.append(USUAL_TAGS[1])
    return found
