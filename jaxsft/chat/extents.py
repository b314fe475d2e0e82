"""Texts to tokens, each with the characters that it stands for; nothing is added, nothing split.

In: a fast tokenizer and texts. Out: `Tokens`. A tokenizer says the place of every token, but in pairs of Python
numbers, which take longer to make than all else around it. A byte-level one writes its tokens in bytes, and where these
spell the very bytes of the text, which is compared for every text, the places follow from their lengths:

    "né!"   bytes 6e c3a9 21    tokens 6e c3 | a9 | 21    characters (0, 2) (1, 2) (2, 3)

Of all other tokenizers, and of texts that one does not spell (changed by Unicode's normal form, or with blanks that a
control token swallows), the tokenizer is asked for the places.
"""

import json
from array import array
from collections.abc import Sequence
from itertools import chain
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


class Reader:
    """Tokenises texts as they are; picklable."""

    def __init__(self, backend: Any) -> None:
        """`backend` is the Rust tokenizer of a fast transformers tokenizer."""
        self._backend = backend
        self._spelling = _Spelling(backend) if _is_byte_level(backend) else None

    def read(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of whole texts, nothing added to them."""
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()
        if self._spelling is None:
            return self._asked(texts)
        found, raws, spelt, unspelt = [], [], [], []
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        for at, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            ids, raw = encoding.ids, text.encode()
            if b"".join(map(self._spelling.__getitem__, ids)) == raw:
                found.append(array("i", ids))
                raws.append(raw)
                spelt.append(at)
            else:
                unspelt.append(at)
        results: list[Any] = [None] * len(texts)
        for at, tokens in zip(spelt, self._placed(found, raws), strict=True):
            results[at] = tokens
        if unspelt:
            for at, tokens in zip(unspelt, self._asked([texts[at] for at in unspelt]), strict=True):
                results[at] = tokens
        return results

    def _placed(self, found: Sequence[array], raws: Sequence[bytes]) -> list[Tokens]:
        """Tokens of texts that they spell byte for byte; `raws` are the texts in UTF-8."""
        assert self._spelling is not None
        counts = np.array([len(ids) for ids in found], np.int64)
        ids = np.frombuffer(bytearray().join(found), np.int32)
        ends = np.cumsum(self._spelling.lengths[ids])
        starts = ends - self._spelling.lengths[ids]
        whole = b"".join(raws)
        if not whole.isascii():
            # Characters that begin before each byte: a token may begin or end inside of one.
            begins = (np.frombuffer(whole, np.uint8) & 0xC0) != 0x80
            before = np.concatenate([[0], np.cumsum(begins)])
            starts, ends = before[starts + 1] - 1, before[ends]
        bounds = [0, *np.cumsum(counts).tolist()]
        results, shift = [], 0
        for begin, end in zip(bounds, bounds[1:], strict=False):
            span = slice(begin, end)
            results.append(Tokens(ids[span], starts[span] - shift, ends[span] - shift, 0))
            shift = int(ends[end - 1]) if end else 0
        return results

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


class _Spelling(dict[int, bytes]):
    """The bytes that each token stands for; of those that were asked for, since a vocabulary is large."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self._backend = backend
        self._added = {id: token.content for id, token in backend.get_added_tokens_decoder().items()}
        self.lengths = np.zeros(2**16, np.int64)
        """Of these bytes, by id; of those that were asked for."""

    def __missing__(self, id: int) -> bytes:
        if id in self._added:
            piece = self._added[id].encode()
        else:
            token = self._backend.id_to_token(id) or ""
            # What is no byte of any text makes the comparison fail.
            piece = bytes([_BYTES.get(char, 0xFF) for char in token]) or b"\xff"
        self[id] = piece
        if id >= len(self.lengths):
            self.lengths = np.resize(self.lengths, 2 * id)
        self.lengths[id] = len(piece)
        return piece

    def __reduce__(self) -> Any:
        return _Spelling, (self._backend,)


def _byte_names() -> dict[str, int]:
    """The character by which byte-level vocabularies write each byte, as GPT-2's does."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


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
