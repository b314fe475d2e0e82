"""Text to tokens, in which text of the data never acts as a control token.

A tokenizer takes `<|im_end|>` for the end of a turn wherever it stands, also where a user has typed it. Here every
character comes with the trust it is due (the template, the assistant, or anybody else), and a control token counts only
where the template wrote all of it. Text that merely spells one becomes ordinary tokens: a second tokenizer, made from
the first, knows every control token under a name that no text holds, and the template's own are given those names
before it reads. Names are as long as what they stand for, so characters keep their places.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsft.chat.extents import Reader, Tokens, Window
from jaxsft.rows.sources import DataError

Tokenizer = Any  # A fast transformers tokenizer; transformers is too slow to import for a type.

TRUSTED, ASSISTANT, UNTRUSTED = 0, 1, 2
"""Of a character: any control token may be made of it; only one that is neither special nor a stop token; none."""


def control_tokens(tokenizer: Tokenizer) -> dict[int, Any]:
    """The tokens of a tokenizer that may control something, special or not, by id; transformers' records of them."""
    # Runs of whitespace are added tokens of some tokenizers (Gemma, GPT-NeoX); they control nothing.
    return {int(id): each for id, each in tokenizer.added_tokens_decoder.items() if each.content.strip(" ▁\t\r\n")}


Place = tuple[int, int, int]
"""A control token in a text: its id, its first character, and the end."""


class ControlError(DataError):
    """Text of the data spells a control token."""


class TextEncoder:
    """Tokenises rendered texts; picklable."""

    def __init__(self, tokenizer: Tokenizer, *, stops: Sequence[int], policy: str) -> None:
        """
        Args:
            tokenizer: a fast one.
            stops: ids that end an answer; the assistant may not write them either.
            policy: what becomes of text that spells a control token: "split", "error" or "allow".
        """
        self._backend, self._policy = tokenizer.backend_tokenizer, policy
        self._reader = Reader(self._backend)
        added = control_tokens(tokenizer)
        self._contents = {id: each.content for id, each in added.items()}
        self._soft = {id for id, each in added.items() if not each.special and id not in stops}
        # By id; the last one stands for all ids above.
        self._is_control = np.zeros(max([*added, -1]) + 2, bool)
        self._is_control[list(added)] = True
        self._inert: _Inert | None = None

    @functools.cached_property
    def vocabulary_size(self) -> int:
        """One more than the largest id."""
        return max([*self._backend.get_vocab().values(), 0]) + 1

    def knows(self, ids: np.ndarray) -> bool:
        """Whether all ids are below `vocabulary_size`, and none below 0."""
        if not len(ids):
            return True
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0:
            return False
        # To go through the whole vocabulary takes longer than to tokenise a hundred rows.
        return self._backend.id_to_token(largest) is not None or largest < self.vocabulary_size

    def is_control(self, ids: np.ndarray) -> np.ndarray:
        """Which ids are control tokens, bool like `ids`."""
        return self._is_control[np.minimum(ids, len(self._is_control) - 1)]

    def encode(self, text: str, trust: bytes) -> Tokens:
        """A text with the trust of its characters, a byte for each, to tokens.

        Raises:
            ControlError: the text spells a control token that it may not.
        """
        window, errors = self.encode_all([text], [trust])
        for error in errors.values():
            raise error
        return window.of(0)

    def encode_all(self, texts: Sequence[str], trusts: Sequence[bytes]) -> tuple[Window, dict[int, ControlError]]:
        """The same of many texts at once; and by text, the errors. Tokens of such a text are there, and of no use."""
        texts = [str.__str__(text) for text in texts]  # Whatever else they know, here only their characters count.
        window = self._reader.read(texts)
        suspects = self._suspects(window, trusts) if self._policy != "allow" else ()
        checked = {at: self._checked(texts[at], trusts[at], window.of(at)) for at in suspects}
        errors = {at: each for at, each in checked.items() if isinstance(each, ControlError)}
        split = {at: each for at, each in checked.items() if isinstance(each, Tokens) and each.num_split}
        return window.replaced(split), errors

    def _suspects(self, window: Window, trusts: Sequence[bytes]) -> list[int]:
        """The texts of which a control token has a character that the template did not write."""
        (places,) = self.is_control(window.ids).nonzero()
        are_foreign = np.frombuffer(b"\0".join([*trusts, b""]), np.uint8) > TRUSTED
        num_foreign = np.append(0, np.cumsum(are_foreign))
        wrong = places[num_foreign[window.ends[places]] > num_foreign[window.starts[places]]]
        return sorted(set((np.searchsorted(window.bounds, wrong, "right") - 1).tolist()))

    def _checked(self, text: str, trust: bytes, tokens: Any) -> Tokens | ControlError:
        """The tokens of one text, its control tokens made ordinary text where the data spell them."""
        places = self._places(text, tokens)
        spelt = [id for id, start, end in places if not self._may_spell(id, trust[start:end])]
        if not spelt:
            return tokens
        if self._policy == "error":
            shown = ", ".join(sorted({repr(self._contents[id]) for id in spelt})[:5])
            return ControlError(f"text of the row spells the control tokens {shown} (data.control_tokens is 'error')")
        return self._split(text, trust, tokens, places)

    def _places(self, text: str, tokens: Tokens) -> list[Place]:
        """The control tokens of a text, in order."""
        places = []
        (found,) = self.is_control(tokens.ids).nonzero()
        for id, start, end in zip(*(each[found].tolist() for each in tokens[:3]), strict=True):
            # Some control tokens swallow the blanks beside them, whosever they are.
            content = self._contents[id]
            place = text.find(content, start, end)
            places.append((id, place, place + len(content)) if place >= 0 else (id, start, end))
        return places

    def _may_spell(self, id: int, trust: bytes) -> bool:
        return not trust or max(trust) <= (ASSISTANT if id in self._soft else TRUSTED)

    def _split(self, text: str, trust: bytes, tokens: Tokens, places: list[Place]) -> Tokens | ControlError:
        if self._inert is None:
            self._inert = _Inert(self._backend, self._contents)
        kept = [place for place in places if self._may_spell(place[0], trust[place[1] : place[2]])]
        # First the proof that the second tokenizer reads this very text as the first one does.
        everything, mine = self._inert.encode(text, places), self._inert.encode(text, kept)
        same = everything is not None and np.array_equal(everything.ids, tokens.ids)
        if mine is not None and same and self._places(text, mine) == kept:
            return mine._replace(num_split=len(places) - len(kept))
        return ControlError(
            "text of the row spells a control token, which this tokenizer cannot write as ordinary text"
        )


class _Inert:
    """A tokenizer that knows its control tokens only under names of private-use characters."""

    def __init__(self, backend: Any, contents: dict[int, str]) -> None:
        import tokenizers

        names = {content: _name(at, content) for at, content in enumerate(contents.values())}
        tree = json.loads(backend.to_str())
        tree.update(truncation=None, padding=None)
        for token in tree["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        _rename(tree["model"], names)
        inert = tokenizers.Tokenizer.from_str(json.dumps(tree))
        self._reader = Reader(inert)
        self._names = {id: names[content] for id, content in contents.items()}
        found = {id: inert.token_to_id(name) for id, name in self._names.items()}
        self._renumbered = {here: id for id, here in found.items() if here != id}

    def encode(self, text: str, places: Sequence[Place]) -> Tokens | None:
        """The tokens of a text in which only the control tokens at `places` act; None if it holds a name of theirs."""
        if any(char >= "\U000f0000" for char in text):
            return None
        parts, done = [], 0
        for id, start, end in places:
            parts += [text[done:start], self._names[id]]
            done = end
        tokens = self._reader.read(["".join([*parts, text[done:]])]).of(0)
        if self._renumbered:
            tokens = tokens._replace(ids=np.array([self._renumbered.get(i, i) for i in tokens.ids.tolist()], np.int32))
        return tokens


def _name(at: int, content: str) -> str:
    """As long as what it stands for, and no name begins another."""
    return chr(0xF0000 + at) + "\U0010fffd" * (len(content) - 1)


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Takes the spelling of control tokens out of the vocabulary itself, where it holds them (SentencePiece does)."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if "merges" in model:
        pairs = [(merge, merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
        model["merges"] = [merge for merge, (a, b) in pairs if not {a, b, a + b} & names.keys()]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
