"""What kernels of attention compute of packed rows: pairs of queries and keys, as a share of the causal half.

Run as `python benchmarks/attention_pairs.py [--lengths FILE ...]`; nothing is trained and no accelerator is needed.
Examples are packed as for training (best-fit decreasing), and the blocks counted that the kernels for packed rows go
over (`jaxsft/model/packed.py`), which is what a TPU would compute. Kernels that go by the place in the row alone, such
as splash attention, compute the causal half, and the upper parts of the blocks on the diagonal.

FILE has one example a line: its length, or those of its turns with commas between them, which are added up. Without it:
ShareGPT's, and lengths drawn from a log-normal distribution of mean 600 (standard deviation of the logarithm 0.8).
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax.numpy as jnp
import numpy as np

from jaxsft.batches.packing import permutation, plan
from jaxsft.model.needed import Rule
from jaxsft.model.pairs import Blocks, Rows, block_sizes, pairs_of

SHAREGPT = pathlib.Path(__file__).with_name("sharegpt_lengths.csv")
GROUP_SIZE, HEAD_DIM = 4, 128
"""Of Llama 3 8B."""
MATMULS = 9 / 7
"""Of a block, forward and backward, to those of splash attention with one backward kernel."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--lengths", type=pathlib.Path, nargs="*", default=[], help="files of lengths")
    parser.add_argument("--rows", type=int, default=64, help="rows that are counted")
    parser.add_argument("--seq-len", type=int, nargs="*", default=[4096, 8192, 32768])
    args = parser.parse_args()
    drawn = np.random.default_rng(0).lognormal(np.log(600) - 0.32, 0.8, 40_000).astype(int) + 1
    sets = {path.stem: read_lengths(path) for path in (SHAREGPT, *args.lengths)} | {"log-normal": drawn}
    queries, keys = block_sizes(GROUP_SIZE, HEAD_DIM)
    print(f"blocks of {queries} queries ({GROUP_SIZE} heads of a group at once) and {keys} keys")
    print(f"{'lengths':<24}{'mean':>8}{'row':>8}{'allowed':>10}{'computed':>10}{'matmuls, to splash':>20}")
    for name, lengths in sets.items():
        for seq_len in args.seq_len:
            segment_ids, positions = pack(lengths, seq_len, most=args.rows)
            rows = Rows(segment_ids, positions, jnp.arange(seq_len), segment_ids, positions)
            pairs, _ = pairs_of(Rule(1.0, None, None), Blocks(queries, keys, interpret=True), rows)
            half = segment_ids.size * seq_len / 2
            allowed = (positions[segment_ids > 0] + 1).sum() / half
            computed = int(pairs.num_pairs) * queries * keys / half
            mean = lengths[lengths <= seq_len].mean()
            print(f"{name:<24}{mean:>8.0f}{seq_len:>8}{allowed:>10.3f}{computed:>10.3f}{computed * MATMULS:>20.3f}")


def read_lengths(path: pathlib.Path) -> np.ndarray:
    """Lengths of the examples in a file."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return np.array([sum(int(number) for number in line.split(",")) for line in lines])


def pack(lengths: np.ndarray, seq_len: int, *, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions [rows, seq_len] of some rows, drawn; examples that are too long are left out."""
    lengths = lengths[lengths <= seq_len]
    packed = plan(lengths, seq_len, seed=0, packing=True)
    drawn = permutation(len(packed.row_starts) - 1, seed=(0,))[:most]  # the first ones hold the longest examples
    segment_ids, positions = np.zeros((2, len(drawn), seq_len), np.int32)
    for row, place in enumerate(drawn):
        at = 0
        for number, example in enumerate(packed.examples[packed.row_starts[place] : packed.row_starts[place + 1]], 1):
            end = at + lengths[example]
            segment_ids[row, at:end], positions[row, at:end] = number, np.arange(end - at)
            at = end
    return segment_ids, positions


if __name__ == "__main__":
    main()
