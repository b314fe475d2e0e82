"""Control tokens that a chat template needs: adding those that a tokenizer lacks, and finding those never trained.

In: a tokenizer with a template that it did not come with. Out: the tokenizer with the template's control tokens, one id
each, and which were added; the model's rows for them come with its weights. The token that ends an answer becomes the
eos token, or the user is told that it is not. In: the files of a model and some ids. Out:
which of these rows look as if pretraining never touched them.

Nothing is added for the template that a tokenizer came with: where the tokenizer breaks up its marks, the model was
trained on them broken up.
"""

import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from jaxsft.chat.named_templates import NAMED_TEMPLATES
from jaxsft.config import ConfigError
from jaxsft.folders.weights.check import read_rows, vocabulary_tables
from jaxsft.folders.weights.stored import Stored
from jaxsft.rows.messages import Message

# Adding.

CONTROL = re.compile(
    r"<\|[^<>|\s]{1,40}\|?>"  # <|im_start|>, <|turn>
    r"|<[^<>|\s]{1,40}\|>"  # <turn|>
    r"|<｜[^<>｜\s]{1,40}｜>"  # DeepSeek, whose bars are wide
    r"|\[\|[^\[\]|\s]{1,40}\|\]"  # [|assistant|]
    r"|<(?:start|begin|end)_of_[a-z_]{1,40}>"  # <start_of_turn>
)
"""Texts that are only ever written as control tokens. `<think>`, `<tool_call>`, `[INST]`, headings and the like are
ordinary text to many models, and stay it."""

TURN_END = re.compile(
    rf"\s*({CONTROL.pattern}|</s>|<(?:\w+:)?(?:eos|eot|eom|sep|end|stop)>|\[(?:EOS|EOT|EOM|SEP|END|STOP)\])",
    re.IGNORECASE,
)
"""Texts that, directly behind an answer, are control tokens as well."""

ANSWER = "the answer"

_CALL = {"type": "function", "function": {"name": "lookup", "arguments": {"word": "a word"}}}

PROBES: list[list[Message]] = [
    [{"role": "user", "content": "a question"}, {"role": "assistant", "content": ANSWER}],
    [
        {"role": "system", "content": "a rule"},
        {"role": "user", "content": "a question"},
        {"role": "assistant", "content": "the first answer"},
        {"role": "user", "content": "another question"},
        {"role": "assistant", "content": ANSWER},
    ],
    [
        {"role": "user", "content": "a question"},
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "content": "a result", "name": "lookup"},
        {"role": "assistant", "content": ANSWER},
    ],
]
"""Conversations without any markup: all that looks like a control token in their render, the template has written."""


def add_missing_tokens(tokenizer: Any, chat_template: str, *, own_template: str | None) -> tuple[str, ...]:
    """Adds the control tokens that the tokenizer's new template needs and the tokenizer would break up.

    A template of ours names its tokens. Of a file's template they are what it writes in a rendered conversation that
    matches `CONTROL`, unless the template that the tokenizer came with writes it too (the model knows it broken up),
    and what stands right behind an answer and matches `TURN_END`: without it as one token, the model could not stop.

    Args:
        tokenizer: with the new template; changed in place.
        chat_template: what `data.chat_template` says: a name of ours, or a file.
        own_template: the template that the tokenizer came with.

    Returns:
        The tokens that have new ids, in the order of these.
    """
    if chat_template in NAMED_TEMPLATES:
        needed = list(NAMED_TEMPLATES[chat_template].tokens)
    else:
        needed = _tokens_of_file(tokenizer, own_template or "")
    missing = [token for token in needed if not _is_one_token(tokenizer, token)]
    if not missing:
        return ()
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    # Not normalised: otherwise SentencePiece tokenizers would look for the token with a space in front.
    tokens = [AddedToken(token, special=True, normalized=False) for token in missing]
    tokenizer.add_tokens(tokens, special_tokens=True)
    # For those who ask which tokens are special by the list, and not by each token.
    tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    return tuple(token for token in missing if token not in known)


def _tokens_of_file(tokenizer: Any, own_template: str) -> list[str]:
    found: dict[str, None] = {}
    for text in _renders(tokenizer):
        found |= dict.fromkeys(token for token in CONTROL.findall(text) if token not in own_template)
        answer = text.rfind(ANSWER)
        if answer >= 0 and (end := TURN_END.match(text, answer + len(ANSWER))):
            found[end[1]] = None
    return list(found)


def _renders(tokenizer: Any) -> list[str]:
    """The probes as the template shows them, those that it accepts."""
    texts = []
    for messages in PROBES:
        for shown, prompt in ((messages, False), (messages[:-1], True)):
            try:
                texts.append(tokenizer.apply_chat_template(shown, add_generation_prompt=prompt, tokenize=False))
            except Exception:  # a template may raise anything; the encoder says so where the data needs it
                continue
    return texts


def _is_one_token(tokenizer: Any, token: str) -> bool:
    return any(added.content == token for added in tokenizer.added_tokens_decoder.values())


def describe_added(tokenizer: Any, chat_template: str, added: Sequence[str]) -> list[str]:
    """What the user should know of added tokens; nothing where there are none."""
    if not added:
        return []
    listed = ", ".join(f"{token!r} ({tokenizer.convert_tokens_to_ids(token)})" for token in added)
    return [f"the chat template {chat_template} needs tokens that the tokenizer lacks; added: {listed}"]


# Which token ends an answer for other programs.


def set_eos(tokenizer: Any, stop: int | None) -> str | None:
    """Makes the token that ends answers the tokenizer's eos token.

    Args:
        tokenizer: changed in place.
        stop: the token by which the template ends an answer, if it is one.

    Returns:
        A sentence for the user; None where nothing had to change.

    Raises:
        ConfigError: there is no such token, or the template writes the eos token where it would then write another.
    """
    if stop is None:
        raise ConfigError(
            "data.set_eos: true, but the chat template does not end answers with one token of the tokenizer; leave it "
            "out, or give a template that does as data.chat_template"
        )
    before = tokenizer.eos_token
    if stop == tokenizer.eos_token_id:
        return None
    shown = _renders(tokenizer)
    tokenizer.eos_token = token = str(tokenizer.added_tokens_decoder[stop].content)
    if _renders(tokenizer) != shown:
        tokenizer.eos_token = before
        raise ConfigError(
            f"data.set_eos: true, but the chat template writes the eos token ({before!r}) apart from the token that "
            f"ends an answer ({token!r}), and would then write another text; leave it out"
        )
    if before is not None:  # it stays a control token
        tokenizer.add_special_tokens({"additional_special_tokens": [before]}, replace_extra_special_tokens=False)
    return f"data.set_eos: {token!r} ({stop}) is the tokenizer's eos token now, in place of {before!r}"


def describe_stop(tokenizer: Any, stop: int | None) -> list[str]:
    """What the user should know of an eos and a pad token by which other programs go."""
    notes = []
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    text = None if stop is None else tokenizer.convert_ids_to_tokens(stop)
    if stop is not None and stop != eos:
        kept = "has no eos token" if eos is None else f"keeps the eos token {tokenizer.eos_token!r} ({eos})"
        notes.append(
            f"answers end with {text!r} ({stop}), but the tokenizer {kept}; generation_config.json names every stop, "
            "and programs that go by the tokenizer's eos token alone would not stop there (data.set_eos: true makes "
            "it the eos token)"
        )
    if pad is None:
        notes.append(
            "the tokenizer has no pad token, and gets none: programs that take the eos token for it and mask padding "
            "by its id would mask the end of every answer; give them another token"
        )
    elif pad in (stop, eos):
        notes.append(
            f"the tokenizer's pad token is {tokenizer.pad_token!r} ({pad}), which also ends texts, and stays it: "
            "programs that mask padding by its id mask the end of every answer"
        )
    return notes


# Rows that were never trained.


class Untrained(NamedTuple):
    """A row of the embedding or the unembedding that pretraining seems never to have touched."""

    tensor: str
    """Its name in the files."""
    id: int
    reason: str


NUM_COMPARED = 512
"""Rows, evenly spaced, whose norms stand for those of the whole table."""
SMALL = 0.1
"""Norms below this share of the median are those of rows that only weight decay has seen."""


def template_ids(tokenizer: Any) -> list[int]:
    """Ids of the control tokens that the chat template writes."""
    ids: set[int] = set()
    for text in _renders(tokenizer) if tokenizer.chat_template else []:
        ids |= set(tokenizer(text, add_special_tokens=False)["input_ids"])
    return sorted(ids & tokenizer.added_tokens_decoder.keys())


def untrained_tokens(
    stored: Stored, family: ModuleType, abstract: nnx.State, *, tokenizer: Any, ids: Sequence[int]
) -> list[Untrained]:
    """Which of the rows `ids` look untrained, in the embedding and, if it is another tensor, the unembedding.

    A row does if it is zero or tiny beside the median of the table, or exactly equal to the row of another control
    token or of no token at all: reserved rows begin equal and stay so. Only the rows that are compared are read.

    Args:
        stored: the model.
        family: the module of its family.
        abstract: the model's state; only axes are looked at.
        tokenizer: says which other rows belong to control tokens or to none.
        ids: rows to look at; ids that the tables do not have are passed over.
    """
    found = []
    for name, table in vocabulary_tables(stored, family, abstract).items():
        rows = table.shape[0]
        # Sorted, so that they are read in their order.
        sample = np.unique(np.linspace(0, rows - 1, NUM_COMPARED).astype(int)).tolist()
        median = float(np.median(_norms(read_rows(table, sample))))
        reserved = sorted(id for id in tokenizer.added_tokens_decoder if id < rows)[-NUM_COMPARED:]
        spare = range(max(tokenizer.get_vocab().values()) + 1, rows)[:NUM_COMPARED]
        others = {id: read_rows(table, [id]).tobytes() for id in sorted({*reserved, *spare})}
        for id in sorted(set(ids)):
            if id >= rows:
                continue
            own = read_rows(table, [id])
            norm, row = float(_norms(own)[0]), own.tobytes()
            twins = sum(other == row for other_id, other in others.items() if other_id != id)
            if norm == 0.0:
                found.append(Untrained(name, id, "all zeros"))
            elif twins:
                found.append(Untrained(name, id, f"equal to {twins} other rows of reserved or unused tokens"))
            elif norm < SMALL * median:
                found.append(Untrained(name, id, f"norm {norm:.1e}, where the median is {median:.1e}"))
    return found


def _norms(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows.astype(np.float32), axis=-1)


def describe_untrained(tokenizer: Any, untrained: Sequence[Untrained]) -> list[str]:
    """A sentence for each tensor."""
    notes = []
    for tensor in dict.fromkeys(each.tensor for each in untrained):
        rows = [each for each in untrained if each.tensor == tensor]
        listed = ", ".join(f"{tokenizer.convert_ids_to_tokens(each.id)!r} ({each.id}: {each.reason})" for each in rows)
        notes.append(
            f"{tensor} has rows that pretraining seems never to have trained, of tokens that the chat template needs: "
            f"{listed}; full fine-tuning trains them, adapters on other weights (LoRA) would not"
        )
    return notes
