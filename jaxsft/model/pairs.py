"""Which blocks (queries x keys) of packed rows hold a pair that attention allows, as lists for kernels to go over.

In: segments and positions of a device's queries, and of all keys of its rows. Out: lists of pairs of blocks, sorted by
queries and by keys, and how long they are. Which blocks are needed is known when a step runs: the arrays have room for
all of them. What is computed with them is the business of `packed.py`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft.model.needed import Rule

LANES = 128
"""So many numbers lie side by side on a TPU, and blocks are multiples of it."""
LARGEST_GROUP = 8
"""Query heads that are computed together. Of 64, scores of the smallest block do not fit into a v5p's memory on the
chip (VMEM); larger groups read their keys several times."""

MOST_PAIRS = 2**16
"""Of blocks, in the lists of one device. The two of a kernel lie in a memory of 1 MiB on the chip (SMEM); lists of 2^17
do not compile for v5e, v5p or v6e."""


class Blocks(NamedTuple):
    """How one device's rows are cut."""

    queries: int
    """Of a block; each counts once for every query head of a group."""
    keys: int
    interpret: bool
    """Run without a TPU, for tests."""


class Rows(NamedTuple):
    """Segments, positions and places of one device's queries, and of all keys."""

    q_segment_ids: Any
    """int32 [B, T], as is `q_positions`; 0 is padding, which sees nothing and is seen by nothing."""
    q_positions: Any
    q_places: Any
    """int32 [T], growing: where in the row they lie."""
    kv_segment_ids: Any
    """int32 [B, S], in the order of the row, as is `kv_positions`."""
    kv_positions: Any


class Pairs(NamedTuple):
    """Blocks of queries and of keys that are computed together, one pair after another."""

    queries: jax.Array
    """int32 [at most all pairs + 1]: row * blocks of queries in a row + number in the row."""
    keys: jax.Array
    num_pairs: jax.Array
    """int32 []: how many of them are to be computed; what comes after them says nothing."""


def block_sizes(group_size: int, head_dim: int) -> tuple[int, int]:
    """Queries and keys of a block: 512 lines of queries x heads of a group (up to 1,024, as it has 128 queries at
    least), or half of that where heads are wide, and 256 keys.

    Smaller ones leave out more of what no query sees, larger ones spend less on their way. Not measured on a TPU.
    """
    lines = 512 if head_dim <= 128 else 256
    return max(lines // group_size // LANES, 1) * LANES, 256


def groups_of(group_size: int) -> int:
    """Into how many a group of query heads is cut: 1 up to 8 of them, 2 for 16, 3 for 9, 11 for 11."""
    return next(n for n in range(1, group_size + 1) if group_size % n == 0 and group_size // n <= LARGEST_GROUP)


def room_for_pairs(num_rows: int, num_queries: int, num_keys: int, *, group_size: int, head_dim: int) -> int:
    """Pairs of blocks that the lists of a device have room for, which has so many rows, queries and keys of each."""
    queries, keys = block_sizes(group_size // groups_of(group_size), head_dim)
    return num_rows * -(-num_queries // queries) * -(-num_keys // keys)


def pairs_of(rule: Rule, blocks: Blocks, rows: Rows) -> tuple[Pairs, Pairs]:
    """Pairs of blocks in which a query may see a key, sorted by queries, and sorted by keys.

    With blocks of 4 and one row of segments of 6 and 2 tokens, queries 0 to 3 see block 0, queries 4 to 7 blocks 0 and
    1: (0, 0), (1, 0), (1, 1), and by keys (0, 0), (1, 0), (1, 1) again. Every block of queries and every block of keys
    is in some pair, so that each result is written.
    """
    num_rows, num_keys = rows.kv_segment_ids.shape
    # Positions grow by 1 inside an example, so it begins there.
    before = rows.q_positions if rule.window is None else jnp.minimum(rows.q_positions, rule.window - 1)
    begin = jnp.where(rows.q_segment_ids > 0, jnp.maximum(rows.q_places - before, 0), rows.q_places)
    begin, place = (filled(x, blocks.queries, mode="edge") for x in (begin, rows.q_places[None]))
    num_q, num_kv = begin.shape[1] // blocks.queries, -(-num_keys // blocks.keys)
    first = begin.reshape(num_rows, num_q, -1).min(axis=2) // blocks.keys
    last = jnp.broadcast_to(place.reshape(1, num_q, -1)[:, :, -1] // blocks.keys, first.shape)
    # Both grow from one block of queries to the next, as do begins of examples and places.
    number = jnp.arange(num_kv)
    first_q = jax.vmap(lambda of_row: jnp.searchsorted(of_row, number, side="left"))(last)
    last_q = jax.vmap(lambda of_row: jnp.searchsorted(of_row, number, side="right"))(first) - 1
    first_q = jnp.minimum(first_q, num_q - 1)
    last_q = jnp.maximum(last_q, first_q)
    queries, keys, count = _listed(first, last, num_kv)
    keys_turned, queries_turned, count_turned = _listed(first_q, last_q, num_q)
    return Pairs(queries, keys, count), Pairs(queries_turned, keys_turned, count_turned)


def _listed(first: jax.Array, last: jax.Array, num_others: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ranges [B, blocks] to a list of pairs: (block, other block), each counted over all rows, and how many."""
    num_rows, num_blocks = first.shape
    lengths = (last - first + 1).reshape(-1)
    ends = jnp.cumsum(lengths)
    largest = num_rows * num_blocks * num_others + 1
    block = jnp.repeat(jnp.arange(num_rows * num_blocks), lengths, total_repeat_length=largest)
    other = first.reshape(-1)[block] + jnp.arange(largest) - (ends - lengths)[block]
    other = jnp.clip(other, 0, num_others - 1) + block // num_blocks * num_others
    return block.astype(jnp.int32), other.astype(jnp.int32), ends[-1].astype(jnp.int32)


def filled(x: jax.Array, block: int, axis: int = 1, value: int = 0, mode: Any = "constant") -> jax.Array:
    """With whole blocks along an axis."""
    fill = [(0, 0)] * x.ndim
    fill[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, fill, mode, **({"constant_values": value} if mode == "constant" else {}))


def share_of_whole_rows(
    segment_ids: np.ndarray,
    positions: np.ndarray,
    *,
    group_size: int,
    head_dim: int,
    windows: Sequence[int | None],
) -> float:
    """What these kernels compute of such rows [B, T], as a share of what they compute of rows of one example each.

    That is about what kernels compute that go by the place in the row alone.

    Args:
        windows: of each layer.
    """
    blocks = Blocks(*block_sizes(group_size // groups_of(group_size), head_dim), interpret=True)
    places = np.arange(segment_ids.shape[1], dtype=np.int32)

    def num_pairs(segment_ids: np.ndarray, positions: np.ndarray) -> int:
        """Of all layers."""
        rows = Rows(segment_ids, positions, jnp.asarray(places), segment_ids, positions)
        of_window = {window: pairs_of(Rule(1.0, window, None), blocks, rows)[0].num_pairs for window in set(windows)}
        return sum(int(of_window[window]) for window in windows)

    whole = num_pairs(np.ones_like(segment_ids), np.broadcast_to(places, segment_ids.shape))
    return num_pairs(segment_ids, positions) / whole
