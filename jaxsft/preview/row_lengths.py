"""How full rows of other lengths would be: which `data.seq_len` suits the examples.

In: the lengths of the examples that are kept, and how often each source is drawn. Out: a few row lengths with the share
of their positions that would hold tokens, as the packer of the run would pack a sample of the examples.
"""

from collections.abc import Sequence

import numpy as np

from jaxsft.batches.packing import plan
from jaxsft.preview.records import RowLength

SAMPLE = 20_000
"""Examples that are packed for each length."""
MARGIN = 0.01
"""A longer row must be so much fuller: attention costs more in it."""


def row_lengths(
    lengths: Sequence[np.ndarray], draws: Sequence[float], *, seq_len: int, packing: bool, seed: int = 0
) -> tuple[RowLength, ...]:
    """The row lengths that keep every example whole, from the shortest to four times `seq_len`, and their fill.

    Args:
        lengths: of each source, the tokens of its examples.
        draws: of each source, examples per epoch.
        seq_len: of the run, which is among them.
        packing: whether several examples share a row.
        seed: of the sample.
    """
    sample = _sample(lengths, draws, seed)
    longest = max(int(each.max()) for each in lengths)
    fills = {length: _fill(sample, length, packing) for length in _candidates(longest, seq_len)}
    return tuple(RowLength(length, fill) for length, fill in sorted(fills.items()))


def best(tried: Sequence[RowLength]) -> RowLength:
    """The shortest length whose rows are nearly as full as the fullest."""
    fullest = max(each.fill for each in tried)
    return next(each for each in tried if each.fill >= fullest - MARGIN)


def _sample(lengths: Sequence[np.ndarray], draws: Sequence[float], seed: int) -> np.ndarray:
    """Lengths of examples, each source as often as it is drawn."""
    if len(lengths) == 1 and len(lengths[0]) <= SAMPLE:
        return np.asarray(lengths[0])
    random = np.random.default_rng(seed)
    size = min(SAMPLE, round(sum(draws)))
    counts = [max(1, round(size * share / sum(draws))) for share in draws]
    return np.concatenate([random.choice(each, count) for each, count in zip(lengths, counts, strict=True)])


def _candidates(longest: int, seq_len: int) -> set[int]:
    """`seq_len`, what the longest example needs, and powers of two and those halfway between, to four times it."""
    powers = [2**power for power in range(5, (4 * seq_len).bit_length())]
    between = [*powers, *(power * 3 // 2 for power in powers)]
    needed = -(-longest // 128) * 128
    return {seq_len, min(needed, seq_len), *(length for length in between if longest <= length <= 4 * seq_len)}


def _fill(sample: np.ndarray, length: int, packing: bool) -> float:
    packed = plan(sample, length, seed=0, packing=packing)
    return float(sample.sum()) / ((len(packed.row_starts) - 1) * length)
