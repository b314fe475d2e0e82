"""Which examples share a row: lengths in, a plan out, in plain numpy.

Best-fit decreasing: the longest example first, each into the fullest row that still takes it. Lengths are small
integers, so all examples of one length are placed at once and rows are kept in stacks by the room they have left.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WINDOW = 2**20
"""Examples that are packed together; more than this are cut at random into windows."""


class PackingPlan(NamedTuple):
    """Row r holds the examples `examples[row_starts[r]:row_starts[r + 1]]`, in this order.

    Worked example: lengths `[3, 5, 2, 6]` into rows of 8 may give examples `[2, 3, 1, 0]` and row_starts `[0, 2, 4]`:
    the row `2 + 6` and the row `5 + 3`.
    """

    examples: np.ndarray
    """int32 [num_examples]: every example exactly once."""
    row_starts: np.ndarray
    """int64 [num_rows + 1]"""


def plan(lengths: np.ndarray, seq_len: int, *, seed: int, packing: bool) -> PackingPlan:
    """Puts every example into exactly one row of at most `seq_len` tokens.

    Which of the equally long examples share a row, and in what order they stand in it, is drawn from `seed`; the same
    on every machine.

    Args:
        lengths: int [num_examples], each from 1 to `seq_len`.
        seq_len: tokens per row.
        seed: of the draw.
        packing: False gives one example per row, in order.
    """
    lengths = np.asarray(lengths)
    assert lengths.ndim == 1 and len(lengths) < 2**31
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= seq_len), "lengths are from 1 to seq_len"
    if not packing:
        return PackingPlan(np.arange(len(lengths), dtype=np.int32), np.arange(len(lengths) + 1, dtype=np.int64))
    shuffled = permutation(len(lengths), seed=(seed, 0))
    rows = np.zeros(len(lengths), np.int64)
    num_rows = 0
    for start in range(0, len(lengths), WINDOW):
        window = shuffled[start : start + WINDOW]
        rows[window], num_rows_here = _best_fit_decreasing(lengths[window], seq_len)
        rows[window] += num_rows
        num_rows += num_rows_here
    # A second draw, so that rows do not always begin with their longest example.
    shuffled = permutation(len(lengths), seed=(seed, 1))
    examples = shuffled[np.argsort(rows[shuffled], kind="stable")]
    row_starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))])
    return PackingPlan(examples.astype(np.int32), row_starts.astype(np.int64))


def permutation(size: int, *, seed: Sequence[int]) -> np.ndarray:
    """A random order of `0..size-1`, int64 [size], as a pure function of the seed.

    From raw bits and a stable sort, both of which numpy promises to keep; its own `permutation` may change.
    """
    bits = np.random.PCG64(np.random.SeedSequence(tuple(seed))).random_raw(size)
    return np.argsort(bits, kind="stable")


def _best_fit_decreasing(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """The row of each example, int64 [num_examples], and the number of rows; equal lengths in the order given."""
    by_length = np.argsort(-lengths, kind="stable")
    descending = -lengths[by_length]
    rows = np.zeros(len(lengths), np.int64)
    num_rows = 0
    stacks: list[list[np.ndarray]] = [[] for _ in range(seq_len + 1)]  # Rows by the room that they have left.
    open_rooms = 0  # Bit r is set where stacks[r] holds rows: the next larger room is found without a search.

    def leave(room: int, those: np.ndarray) -> None:
        nonlocal open_rooms
        if room and len(those):
            stacks[room].append(those)
            open_rooms |= 1 << room

    done = 0
    while done < len(lengths):
        length = -int(descending[done])
        end = int(np.searchsorted(descending, -length, side="right"))
        while done < end:
            fitting = open_rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                candidates = stacks[room].pop()
                if not stacks[room]:
                    open_rooms &= ~(1 << room)
            else:
                # No open row takes this length: open as many as the rest of it needs.
                room = seq_len
                num_new = -(-(end - done) // (seq_len // length))
                candidates = np.arange(num_rows, num_rows + num_new)
                num_rows += num_new
            # A row that took one is the best fit for the next, until it has no room: each takes as many as it can.
            per_row = room // length
            num_full, rest = divmod(min(end - done, per_row * len(candidates)), per_row)
            num_placed = num_full * per_row + rest
            chosen = by_length[done : done + num_placed]
            rows[chosen] = np.repeat(candidates, per_row)[:num_placed]
            done += num_placed
            leave(room - per_row * length, candidates[:num_full])
            if rest:
                leave(room - rest * length, candidates[num_full : num_full + 1])
            leave(room, candidates[num_full + (rest > 0) :])
    return rows, num_rows
