"""What becomes of examples that are too long."""

import numpy as np
import pytest

from jaxsft.batch import Example
from jaxsft.batches.lengths import (
    CUT_AFTER_TURN,
    CUT_AT_SEQ_LEN,
    NO_TURN_FITS,
    NOTHING_TRAINED,
    SPLIT,
    TOO_LONG,
    Loss,
    fit_length,
)
from jaxsft.chat.weighing import Encoded

POLICIES = (None, "drop", "error", "truncate_turns", "truncate", "split")


def encoded(weights, ends=(), *, is_text=False):
    tokens = np.arange(len(weights), dtype=np.int32)
    example = Example(tokens, np.array(weights, np.float32))
    return Encoded(example, np.zeros(len(weights), np.uint8), np.array(ends, np.int32), is_text, "f:1", {})


CHAT = encoded([0, 0, 1, 0, 0, 0, 0, 0, 1, 1], ends=(3, 10))


@pytest.mark.parametrize("policy", POLICIES)
def test_what_fits_is_kept_whole(policy):
    for seq_len in (10, 11):
        assert fit_length(CHAT, seq_len, policy) == ([(0, 10)], [], None, False)


def test_each_policy_on_one_example():
    assert fit_length(CHAT, 4, None) == ([], [Loss(TOO_LONG, 10)], None, False)
    assert fit_length(CHAT, 4, "drop") == ([], [Loss(TOO_LONG, 10)], None, False)
    assert fit_length(CHAT, 4, "error") == ([], [Loss(TOO_LONG, 10)], None, True)
    assert fit_length(CHAT, 9, "truncate_turns") == ([(0, 3)], [], Loss(CUT_AFTER_TURN, 7), False)
    assert fit_length(CHAT, 3, "truncate_turns") == ([(0, 3)], [], Loss(CUT_AFTER_TURN, 7), False)
    assert fit_length(CHAT, 2, "truncate_turns") == ([], [Loss(NO_TURN_FITS, 10)], None, False)
    assert fit_length(CHAT, 9, "truncate") == ([(0, 9)], [], Loss(CUT_AT_SEQ_LEN, 1), False)
    assert fit_length(CHAT, 2, "truncate") == ([], [Loss(NOTHING_TRAINED, 10)], None, False)
    assert fit_length(CHAT, 4, "split") == ([(0, 4), (8, 10)], [Loss(NOTHING_TRAINED, 4)], Loss(SPLIT, 0), False)


def test_plain_text_is_split_unless_told_otherwise():
    text = encoded([1] * 9, ends=(9,), is_text=True)
    assert fit_length(text, 4, None) == ([(0, 4), (4, 8)], [Loss(NOTHING_TRAINED, 1)], Loss(SPLIT, 0), False)
    assert fit_length(text, 4, "drop").spans == []
    assert fit_length(text, 4, "truncate").spans == [(0, 4)]


def test_an_example_of_which_only_the_first_token_is_trained_trains_nothing():
    assert fit_length(encoded([1, 0, 0]), 8, None) == ([], [Loss(NOTHING_TRAINED, 3)], None, False)


@pytest.mark.parametrize("trial", range(200))
def test_no_token_is_lost_uncounted_and_nothing_is_kept_that_trains_nothing(trial):
    random = np.random.default_rng(trial)
    length = int(random.integers(1, 40))
    ends = np.sort(random.choice(np.arange(1, length + 1), int(random.integers(0, min(length, 4) + 1)), replace=False))
    example = encoded(random.choice([0, 0, 0.5, 1], length), ends, is_text=bool(trial % 2))
    for policy in POLICIES:
        for seq_len in range(2, 42):
            fitted = fit_length(example, seq_len, policy)
            tokens = sum(end - start for start, end in fitted.spans)
            tokens += sum(loss.tokens for loss in fitted.dropped) + (fitted.cut.tokens if fitted.cut else 0)
            assert tokens == length
            assert fitted.spans or fitted.dropped
            for start, end in fitted.spans:
                assert 0 < end - start <= seq_len
                assert example.example.loss_weights[start + 1 : end].any()
            if policy == "truncate_turns" and length > seq_len and fitted.spans:
                assert fitted.spans[0][1] in ends
