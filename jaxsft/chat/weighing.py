"""Which characters are trained becomes which tokens are: the weights of many examples at once.

In: texts with their trained turns, in characters (`turns.py`), and their tokens (`control.py`). Out: `Encoded`
examples, or why one has none. A token is trained if it shares a character with a turn; tokens that share one character
(the bytes of an emoji) are trained together. The weights of every example get a last look (`invariant.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from jaxsft.batch import Example
from jaxsft.chat.control import ControlError, TextEncoder
from jaxsft.chat.extents import Tokens, Window
from jaxsft.chat.invariant import Given, check_weights, weighs_outside
from jaxsft.chat.parts import token_weights
from jaxsft.chat.starts import MaskError
from jaxsft.chat.turns import Turn

WRITERS = ("template", "system", "user", "assistant", "tool", "other")
"""Who wrote the characters of a token."""


class Encoded(NamedTuple):
    """One example with what the report says about it."""

    example: Example
    writers: np.ndarray
    """uint8 [T]: who wrote the last character of each token, an index into `WRITERS`."""
    turn_ends: np.ndarray
    """int32 [turns]: for each trained turn, the index after its stop token; ascending."""
    is_text: bool
    """Plain text, all of it trained."""
    origin: str
    """Of the row."""
    counts: dict[str, int]
    """What adds up over all examples, by name; only what is not zero."""


class Drawn(NamedTuple):
    """A text of a conversation, and what is known of each of its characters."""

    text: str
    turns: Sequence[Turn]
    is_unrolled: bool
    trust: bytes
    """Of each character, see `control.py`."""
    writers: bytes
    """Of each character: who wrote it."""
    counts: dict[str, int]
    parts: np.ndarray | None
    """float32 [len(text)]: what the weight of the turn is multiplied by, where messages weigh parts of themselves."""
    last_message: int
    """The last one that is trained, in this text or another one of the conversation."""
    free: Sequence[tuple[int, int]] | None
    """The characters that may carry weight, as (start, end), as the last look has it; None: all of them."""
    look: Callable[[], Given]
    """What the last look is told where it has to look closer."""


class _Place(NamedTuple):
    """A turn in tokens of the window."""

    first: int
    """The first token that shares a character with it."""
    begins: int
    """The first token that begins in it: the same one, or the next where that straddles."""
    stop: int
    """The first token that reaches the end of its stop token's text."""
    behind_stop: int
    """Behind the last token that begins with that text, or before it."""
    end: int
    """The first token that begins behind all of the turn."""


def _writers(window: Window, drawn: Sequence[Drawn]) -> np.ndarray:
    """Who wrote the last character of each token, uint8 [T]; of one without characters, of the one before it."""
    chars = np.frombuffer(b"\0".join([*(each.writers for each in drawn), b""]), np.uint8)
    firsts = np.repeat(np.array(window.shifts[:-1], np.int64), np.diff(window.bounds))
    return chars[np.maximum(window.ends - 1, firsts)]


def _places(window: Window, drawn: Sequence[Drawn]) -> Iterator[_Place]:
    """Of all turns, text by text."""
    chars = []
    for shift, each in zip(window.shifts, drawn, strict=False):
        for turn in each.turns:
            start, end = turn.stop or (0, 0)
            chars.append((shift + turn.start, shift + start, shift + end))
    turn_starts, stop_starts, stop_ends = np.array(chars, np.int64).reshape(-1, 3).T
    begins = window.starts.searchsorted(turn_starts)
    # A token of no characters at the start is the turn's.
    first = np.minimum(begins, window.ends.searchsorted(turn_starts, "right"))
    found = (
        first,
        begins,
        window.ends.searchsorted(stop_ends),
        window.starts.searchsorted(stop_starts, "right"),
        window.starts.searchsorted(stop_ends),
    )
    return map(_Place, *(each.tolist() for each in found))


class _Weighed(NamedTuple):
    """What became of one text in the window."""

    turn_ends: list[int]
    """In tokens of the text."""
    counts: dict[str, int]
    appended: Turn | None
    """The last turn, where it lacks a stop token."""


class Weigher:
    """Weighs examples for one tokenizer and one set of options; picklable."""

    def __init__(
        self,
        *,
        stops: Sequence[int],
        stop_texts: Sequence[str],
        closing: str,
        every_stop: bool,
        text_encoder: TextEncoder,
        tokenizer_name: str,
        template_name: str,
    ) -> None:
        """
        Args:
            stops: ids that end an answer.
            stop_texts: how they are written.
            closing: what the template writes after every answer.
            every_stop: the stop token of every turn is trained, not only that of the last.
            text_encoder: knows which ids there are.
            tokenizer_name: for errors.
            template_name: likewise.
        """
        self._stops, self._stop_texts, self._closing = np.array(stops, np.int64), list(stop_texts), closing
        self._every_stop, self._text_encoder = every_stop, text_encoder
        self._tokenizer_name, self._template_name = tokenizer_name, template_name
        self._stop_ids = frozenset(map(int, stops))

    def is_stop(self, ids: np.ndarray) -> np.ndarray:
        """Which ids end an answer, bool like `ids`."""
        return np.isin(ids, self._stops)

    def check_ids(self, ids: np.ndarray) -> None:
        """Refuses ids that the tokenizer does not have."""
        if not self._text_encoder.knows(ids):
            size = self._text_encoder.vocabulary_size
            bad = int(ids[(ids < 0) | (ids >= size)][0])
            raise MaskError(f"token {bad} is not one of the {size} of {self._tokenizer_name}", "unknown-token")

    def weigh(
        self, origins: Sequence[str], drawn: Sequence[Drawn], window: Window, errors: Mapping[int, ControlError]
    ) -> list[Encoded | MaskError]:
        """The example of each text with its tokens, or why there is none.

        Args:
            origins: those of the rows.
            drawn: the texts.
            window: their tokens.
            errors: by text, why its tokens are of no use.
        """
        weights, writers = np.zeros(len(window.ids), np.float32), _writers(window, drawn)
        places = _places(window, drawn)
        are_known = self._text_encoder.knows(window.ids)
        known: list[_Weighed | MaskError] = []
        for at, each in enumerate(drawn):
            some = list(islice(places, len(each.turns)))
            try:
                if at in errors:
                    raise MaskError(str(errors[at]), "control-token")
                if not are_known:
                    self.check_ids(window.of(at).ids)
                known.append(self._weighed(window, weights, at, each, some))
            except MaskError as error:
                known.append(error)
        # The last look, at all examples at once; where it finds anything, at that one by itself.
        free = [
            (shift + a, shift + b)
            for shift, each in zip(window.shifts, drawn, strict=False)
            for a, b in each.free or ()
        ]
        wrong = np.flatnonzero(weighs_outside(free, window.starts, window.ends, weights))
        suspects = set((np.searchsorted(window.bounds, wrong, "right") - 1).tolist())
        results: list[Encoded | MaskError] = []
        for at, (origin, each, weighed) in enumerate(zip(origins, drawn, known, strict=True)):
            if isinstance(weighed, MaskError):
                results.append(weighed)
                continue
            span = slice(window.bounds[at], window.bounds[at + 1])
            example, own = Example(window.ids[span], weights[span]), writers[span]
            try:
                if weighed.appended is not None:
                    example, own = self._with_stop(each, weighed, window.of(at), example, own)
                if (at in suspects or weighed.appended is not None) and each.free is not None:
                    tokens = window.of(at)
                    count = min(len(own), len(tokens.starts))
                    extents = tokens.starts[:count], tokens.ends[:count]
                    check_weights(each.look(), *extents, example.loss_weights[:count], name=self._template_name)
            except MaskError as error:
                results.append(error)
                continue
            ends = np.array(weighed.turn_ends, np.int32)
            results.append(Encoded(example, own, ends, False, origin, weighed.counts))
        return results

    def _weighed(
        self, window: Window, weights: np.ndarray, at: int, drawn: Drawn, places: Sequence[_Place]
    ) -> _Weighed:
        """Sets the weights of one text in those of the window."""
        begin, stop = window.bounds[at], window.bounds[at + 1]
        shift = window.shifts[at]
        of_parts = greatest = None
        if drawn.parts is not None:
            tokens = window.of(at)
            of_parts, greatest = token_weights(drawn.parts, tokens.starts, tokens.ends)
        counts = drawn.counts | {"split_control_tokens": window.splits.get(at, 0)}
        if drawn.is_unrolled:
            counts["unrolled_examples"] = 1
        turn_ends, appended = [], None
        for turn, place in zip(drawn.turns, places, strict=True):
            last = self._last_token(window, drawn, turn, place)
            has_stop = last is not None and turn.stop is not None and turn.stop[0] < turn.stop[1]
            end = stop if last is None else last + 1
            appended = turn if last is None else appended
            spans = [(place.first, end)]
            if turn.seen_only:
                spans = _without(spans, window, [(shift + start, shift + end) for start, end in turn.seen_only])
            if of_parts is None or greatest is None:
                for first, behind in spans:
                    weights[first:behind] = turn.weight
            else:
                inside = np.concatenate([np.arange(first, behind) for first, behind in spans] or [_NONE])
                factors = of_parts[inside - begin]
                weights[inside] = turn.weight * factors
                if turn.found_by != "all":
                    self._check_parts(turn, factors, has_end=last is not None)
                    if has_stop:
                        weights[last] = turn.weight  # It is the turn's, and of none of its parts.
                    straddling = int(np.sum(factors < greatest[inside - begin]))
                    counts["straddling_parts"] = counts.get("straddling_parts", 0) + straddling
            if has_stop and not (self._every_stop or turn.message == drawn.last_message):
                weights[last] = 0
            if place.first < place.begins:
                straddling = sum([max(0, min(place.begins, behind) - first) for first, behind in spans])
                counts["straddling_tokens"] = counts.get("straddling_tokens", 0) + straddling
            name = f"turns_by_{turn.found_by}"
            counts[name] = counts.get(name, 0) + 1
            turn_ends.append(end - begin)
        if drawn.turns[0].found_by == "all":
            weights[begin:stop] = drawn.turns[0].weight * (1 if of_parts is None else of_parts)
        if appended is not None:
            counts["appended_stops"] = 1
        return _Weighed(turn_ends, {name: count for name, count in counts.items() if count}, appended)

    def _last_token(self, window: Window, drawn: Drawn, turn: Turn, place: _Place) -> int | None:
        """The last trained token of a turn, its stop token; None where that must be appended."""
        if turn.stop is None:
            layout = drawn.look().layout
            if turn is not drawn.turns[-1] or layout.next_other(turn.content_end, turn.message) < len(drawn.text):
                raise MaskError(
                    f"message {turn.message + 1}: no stop token follows it, and other messages do", "no-stop"
                )
            if not len(self._stops):
                raise MaskError("there is no stop token, so the model would never learn to stop", "no-stop")
            return None
        start, end = turn.stop
        if start == end:  # Of another role, and not ended by one.
            return place.end - 1
        for at in range(place.stop, place.behind_stop):
            if int(window.ids[at]) in self._stop_ids:
                return at
        raise MaskError(
            f"message {turn.message + 1}: the stop token {drawn.text[start:end]!r} that follows it is not one token "
            f"of {self._tokenizer_name or 'the tokenizer'}",
            "no-stop",
        )

    def _check_parts(self, turn: Turn, factors: np.ndarray, *, has_end: bool) -> None:
        """Of a turn with parts, something is trained before its stop token."""
        said = factors[: len(factors) - has_end]
        if len(said) and not said.any():
            raise MaskError(
                f"message {turn.message + 1}: {self._template_name} shows nothing of the parts that are to be trained, "
                "or no token lies in them alone",
                "field-absent",
            )

    def _with_stop(
        self, drawn: Drawn, weighed: _Weighed, tokens: Tokens, example: Example, writers: np.ndarray
    ) -> tuple[Example, np.ndarray]:
        """An example with its writers, behind whose last turn a stop token is appended."""
        turn, (ids, weights) = weighed.appended, example
        assert turn is not None
        after = drawn.text[turn.content_end :]
        is_said = turn.found_by != "all" and drawn.look().layout.ends_with(turn.message) == "content"
        if after.strip() and is_said:
            # Words after an answer, but for those that close it, are not the model's: the stop token goes before.
            closing = self._closing if after.startswith(self._closing) else ""
            kept = int(np.searchsorted(tokens.starts, turn.content_end + len(closing)))
            ids, weights, writers = ids[:kept], weights[:kept], writers[:kept]
            weighed.turn_ends[-1] = kept
        stop = dict(zip(self._stop_texts, self._stops, strict=True)).get(turn.appended or "", self._stops[0])
        is_trained = self._every_stop or turn.message == drawn.last_message
        weighed.turn_ends[-1] += 1
        weight = np.float32(turn.weight if is_trained else 0)
        example = Example(np.append(ids, np.int32(stop)), np.append(weights, weight))
        return example, np.append(writers, np.uint8(0))


_NONE = np.zeros(0, np.int64)


def _without(
    spans: list[tuple[int, int]], window: Window, seen_only: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Spans of tokens without those that lie in some characters of the window altogether."""
    for start, end in seen_only:
        first, behind = int(window.starts.searchsorted(start)), int(window.ends.searchsorted(end, "right"))
        if first < behind:
            spans = [part for a, b in spans for part in ((a, min(b, first)), (max(a, behind), b)) if part[0] < part[1]]
    return spans
