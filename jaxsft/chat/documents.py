"""Rows that are no conversations become examples: plain texts, texts with trained parts, and tokens.

In: `Document`s and `Tokenised` rows (`rows/items.py`). Out: `Encoded` examples, or why one has none. No chat template
is used, and whatever control tokens a text spells act as such: it may be a conversation that was rendered before.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsft.batch import Example
from jaxsft.chat.control import TRUSTED, TextEncoder, Tokenizer
from jaxsft.chat.starts import MaskError
from jaxsft.chat.weighing import WRITERS, Encoded, Weigher
from jaxsft.rows.items import Document, Tokenised


class Documents:
    """Documents and tokenised rows to examples, for one tokenizer; picklable."""

    def __init__(self, tokenizer: Tokenizer, text_encoder: TextEncoder, weigher: Weigher) -> None:
        """The last two are those of conversations with the same tokenizer."""
        self._tokenizer, self._text_encoder, self._weigher = tokenizer, text_encoder, weigher
        self._around: tuple[list[int], list[int]] | None = None

    def encode(self, items: Sequence[Document | Tokenised]) -> list[Encoded | MaskError]:
        """The example of each, or why it has none."""
        texts = [item.text for item in items if isinstance(item, Document) and item.trained is None]
        read = iter(self._tokenizer(texts, **_BARE)["input_ids"] if texts else [])
        results: list[Encoded | MaskError] = []
        for item in items:
            try:
                if isinstance(item, Tokenised):
                    results.append(self._tokenised(item))
                elif item.trained is None:
                    results.append(self._whole(item, next(read)))
                else:
                    results.append(self._segmented(item, item.trained))
            except MaskError as error:
                results.append(error)
        return results

    def _whole(self, document: Document, ids: list[int]) -> Encoded:
        """All of a text is trained."""
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise MaskError(
                f"the tokenizer {self._tokenizer.name_or_path} has no eos token, so a text would have no end", "no-stop"
            )
        ids = self._enclosed(ids)
        tokens = np.array(ids if ids[-1:] == [eos] else [*ids, eos], np.int32)
        self._weigher.check_ids(tokens)
        control = int(self._text_encoder.is_control(tokens[1:-1]).sum())
        weights = np.full(len(tokens), document.weight, np.float32)
        counts = {"control_tokens_in_text": control}
        return _encoded(tokens, weights, [len(tokens)], document.origin, counts, is_text=True)

    def _enclosed(self, ids: list[int]) -> list[int]:
        """Tokens with what the tokenizer writes around a text, such as BOS, unless the text has that already."""
        if self._around is None:
            bare = self._tokenizer("a", **_BARE)["input_ids"]
            whole = self._tokenizer("a", **_BARE | {"add_special_tokens": True})["input_ids"]
            at = next((at for at in range(len(whole)) if bare and whole[at : at + len(bare)] == bare), 0)
            self._around = whole[:at], whole[at + len(bare) :]
        before, after = self._around
        has_before = has_after = False
        if before and before[0] in ids:
            at = ids.index(before[0])  # Blanks may precede it.
            has_before = ids[at : at + len(before)] == before and not self._tokenizer.decode(ids[:at]).strip()
        if after:
            has_after = ids[-len(after) :] == after
        return [*([] if has_before else before), *ids, *([] if has_after else after)]

    def _segmented(self, document: Document, trained: Sequence[tuple[int, int]]) -> Encoded:
        """Text with parts that are trained, as it stands: what begins and ends a turn is in it."""
        tokens = self._text_encoder.encode(document.text, bytes([TRUSTED]) * len(document.text))
        weights, ends, straddling = np.zeros(len(tokens.ids), np.float32), [], 0
        for start, end in trained:
            inside = (tokens.ends > start) & (tokens.starts < end)
            if inside.any():  # Some tokenizers have no token for some characters.
                weights[inside] = document.weight
                straddling += int(np.sum(inside & ((tokens.starts < start) | (tokens.ends > end))))
                ends.append(int(np.nonzero(inside)[0][-1]) + 1)
        if not ends:
            raise MaskError("no token of the trained segments is left", "nothing-trained")
        counts = {
            "straddling_tokens": straddling,
            "tokenised_without_stop": int(not self._weigher.is_stop(tokens.ids[ends[-1] - 1])),
        }
        return _encoded(tokens.ids, weights, sorted(set(ends)), document.origin, counts)

    def _tokenised(self, item: Tokenised) -> Encoded:
        """Tokens as the row has them; that a trained part of them ends without a stop token is counted."""
        tokens, weights = np.array(item.tokens, np.int32), np.array(item.loss_weights, np.float32)
        self._weigher.check_ids(tokens)
        trained = weights > 0
        is_end = trained & ~np.append(trained[1:], False)
        counts = {"tokenised_without_stop": int((is_end & ~self._weigher.is_stop(tokens)).any())}
        return _encoded(tokens, weights, np.nonzero(is_end)[0] + 1, item.origin, counts)


_BARE: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}


def _encoded(
    tokens: np.ndarray,
    weights: np.ndarray,
    ends: Sequence[int] | np.ndarray,
    origin: str,
    counts: dict[str, int],
    *,
    is_text: bool = False,
) -> Encoded:
    """An example of which nobody says who wrote it."""
    writers = np.full(len(tokens), WRITERS.index("other"), np.uint8)
    some = {name: count for name, count in counts.items() if count}
    return Encoded(Example(tokens, weights), writers, np.array(ends, np.int32), is_text, origin, some)
