import hashlib

import numpy as np
import pytest

from jaxsft.batches.packing import permutation, plan


def rows_of(packed):
    return [packed.examples[a:b].tolist() for a, b in zip(packed.row_starts[:-1], packed.row_starts[1:], strict=True)]


def check(lengths, seq_len, packed):
    """Every example exactly once, no empty row, no row over seq_len."""
    assert packed.examples.dtype == np.int32 and packed.row_starts.dtype == np.int64
    assert sorted(packed.examples.tolist()) == list(range(len(lengths)))
    assert packed.row_starts[0] == 0 and packed.row_starts[-1] == len(lengths)
    fills = [sum(int(lengths[index]) for index in row) for row in rows_of(packed)]
    assert all(0 < fill <= seq_len for fill in fills)
    return fills


def naive_best_fit_decreasing(lengths, seq_len):
    """One by one, each into the fullest row that takes it; room left per row, sorted."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else seq_len) - length)
    return sorted(rooms)


@pytest.mark.parametrize("trial", range(60))
def test_a_plan_is_best_fit_decreasing_over_all_examples(trial):
    random = np.random.default_rng(trial)
    seq_len = int(random.integers(1, 60))
    lengths = random.integers(1, seq_len + 1, int(random.integers(0, 120)))
    if trial % 2:
        lengths = np.minimum(lengths, random.integers(1, seq_len + 1, len(lengths)))
    fills = check(lengths, seq_len, plan(lengths, seq_len, seed=trial, packing=True))
    assert sorted(seq_len - fill for fill in fills) == naive_best_fit_decreasing(lengths.tolist(), seq_len)


def test_more_examples_than_a_window_are_packed_window_by_window(monkeypatch):
    monkeypatch.setattr("jaxsft.batches.packing.WINDOW", 100)
    lengths = np.random.default_rng(0).integers(1, 51, 1234)
    fills = check(lengths, 50, plan(lengths, 50, seed=0, packing=True))
    assert sum(fills) / (50 * len(fills)) > 0.9


def test_without_packing_every_row_is_one_example_in_order():
    packed = plan(np.array([3, 1, 8]), 8, seed=0, packing=False)
    assert rows_of(packed) == [[0], [1], [2]]


def test_no_examples_make_no_rows():
    for packing in (True, False):
        assert rows_of(plan(np.zeros(0, np.int64), 8, seed=0, packing=packing)) == []


def test_the_seed_decides_who_shares_a_row_and_nothing_else_does():
    lengths = np.tile([3, 5], 50)
    first, again, other = (rows_of(plan(lengths, 8, seed=seed, packing=True)) for seed in (1, 1, 2))
    assert first == again != other
    assert {len(row) for row in first} == {2}
    assert len({lengths[row[0]] for row in first}) == 2, "rows begin with either length"


def test_a_permutation_is_the_same_on_every_machine_and_numpy():
    order = permutation(1000, seed=(7, 1))
    assert sorted(order.tolist()) == list(range(1000))
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == "2c4b80b1036c3577"
    assert not np.array_equal(order, permutation(1000, seed=(7, 2)))


def test_log_normal_lengths_fill_at_least_98_percent():
    lengths = np.clip(np.rint(np.random.default_rng(0).lognormal(np.log(300) - 0.5, 1.0, 50_000)), 1, 2048)
    fills = check(lengths.astype(int), 2048, plan(lengths.astype(np.int64), 2048, seed=0, packing=True))
    assert sum(fills) / (2048 * len(fills)) >= 0.98
