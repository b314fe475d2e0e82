"""A last look at the weights of every example: nothing is trained that the model is given.

In: an example as characters that know their source, the messages that are trained in it, the prompts that ask for
them, and the weights of its tokens. Out: nothing, or a MaskError. How the weights came about is not looked at, so that
a fault there is found here. Whatever the template, no token carries weight that is wholly

- said by a message that is not trained, by the tools, by a variable of the template, or by nobody knows whom;
- reasoning, where that is only seen;
- the template's, but for
  - what stands inside a trained message,
  - what follows one, through the first stop token, and
  - what precedes one: behind its prompt, behind every stop token there, and behind the header that prompts hold.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
                                                           ^^^^^^^^^^^^^^^          may carry weight
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxsft.chat.layout import SPEECH, Layout
from jaxsft.chat.likeness import common_length, header_end
from jaxsft.chat.provenance import TEMPLATE, UNKNOWN
from jaxsft.chat.starts import MaskError
from jaxsft.chat.template import GENERATED, Source

_NOBODY = -9
"""Instead of a message: of text whose author is not known."""


class Given(NamedTuple):
    """What is known of an example without looking at its weights."""

    layout: Layout
    sources: Sequence[Source]
    trained: frozenset[int]
    """Messages that are trained in it."""
    answers: frozenset[int]
    """Messages of the assistant; others begin with what they say."""
    prompts: Mapping[int, str]
    """By message, the prompt that asks for it, where there is one."""
    headers: Sequence[str]
    """What the template writes before an answer in general; the longest first."""
    stop: re.Pattern[str]
    """The text of any stop token."""
    sees_reasoning_only: bool


def check_weights(given: Given, starts: np.ndarray, ends: np.ndarray, weights: np.ndarray, *, name: str) -> None:
    """Refuses weights on what the model is given.

    Args:
        given: the example.
        starts: int [T]: first character of each token.
        ends: int [T]: behind its last character.
        weights: float [T]
        name: of the template, for the error.

    Raises:
        MaskError: says which message, and what was about to be trained.
    """
    given, text, spoken = _read(given)
    wrong = weighs_outside(list(_joined(_free(given, text, spoken))), starts, ends, weights)
    if given.sees_reasoning_only:
        for message in given.trained:
            for start, end in given.layout.reasoning(message):
                wrong |= (weights > 0) & (starts >= start) & (ends <= end) & (starts < ends)
    if wrong.any():
        # A token of no characters, as SentencePiece writes them, belongs to both its neighbours.
        for start, end in _free(given, text, spoken):
            wrong[(starts == ends) & (starts >= start) & (starts <= end)] = False
    if wrong.any():
        at = int(np.argmax(wrong))
        end = at + int(np.argmin(np.append(wrong[at:], False)))
        place = int(starts[at])
        raise MaskError(
            f"{_turn_of(given, spoken, place)}: with {name}, {text[place : ends[end - 1]][:60]!r} would be trained, "
            f"which is {_owner(spoken, place)}: where this turn begins and ends cannot be told"
        )


def free_spans(given: Given) -> list[tuple[int, int]]:
    """The characters of an example that may carry weight, as (start, end), in order.

    None of them where reasoning is only seen: then every token with weight asks for a closer look, `check_weights`.
    """
    given, text, spoken = _read(given)
    if given.sees_reasoning_only and any(given.layout.reasoning(message) for message in given.trained):
        return []
    return list(_joined(_free(given, text, spoken)))


def weighs_outside(
    free: Sequence[tuple[int, int]], starts: np.ndarray, ends: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The tokens that carry weight and share no character with the spans that may, bool [T]; `free` is in order.

    Tokens may be those of many examples, and places those of all their texts one after the other.
    """
    wrong = weights > 0
    places = np.array(free, np.int64).reshape(-1, 2)
    firsts, lasts = ends.searchsorted(places[:, 0], "right"), starts.searchsorted(places[:, 1])
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        wrong[first:last] = False
    return wrong


def _read(given: Given) -> "tuple[Given, str, list[_Part]]":
    """What is known, with all headers of the example; its text; and everything that is said in it."""
    text = str.__str__(given.layout.text)
    spoken = _spoken(given)
    if len(given.trained) > 1:
        given = given._replace(headers=_headers(given, text, spoken))
    return given, text, spoken


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Spans in order, those that touch each other as one."""
    first, last = 0, 0
    for start, end in spans:
        if start > last:
            yield first, last
            first = start
        last = max(last, end)
    yield first, last


class _Part(NamedTuple):
    """What one message says without a break by another one."""

    start: int
    end: int
    message: int


def _spoken(given: Given) -> list[_Part]:
    """Everything that somebody says, in order."""
    parts: list[_Part] = []
    at = 0
    for length, marked, _ in given.layout.text.runs:
        number = marked & ~GENERATED
        if number == UNKNOWN:
            message = _NOBODY
        elif number != TEMPLATE:
            message, field, _, _ = given.sources[number - 1]
            number = number if message < 0 or field in SPEECH else TEMPLATE
        if number != TEMPLATE:
            start = at
            if parts and parts[-1].message == message:
                start = parts.pop().start
            parts.append(_Part(start, at + length, message))
        at += length
    return parts


def _headers(given: Given, text: str, spoken: Sequence[_Part]) -> list[str]:
    """What stands before an answer: in general, and at the end of the prompts of the other turns."""
    found = set(given.headers)
    for message, prompt in given.prompts.items():
        if message in given.trained and text.startswith(prompt):
            since = max((part.end for part in spoken if part.end <= len(prompt)), default=0)
            for stop in given.stop.finditer(prompt, since):
                since = stop.end()
            found.add(prompt[since:])
    return sorted((header for header in found if header.strip()), key=len, reverse=True)


def _free(given: Given, text: str, spoken: Sequence[_Part]) -> Iterator[tuple[int, int]]:
    """The characters that may carry weight, as (start, end)."""
    silent = given.trained.difference([part.message for part in spoken])
    position, previous = 0, None
    for part in [*spoken, None]:
        end = part.start if part is not None else len(text)
        following = part.message if part is not None else None
        if previous in given.trained:
            yield from _after(given, text, position, end, is_last=part is None)
        # Those of whom nothing is shown have their place where their prompt ends.
        for message in sorted(silent) if silent else ():
            bound = _given_until(given, text, message, position)
            for header in given.headers if bound is None else ():
                at = text.find(header.strip(), position, end)
                if at >= 0:
                    bound = header_end(header, text, at)
                    break
            if bound is not None and position <= bound <= end:
                stop = given.stop.search(text, bound, end)
                yield bound, stop.end() if stop else end
        if part is not None:
            if following in given.trained:
                begin = _begin(given, text, part, position) if following in given.answers else part.start
                yield begin, part.end
            position, previous = part.end, following


def _after(given: Given, text: str, position: int, end: int, *, is_last: bool) -> Iterator[tuple[int, int]]:
    """What follows a trained message, up to what the next one says."""
    stop = given.stop.search(text, position, end)
    if stop:
        yield position, stop.end()
    elif is_last:  # A stop token is appended; a header that the template goes on with stays out.
        yield (
            position,
            min([end, *(at for header in given.headers if (at := text.find(header.strip(), position)) >= 0)]),
        )


def _begin(given: Given, text: str, part: _Part, position: int) -> int:
    """From where on the words before what a message says may be its own."""
    begin = position
    for stop in given.stop.finditer(text, position, part.start):
        begin = stop.end()
    prompt = given.prompts.get(part.message)
    bound = _given_until(given, text, part.message, position)
    begin = max(begin, bound if bound is not None else begin)
    if bound is None or bound < part.start:
        since = begin if prompt is not None and text.startswith(prompt) else position
        for header in given.headers:
            at = text.rfind(header.strip(), since, part.start)
            if at >= 0:
                begin = max(begin, header_end(header, text, at))
    return min(begin, part.start)


def _given_until(given: Given, text: str, message: int, position: int) -> int | None:
    """Where the text ends that the prompt of a message begins with, in whole words and marks."""
    prompt = given.prompts.get(message)
    if prompt is None:
        return None
    if text.startswith(prompt):
        return len(prompt)
    same = common_length(prompt, text)
    while same > position and not _is_border(prompt, same) and not _is_border(text, same):
        same -= 1
    return same


def _is_border(text: str, at: int) -> bool:
    """Whether a word or a mark ends before a character."""
    return (
        text[at - 1].isspace() or text[at - 1] in ">]" or (at < len(text) and (text[at].isspace() or text[at] in "<["))
    )


def _turn_of(given: Given, spoken: Sequence[_Part], at: int) -> str:
    """The trained message that a wrong weight is nearest to: the next one, or the last."""
    following = [part.message for part in spoken if part.end > at and part.message in given.trained]
    message = following[0] if following else max(given.trained)
    return f"message {message + 1}" + (" (assistant)" if message in given.answers else "")


def _owner(spoken: Sequence[_Part], at: int) -> str:
    for part in spoken:
        if part.start <= at < part.end:
            if part.message == _NOBODY:
                return "computed from the row in a way that cannot be followed"
            return f"said by message {part.message + 1}" if part.message >= 0 else "said by tools or variables"
    return "written by the template, before the turn or after it"
