"""Tokens as text that the eye can take in.

In: tokens, weights and writers of an example. Out: pieces of text that join to the text of all, and the stretches that
a template adds on its own. Text of the data never acts: see `visible`.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxsft.chat.control import Tokenizer
from jaxsft.chat.encoder import WRITERS


class Piece(NamedTuple):
    """A token as text, or the few tokens that hold the bytes of one character."""

    text: str
    """As it is in the data, newlines and all."""
    tokens: tuple[int, ...]
    position: int
    """Of its first token in the example."""
    weight: float
    """Weight as a target; 0 is context."""
    writer: str
    """Who wrote it, one of `chat.encoder.WRITERS`."""
    is_special: bool
    """A token that no text spells, such as `<|im_start|>`."""
    is_stop: bool
    """Ends an answer, and is trained to."""


class Injection(NamedTuple):
    """Text of the template that is more than markup, such as a system text that no row holds."""

    position: int
    """Of its first token."""
    num_tokens: int
    text: str
    is_system: bool
    """It stands before anything that a user or the assistant says."""


def make_pieces(
    tokens: Sequence[int],
    weights: Sequence[float],
    writers: Sequence[int],
    tokenizer: Tokenizer,
    *,
    stops: Sequence[int],
    start: int = 0,
) -> tuple[Piece, ...]:
    """Tokens as pieces of text that join to the text of all.

    The bytes of one character, such as those of an emoji, are one piece of several tokens. Should they differ in
    weight, each is a piece of its own, and shown as `⟨🦊 1/4⟩`.

    Args:
        tokens: of an example, all of them.
        weights: of each token.
        writers: of each token, indices into `WRITERS`.
        tokenizer: that made them.
        stops: what `stops.stop_ids` says.
        start: the tokens before this one are not shown.
    """
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip(" ▁\t\r\n")}
    pieces: list[Piece] = []
    at = context = max(start - 1, 0)  # A blank may depend on the token before it.
    for text, size in _texts(tokens[context:], tokenizer, special):
        ids = tuple(tokens[at : at + size])
        writer = WRITERS[writers[at + size - 1]]
        stop = size == 1 and ids[0] in stops and weights[at] > 0
        if len(set(weights[at : at + size])) == 1:
            pieces.append(Piece(text, ids, at, weights[at], writer, ids[0] in special, stop))
        else:
            for part, id in enumerate(ids):
                name = f"⟨{text} {part + 1}/{size}⟩"
                pieces.append(Piece(name, (id,), at + part, weights[at + part], writer, False, False))
        at += size
    return tuple(piece for piece in pieces if piece.position >= start)


_LONGEST_CHARACTER = 8
"""Tokens that are joined at most until their bytes are text; else they never will be."""


def _texts(tokens: Sequence[int], tokenizer: Tokenizer, special: set[int]) -> Iterable[tuple[str, int]]:
    """Text and number of tokens of each piece; decoded after the piece before it, since a blank depends on that."""

    def decode(start: int, end: int) -> str:
        return tokenizer.decode(tokens[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    context = done = 0
    pending = ""
    for end in range(1, len(tokens) + 1):
        if tokens[end - 1] in special:
            text = tokenizer.added_tokens_decoder[tokens[end - 1]].content
        else:
            before, after = decode(context, done), decode(context, end)
            text = after[len(before) :] if after.startswith(before) else decode(done, end)
            can_grow = end < len(tokens) and tokens[end] not in special and end - done < _LONGEST_CHARACTER
            if text.endswith("\N{REPLACEMENT CHARACTER}") and can_grow:
                pending = text
                continue
            if pending and text.startswith(pending):
                # Further tokens did not complete a character: the replacement sign is text itself, or stands for bytes
                # that are no text.
                yield pending, end - 1 - done
                text, done = text[len(pending) :], end - 1
        yield text, end - done
        context, done, pending = done, end, ""


NUM_WORDS = 4
"""Fewer words of the template in a row are markup: a role's name, `### Response:`, `[INST]`."""

_WORD = re.compile(r"[\u3040-\u9fff\uac00-\ud7af]{2}|[^\W\u3040-\u9fff\uac00-\ud7af]+")
_HEADERS = ("", "system", "developer", "user", "assistant", "model", "tool")
_TAG = re.compile(r"<[^<>\n]{1,40}>")


def injections(pieces: Sequence[Piece], tokenizer: Tokenizer) -> tuple[Injection, ...]:
    """Stretches of the template's own text, between control tokens and text of the data, of several words.

    `<|im_start|>system\\nYou are a helpful assistant.<|im_end|>` before the first user's text is such a one.
    """
    control = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    found: list[Injection] = []
    run: list[Piece] = []
    is_system = True

    def close() -> None:
        while run and run[0].text.strip() in _HEADERS:  # Words that name whose text follows are markup.
            del run[0]
        text = "".join(piece.text for piece in run)
        if len(_WORD.findall(_TAG.sub(" ", text))) >= NUM_WORDS and not all(piece.weight for piece in run):
            found.append(Injection(run[0].position, _end(run[-1]) - run[0].position, text, is_system))
        run.clear()

    for piece in pieces:
        is_text = piece.writer == "template" and not control.intersection(piece.tokens)
        if run and (not is_text or piece.position != _end(run[-1])):
            close()
        if is_text:
            run.append(piece)
        is_system &= piece.writer not in ("user", "assistant")
    close()
    return tuple(found)


def quoted(injection: Injection) -> str:
    """The words of it, on one line."""
    return re.sub(r"^[^\w<{]+", "", " ".join(injection.text.split()))


def _end(piece: Piece) -> int:
    return piece.position + len(piece.tokens)


def visible(text: str) -> str:
    """Characters that would act instead of being seen (escapes, bidirectional overrides) as `<U+001B>`."""
    return "".join(f"<U+{ord(char):04X}>" if _acts(char) else char for char in text)


def _acts(char: str) -> bool:
    kind = unicodedata.category(char)
    return (
        (kind in ("Cc", "Zl", "Zp") and char not in "\n\t")
        or char in "\u00ad\u200b\u200e\u200f\u2060\ufeff"
        or (kind == "Cf" and ("\u202a" <= char <= "\u202e" or "\u2066" <= char <= "\u2069"))
        or "\U000e0000" <= char <= "\U000e007f"  # tags: text that only a machine reads
    )
