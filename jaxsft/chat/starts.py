"""Where the text of a turn's prompt ends in a render of the turn, for templates of any habit.

In: the render, the prompt, and what the template does in general. Out: the first character that the model must produce.
Texts are compared in whole words and marks, behind everything that others say before the turn.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from jaxsft.chat.habits import Habits
from jaxsft.chat.layout import Layout
from jaxsft.chat.likeness import header_end, is_border, parting, whole_length
from jaxsft.rows.sources import DataError


class MaskError(DataError):
    """It cannot be shown which tokens of a row the model must produce; says why, and what would help."""

    def __init__(self, reason: str, code: str = "mask") -> None:
        super().__init__(reason)
        self.code = code


class Begin(NamedTuple):
    """Where a turn begins in a render, in characters."""

    seam: int
    """Where the text of its prompt ends; a header that the prompt lacks comes behind it."""
    start: int
    """Behind that header: what follows is trained."""
    found_by: str
    """See `turns.FOUND_BY`."""


class Question(NamedTuple):
    """What is known about the beginning of a turn."""

    message: int
    shown: Layout
    """A render with the turn in it."""
    prompt: str | None
    """None where there is none, as before the first message."""
    make_prompt_layout: Callable[[], Layout]
    make_headers: Callable[[], Iterable[str]]
    """The headers that prompts of other turns of the conversation end with, thinking that they begin included."""
    habits: Habits
    name: str
    """Name of the template."""

    text: str
    """Text of `shown`."""
    past: int
    """Where what others say before the turn ends."""
    end: int
    """Where the turn's own words begin, or the next one's if it has none."""

    def error(self, gap: str) -> MaskError:
        return MaskError(
            f"message {self.message + 1} (assistant): where it begins cannot be told: {self.name} writes {gap[-60:]!r} "
            f"before it, which is neither in the prompt nor its usual header {self.habits.header!r}"
        )


def make_question(
    message: int,
    shown: Layout,
    prompt: str | None,
    *,
    make_prompt_layout: Callable[[], Layout],
    make_headers: Callable[[], Iterable[str]],
    habits: Habits,
    name: str,
) -> Question:
    """What is known about the beginning of a turn; for the arguments see `Question`."""
    speech = shown.speech(message)
    if speech is None:
        past = shown.end_before(message)
        end = shown.next_other(past, message)
    else:
        past, end = shown.others_before(message, speech[0]), speech[0]
    text = str.__str__(shown.text)
    return Question(message, shown, prompt, make_prompt_layout, make_headers, habits, name, text, past, end)


def find_begin(question: Question) -> Begin:
    """Where the turn begins.

    Raises:
        MaskError: it cannot be told.
    """
    text, prompt, habits = question.text, question.prompt, question.habits
    if prompt is None or _lacks_past(question, prompt):
        return _unasked(question)
    if text.startswith(prompt):
        begin = Begin(len(prompt), len(prompt), "prompt")
    else:
        begin = _parted(question, prompt)
    header, gap = habits.header, text[begin.start : max(question.end, begin.start)]
    if begin.found_by == "prompt" and gap.strip():
        # Some prompts have no header, as after another answer.
        speaks = question.shown.speech(question.message) is not None
        for known in [header] if header.strip() else question.make_headers():
            words = known.strip()
            if words and words in gap and (speaks or gap.lstrip().startswith(words)):
                start = header_end(known, text, begin.start + _place(question, words, gap))
                return begin._replace(start=start, found_by="header")
    if not gap.strip() or not habits.ignores_prompt:
        return begin
    # The header is not in the prompt: what the template writes before an answer in general is the header here.
    if not header.strip():
        return begin
    if header in gap:
        return begin._replace(start=begin.start + _place(question, header, gap) + len(header), found_by="header")
    if same := whole_length(header, gap):
        found_by = "header" if begin.found_by == "prompt" else begin.found_by
        return begin._replace(start=begin.start + same, found_by=found_by)
    raise question.error(gap)


def _lacks_past(question: Question, prompt: str) -> bool:
    """Whether the prompt leaves out a whole message, or the tools, that the render shows before the turn.

    Some templates have no place for a system text, or for tools, in a prompt that no question is in.
    """
    past = question.past
    if question.text.startswith(prompt):
        return past > len(prompt)
    shown, asked = (
        {owner for owner, _, end in layout.owners() if owner != question.message and end <= limit}
        for layout, limit in ((question.shown, past), (question.make_prompt_layout(), len(prompt)))
    )
    return not shown <= asked


def _parted(question: Question, prompt: str) -> Begin:
    """Where the prompt ends with other text than the render: where what follows the past is no longer the same."""
    text, header, past = question.text, question.habits.header, question.past
    layout = question.make_prompt_layout()
    # What follows the past in the prompt, and what follows it here: the end of that message, and the header.
    tail = prompt[layout.data[-1][1] if layout.data else 0 :]
    end = max(question.end, past)
    start = seam = past + parting(tail, text[past:end])
    gap = text[start:end]
    is_behind = question.shown.speech(question.message) is not None or not text[past:start].strip()
    if header.strip() and header in gap and is_behind:  # The end of the message before it differs, too.
        at = _place(question, header, gap)
        seam = start + at + (len(header) if header in tail else 0)
        start += at + len(header)
    # The same past but for blanks, and only the prompt has more of it: thinking that it begins, for instance.
    is_same = "".join(prompt.split()).startswith("".join(text[:seam].split()))
    return Begin(seam, start, "parting" if is_same else "moved")


def _unasked(question: Question) -> Begin:
    """A turn that nobody asks for: it begins behind the header that the prompts of other turns have.

    Where the template writes no such header before it, what a turn says in words begins with its first word; but what
    precedes a call or a thought may be the model's, and nothing tells it from a header.
    """
    text, past, end = question.text, question.past, question.end
    gap = text[past:end]
    speech = question.shown.speech(question.message)
    if not gap.strip() and speech is not None:
        return Begin(past, past, "content")
    for header in _headers(question):
        if not header.strip():
            continue
        if header in gap:
            start = past + _place(question, header, gap) + len(header)
            return Begin(start, start, "header")
        # Only its beginning, where the rest is thinking that such a turn does not have.
        for at in _borders(gap):
            same = parting(header, gap[at:])
            if gap[at : at + same].strip() and not gap[at + same :].strip() and speech:
                return Begin(past + at + same, past + at + same, "header")
    if speech is not None and question.shown.parts(question.message)[0][2].field == "content":
        return Begin(speech[0], speech[0], "content")
    raise question.error(gap)


def _headers(question: Question) -> Iterator[str]:
    yield question.habits.header
    yield question.habits.past_header
    yield from question.make_headers()


def _place(question: Question, header: str, gap: str) -> int:
    """Where in the text before a turn its header stands: last, or first where the next turns follow at once."""
    return gap.rindex(header) if question.shown.speech(question.message) else gap.index(header)


def _borders(text: str) -> list[int]:
    """Where a word or a mark may begin."""
    return [at for at in range(len(text)) if not text[at].isspace() and is_border(text, at)]
