"""Texts to tokens, each with the characters that it stands for; nothing is added, nothing split.

In: a fast tokenizer and texts. Out: `Tokens`. A tokenizer says the place of every token, but in pairs of Python
numbers, which take longer to make than all else around it. A byte-level one writes its tokens in bytes, and where these
spell the very bytes of the text, which is compared for every text, the places follow from their lengths:

    "né!"   bytes 6e c3a9 21    tokens 6e c3 | a9 | 21    characters (0, 2) (1, 2) (2, 3)

Of all other tokenizers, and of texts that one does not spell (changed by Unicode's normal form, or with blanks that a
control token swallows), the tokenizer is asked for the places.
"""

import itertools
import json
import operator
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np


class Tokens(NamedTuple):
    """A tokenised text."""

    ids: np.ndarray
    """int32 [T]"""
    starts: np.ndarray
    """int64 [T]: first character of each token."""
    ends: np.ndarray
    """int64 [T]: behind its last character."""
    num_split: int
    """Control tokens that the data spelt, and that were made ordinary text of."""


class Window(NamedTuple):
    """The tokens of many texts, which lie one behind the other, a character apart, so that no token of one touches the
    next, and numpy finds the tokens of all places at once:

        text   0 . . . . . . _ 7 . . . . _        "_" belongs to no token
        place 2 of the second text is 9 of the window
    """

    ids: np.ndarray
    """int32 [T]"""
    starts: np.ndarray
    """int64 [T]: first character of each token, in the window."""
    ends: np.ndarray
    """int64 [T]"""
    bounds: list[int]
    """Text i has the tokens from `bounds[i]` to `bounds[i + 1]`."""
    shifts: list[int]
    """Where in the window each text begins, and where another one would."""
    splits: dict[int, int]
    """By text, control tokens that were made ordinary text of, where there are any."""

    def of(self, at: int) -> Tokens:
        """The tokens of one text, in its own characters."""
        span = slice(self.bounds[at], self.bounds[at + 1])
        shift = self.shifts[at]
        return Tokens(self.ids[span], self.starts[span] - shift, self.ends[span] - shift, self.splits.get(at, 0))

    def replaced(self, others: Mapping[int, Tokens]) -> "Window":
        """The same with other tokens of some texts."""
        texts = range(len(self.shifts) - 1)
        return window_of([others[at] if at in others else self.of(at) for at in texts], self.shifts) if others else self


def window_of(tokens: Sequence[Tokens], shifts: list[int]) -> Window:
    """A window of texts that were tokenised one by one; `shifts` as it has them."""
    counts = [len(each.ids) for each in tokens]
    shift = np.repeat(np.array(shifts[:-1], np.int64), counts)
    ids, starts, ends = (
        np.concatenate([np.zeros(0, dtype), *(each[at] for each in tokens)])
        for at, dtype in enumerate((np.int32, np.int64, np.int64))
    )
    splits = {at: each.num_split for at, each in enumerate(tokens) if each.num_split}
    return Window(ids, starts + shift, ends + shift, [0, *accumulate(counts)], shifts, splits)


class Reader:
    """Tokenises texts as they are; picklable."""

    def __init__(self, backend: Any) -> None:
        """`backend` is the Rust tokenizer of a fast transformers tokenizer."""
        self._backend = backend
        self._spelling = _Spelling(backend) if _is_byte_level(backend) else None

    def read(self, texts: Sequence[str]) -> Window:
        """Tokens of whole texts, nothing added to them."""
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()
        shifts = [0, *accumulate(len(text) + 1 for text in texts)]
        if self._spelling is None:
            return window_of(self._asked(texts), shifts)
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        bounds = [0, *accumulate(map(len, encodings))]
        found = chain.from_iterable(map(operator.attrgetter("ids"), encodings))
        ids = np.fromiter(found, np.int32, bounds[-1])
        spelt, starts, ends = self._spelling.spelt(ids)
        # Where all together are the same bytes, and each text as many as its tokens, each text is spelt.
        raws = [text.encode() for text in texts]
        reached = np.append(np.int64(0), ends)[bounds]
        is_spelt = np.diff(reached) == np.fromiter(map(len, raws), np.int64, len(raws))
        if not is_spelt.all() or spelt != b"".join(raws):
            pairs = zip(raws, itertools.pairwise(reached.tolist()), strict=True)
            is_spelt = np.array([spelt[begin:end] == raw for raw, (begin, end) in pairs])
        if not spelt.isascii():
            # Characters that begin before each byte: a token may begin or end inside of one.
            begins = (np.frombuffer(spelt, np.uint8) & 0xC0) != 0x80
            before = np.append(0, np.cumsum(begins))
            starts, ends, reached = before[starts + 1] - 1, before[ends], before[reached]
        shift = np.repeat(np.array(shifts[:-1], np.int64) - reached[:-1], np.diff(bounds))
        window = Window(ids, starts + shift, ends + shift, bounds, shifts, {})
        unspelt = np.flatnonzero(~is_spelt).tolist()
        asked = self._asked([texts[at] for at in unspelt]) if unspelt else []
        return window.replaced(dict(zip(unspelt, asked, strict=True)))

    def _asked(self, texts: Sequence[str]) -> list[Tokens]:
        """The same by the places that the tokenizer gives."""
        results = []
        for encoding in self._backend.encode_batch(texts, add_special_tokens=False):
            starts, ends = _extents(encoding.offsets)
            results.append(Tokens(np.array(encoding.ids, np.int32), starts, ends, 0))
        return results


def _extents(offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """First and last character of each token, int64 [T] each, so that the tokens tile the text.

    Some tokenizers (`trim_offsets`) leave the whitespace at a token's start out of its offsets. It is what no token
    before it covers, so each token is made to begin where the ones before it end at the latest:

        "a\\n b" as tokens "a", "\\n", " b" has offsets (0, 1) (2, 2) (3, 4) and extents (0, 1) (1, 2) (2, 4)
    """
    if not offsets:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    # In half the time of np.array of the pairs.
    flat = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets))
    starts, ends = flat[::2], flat[1::2].copy()
    covered = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]])
    return np.minimum(starts, covered), ends


class _Spelling:
    """The bytes that each token stands for; of those that were asked for, since a vocabulary is large."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._added = {id: token.content for id, token in backend.get_added_tokens_decoder().items()}
        self._bytes = np.zeros(0, np.uint8)
        """Of all of them, one behind the other."""
        self._firsts = np.zeros(2**16, np.int32)
        """By id, where its bytes begin."""
        self._lengths = np.zeros(2**16, np.int64)
        """By id, how many they are; 0 of those that were not asked for yet."""

    def spelt(self, ids: np.ndarray) -> tuple[bytes, np.ndarray, np.ndarray]:
        """What tokens spell together; and the first byte of each and the end of its bytes, int64 [T] each."""
        if len(ids) and (most := int(ids.max())) >= len(self._lengths):
            self._firsts, self._lengths = (
                np.append(each, np.zeros(most, each.dtype)) for each in (self._firsts, self._lengths)
            )
        lengths = self._lengths[ids]
        if not lengths.all():
            self._learn(list(set(ids[lengths == 0].tolist())))
            lengths = self._lengths[ids]
        ends = np.cumsum(lengths)
        starts = ends - lengths
        places = np.repeat(self._firsts[ids] - starts, lengths)
        places += np.arange(len(places))
        return self._bytes[places].tobytes(), starts, ends

    def _learn(self, ids: list[int]) -> None:
        pieces = [self._piece(id) for id in ids]
        lengths = np.array([len(piece) for piece in pieces])
        self._firsts[ids], self._lengths[ids] = len(self._bytes) + np.cumsum(lengths) - lengths, lengths
        self._bytes = np.frombuffer(self._bytes.tobytes() + b"".join(pieces), np.uint8)

    def _piece(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].encode() or _NO_TEXT
        try:
            return (self._backend.id_to_token(id) or "").translate(_BYTES).encode("latin-1") or _NO_TEXT
        except UnicodeEncodeError:
            return _NO_TEXT

    def __reduce__(self) -> Any:
        return _Spelling, (self._backend,)


_NO_TEXT = b"\xff"
"""No byte of any text: it makes the comparison fail."""


def _byte_names() -> dict[int, int]:
    """By the character by which byte-level vocabularies write it, as GPT-2's does, each byte; 0xFF by all others."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in shown]
    return {byte: byte if byte in shown else 0xFF for byte in range(0x100)} | {
        0x100 + at: byte for at, byte in enumerate(others)
    }


_BYTES = _byte_names()


def _is_byte_level(backend: Any) -> bool:
    """Whether tokens are written in bytes, and their places are not trimmed afterwards."""
    model = backend.model
    if type(model).__name__ != "BPE" or model.byte_fallback:
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix or model.dropout:
        return False
    try:
        splits, places = (_parts(part) for part in (backend.pre_tokenizer, backend.post_processor))
    except Exception:  # One that is written in Python cannot be shown.
        return False
    is_last = bool(splits) and splits[-1]["type"] == "ByteLevel"
    return is_last and not any(part.get("trim_offsets") for part in places)


def _parts(component: Any) -> list[dict[str, Any]]:
    """A part of a tokenizer as the JSON that describes it; a sequence as what it consists of."""

    def flat(part: dict[str, Any]) -> list[dict[str, Any]]:
        if part["type"] != "Sequence":
            return [part]
        return [each for inner in part.get("pretokenizers") or part.get("processors") or [] for each in flat(inner)]

    return [] if component is None else flat(json.loads(component.__getstate__()))
