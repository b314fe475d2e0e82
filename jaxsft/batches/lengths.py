"""What becomes of an example of more than `seq_len` tokens, and what that costs, to the token.

In: one encoded example. Out: which stretches of it are kept, and what was dropped or cut, by reason. No stretch is
kept that trains nothing.
"""

from typing import NamedTuple

import numpy as np

from jaxsft.chat.weighing import Encoded

TOO_LONG = "longer than seq_len"
NO_TURN_FITS = "no trained turn ends within seq_len"
NOTHING_TRAINED = "nothing trained left"
CUT_AFTER_TURN = "cut after the last turn that fits"
CUT_AT_SEQ_LEN = "cut at seq_len"
SPLIT = "split into pieces"


class Loss(NamedTuple):
    """Tokens that are not trained on, or a cut that costs none."""

    reason: str
    tokens: int


class Fitted(NamedTuple):
    """What is kept of one example.

    The tokens of `spans`, `dropped` and `cut` add up to those of the example.
    """

    spans: list[tuple[int, int]]
    """First token, and the one after the last, of each stretch that is kept as an example; ascending."""
    dropped: list[Loss]
    """Whole examples, or whole pieces of one."""
    cut: Loss | None
    is_refused: bool = False
    """Too long where that is an error; `dropped` says so too."""


def fit_length(encoded: Encoded, seq_len: int, overlong: str | None) -> Fitted:
    """Applies `data.overlong` to one example.

    With seq_len 4, of 10 tokens whose trained turns end after token 3 and 10: "truncate_turns" keeps (0, 3), "truncate"
    (0, 4), "split" (0, 4), (4, 8), (8, 10), and "drop" nothing. The first token of a piece is nobody's target, so a
    piece of one token is never kept.

    Args:
        encoded: the example.
        seq_len: the most tokens of a kept stretch.
        overlong: the policy; None splits plain text and drops all else, and so does "drop_oldest", which the encoder
            has applied to conversations.
    """
    length, weights = len(encoded.example.tokens), encoded.example.loss_weights
    if length <= seq_len:
        return Fitted([(0, length)], [], None) if _is_trained(weights) else _dropped(NOTHING_TRAINED, length)
    policy = overlong or ("split" if encoded.is_text else "drop")
    if policy == "drop_oldest":  # The encoder has taken the oldest exchanges out of conversations already.
        policy = "split" if encoded.is_text else "drop"
    if policy in ("drop", "error"):
        return _dropped(TOO_LONG, length)._replace(is_refused=policy == "error")
    if policy == "truncate_turns":
        fitting = encoded.turn_ends[encoded.turn_ends <= seq_len]
        if not len(fitting):
            return _dropped(NO_TURN_FITS, length)
        spans, cut = [(0, int(fitting[-1]))], Loss(CUT_AFTER_TURN, length - int(fitting[-1]))
    elif policy == "truncate":
        spans, cut = [(0, seq_len)], Loss(CUT_AT_SEQ_LEN, length - seq_len)
    else:
        assert policy == "split", policy
        starts = range(0, length, seq_len)
        spans, cut = [(start, min(start + seq_len, length)) for start in starts], Loss(SPLIT, 0)
    kept = [(start, end) for start, end in spans if _is_trained(weights[start:end])]
    if not kept:
        return _dropped(NOTHING_TRAINED, length)
    dropped = [Loss(NOTHING_TRAINED, end - start) for start, end in spans if (start, end) not in kept]
    return Fitted(kept, dropped, cut)


def _is_trained(weights: np.ndarray) -> bool:
    """Whether any target has weight; the first token is nobody's target."""
    return bool(np.count_nonzero(weights[1:]))


def _dropped(reason: str, length: int) -> Fitted:
    return Fitted([], [Loss(reason, length)], None)
