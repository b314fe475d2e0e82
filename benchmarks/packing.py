"""Seconds, fill and rows of packing 1,000,000 examples of log-normal length (mean 300, at most 2,048).

Run as `python benchmarks/packing.py [num_examples]`.
"""

import pathlib
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from jaxsft.batches.packing import plan

MEAN, SIGMA, SEQ_LEN = 300, 1.0, 2048


def main() -> None:
    num_examples = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    drawn = np.random.default_rng(0).lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, num_examples)
    lengths = np.clip(np.rint(drawn), 1, SEQ_LEN).astype(np.int64)
    print(f"{num_examples:,} examples, mean length {lengths.mean():.0f}, rows of {SEQ_LEN:,}")
    for packing in (True, False):
        start = time.perf_counter()
        num_rows = len(plan(lengths, SEQ_LEN, seed=0, packing=packing).row_starts) - 1
        seconds = time.perf_counter() - start
        fill = lengths.sum() / (num_rows * SEQ_LEN)
        print(f"  {'packed' if packing else 'one per row':12} {seconds:6.2f} s  {fill:8.3%} full  {num_rows:>10,} rows")


if __name__ == "__main__":
    main()
