"""Which row length fills rows best: the fill that is told is that of a run with this length."""

import numpy as np
import pytest

from jaxsft.batches.packing import plan
from jaxsft.preview.records import RowLength
from jaxsft.preview.row_lengths import best, row_lengths

RANDOM = np.random.default_rng(0)
CHATS = np.minimum(RANDOM.lognormal(5.5, 0.8, 3000), 2000).astype(int) + 1


@pytest.mark.parametrize("packing", [True, False])
def test_the_fill_is_that_of_rows_of_this_length(packing):
    tried = row_lengths([CHATS], [3000.0], seq_len=2048, packing=packing)
    lengths = [each.seq_len for each in tried]
    assert lengths == sorted(set(lengths)) and 2048 in lengths and max(lengths) == 8192
    assert min(lengths) >= CHATS.max()  # no example would be lost
    for each in tried:
        starts = plan(CHATS, each.seq_len, seed=5, packing=packing).row_starts
        assert each.fill == pytest.approx(CHATS.sum() / ((len(starts) - 1) * each.seq_len), abs=2e-3)
    if not packing:
        assert best(tried).seq_len == min(lengths)


def test_halves_that_do_not_go_together_want_longer_rows():
    """Examples of 600 tokens fill rows of 1,024 to 59%, and rows of 2,048 to 88%."""
    tried = row_lengths([np.full(1000, 600)], [1000.0], seq_len=1024, packing=True)
    fills = {each.seq_len: each.fill for each in tried}
    assert fills[1024] == pytest.approx(600 / 1024) and fills[2048] == pytest.approx(1800 / 2048, abs=3e-3)
    # What is packed five at a time into 3,072 is fuller than one alone in the 640 that it needs.
    assert fills[640] == pytest.approx(600 / 640) and best(tried).seq_len == 3072
    assert best([RowLength(512, 0.955), RowLength(1024, 0.96), RowLength(2048, 0.97)]).seq_len == 1024


def test_sources_count_as_often_as_they_are_drawn():
    """Of two sources, one of 100 and one of 900 tokens: nearly all draws are of the first."""
    sources = [np.full(50, 100), np.full(50_000, 900)]
    fills = {each.seq_len: each.fill for each in row_lengths(sources, [9900.0, 100.0], seq_len=1024, packing=False)}
    assert fills[1024] == pytest.approx(0.99 * 100 / 1024 + 0.01 * 900 / 1024, rel=0.02)


def test_a_seq_len_of_any_number_is_among_them():
    for seq_len, longest in ((1, 1), (100, 100), (1000, 3), (130, 129), (3000, 2999)):
        tried = row_lengths([np.array([longest])], [1.0], seq_len=seq_len, packing=True)
        assert seq_len in [each.seq_len for each in tried]
        assert all(longest <= each.seq_len <= 4 * seq_len and 0 < each.fill <= 1 for each in tried)
