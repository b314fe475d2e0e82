"""Which tiles (queries x keys) of a row hold an allowed pair, so that attention computes these alone.

In: positions of queries, and how rows are cut into chunks and these into tiles. Out: tiles of a few kinds, and which of
them are needed. What is computed with them is the business of `tiles.py`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

TILE = 64
"""Queries, and keys, of a small tile: few enough that short examples meet little of each other."""
SMALL_IN_LARGE = 8
"""On CPUs a large tile has so many small ones along each side. It takes their place where those needed hold at least
half of the pairs that it computes, as larger matmuls take half the time. Elsewhere all tiles are of the size of a large
one: with loops over several kinds, the compiler for TPUs copied the gradients of all keys from one loop to the next."""
STRIPS = 4
"""A large tile on the diagonal, in which no query sees the keys after it, is computed in so many strips of queries,
each with the keys up to its end: 10 of 16 parts."""


class Rule(NamedTuple):
    """What becomes of products of queries and keys, and which of them count."""

    scale: float
    window: int | None
    soft_cap: float | None

    def scores(self, products: jax.Array) -> jax.Array:
        """Scores of products q . k, of any shape."""
        scores = products * self.scale
        return scores if self.soft_cap is None else self.soft_cap * jnp.tanh(scores / self.soft_cap)

    def allowed(self, segment_ids: tuple[jax.Array, ...], positions: tuple[jax.Array, ...]) -> jax.Array:
        """Whether queries [..., T] attend to keys [..., S]: bool [..., T, S]. Both are given as (queries', keys')."""
        q_segments, kv_segments = segment_ids
        distance = positions[0][..., :, None] - positions[1][..., None, :]
        allowed = (q_segments[..., :, None] == kv_segments[..., None, :]) & (distance >= 0)
        return allowed if self.window is None else allowed & (distance < self.window)


class Cut(NamedTuple):
    """How a row is cut. With chunks of 12 positions and tiles of 8, chunks are filled up to 16."""

    tile: int
    """Side of a small tile."""
    in_large: int
    """Small tiles along each side of a large one; 1 where all are of one size."""
    chunk: int
    """Positions that lie side by side, on one device: T, or a part of it."""
    on_mesh: bool
    """Whether devices along `context` hold the same number of chunks each; otherwise there is one device and chunk."""

    @property
    def filled(self) -> int:
        """Positions of a chunk with what fills up its last tile."""
        return -(-self.chunk // self.tile) * self.tile

    def fill(self, x: jax.Array, axis: int = 1, value: int = 0) -> jax.Array:
        """Each chunk along an axis with what fills it up."""
        return x if self.filled == self.chunk else self._resized(x, axis, self.chunk, self.filled, value)

    def unfill(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """The way back from `fill`."""
        return x if self.filled == self.chunk else self._resized(x, axis, self.filled, self.chunk, 0)

    def _resized(self, x: jax.Array, axis: int, old: int, new: int, value: int) -> jax.Array:
        x = x.reshape(*x.shape[:axis], -1, old, *x.shape[axis + 1 :])
        change = [(0, 0, 0)] * x.ndim
        change[axis + 1] = (0, new - old, 0)
        x = jax.lax.pad(x, jnp.asarray(value, x.dtype), change)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


class Kind(NamedTuple):
    """Tiles of one size; `on_diagonal` if all lie there and are computed in strips."""

    size: int
    on_diagonal: bool

    def start(self, cut: Cut, number: jax.Array) -> jax.Array:
        """Where tiles begin, counted over all chunks: each chunk is cut into whole tiles from its start on."""
        in_chunk = cut.filled // self.size
        return number // in_chunk * cut.filled + number % in_chunk * self.size

    def strips(self) -> list[tuple[int, int, int]]:
        """What is computed, one after another: first query, number of queries, number of keys from the first on."""
        if not self.on_diagonal:
            return [(0, self.size, self.size)]
        strip = self.size // STRIPS
        return [(first, strip, first + strip) for first in range(0, self.size, strip)]

    def enough(self) -> int:
        """Half of the pairs that are computed."""
        return sum(queries * keys for _, queries, keys in self.strips()) // 2


def needed_tiles(
    rule: Rule, cut: Cut, positions: jax.Array, q_order: jax.Array, kv_order: jax.Array
) -> Iterator[tuple[Kind, jax.Array]]:
    """Kinds of tiles, and which of them [B, tiles of queries, tiles of keys] are computed.

    Every allowed pair is in one of them, and in no second one.

    Args:
        rule: for its window.
        cut: into chunks and tiles.
        positions: int32 [B, T] of the queries, in chunks that are filled up.
        q_order: int32 [chunks of queries]: which chunks of the row they are.
        kv_order: int32 [chunks of keys].
    """
    num_rows, tile, in_chunk = len(positions), cut.tile, cut.filled // cut.tile
    before = positions if rule.window is None else jnp.minimum(positions, rule.window - 1)
    # Positions grow by 1 or more inside an example, so it begins no earlier than this. What fills up a chunk counts as
    # its last token, which is in the same tile.
    place = q_order[:, None] * cut.chunk + jnp.minimum(jnp.arange(cut.filled), cut.chunk - 1)
    begin = jnp.maximum(place.reshape(-1) - before, 0)
    first = (begin // cut.chunk * in_chunk + begin % cut.chunk // tile).reshape(num_rows, -1, tile).min(axis=2)
    q_number, kv_number = (_numbers(order, in_chunk) for order in (q_order, kv_order))
    needed = (kv_number >= first[..., None]) & (kv_number <= q_number[:, None])
    num_large = in_chunk // cut.in_large
    if cut.in_large > 1 and num_large:
        inner = num_large * cut.in_large
        chunks = needed.reshape(num_rows, len(q_order), in_chunk, len(kv_order), in_chunk)
        parts = chunks[:, :, :inner, :, :inner].reshape(
            num_rows, len(q_order) * num_large, cut.in_large, len(kv_order) * num_large, cut.in_large
        )
        pairs = parts.sum(axis=(2, 4)) * tile**2
        q_large, kv_large = (_numbers(order, num_large) for order in (q_order, kv_order))
        diagonal = q_large[:, None] == kv_large
        on, off = (Kind(tile * cut.in_large, on_diagonal=on_diagonal) for on_diagonal in (True, False))
        is_large = pairs >= jnp.where(diagonal, on.enough(), off.enough())
        yield on, is_large & diagonal
        if kv_large.size > 1:
            yield off, is_large & ~diagonal
        rest = (parts & ~is_large[:, :, None, :, None]).reshape(chunks[:, :, :inner, :, :inner].shape)
        needed = chunks.at[:, :, :inner, :, :inner].set(rest).reshape(needed.shape)
    yield Kind(tile, on_diagonal=False), needed


def _numbers(order: jax.Array, in_chunk: int) -> jax.Array:
    """Numbers in the row of the tiles of chunks, so many in each: [2, 0] with 2 in each are [4, 5, 0, 1]."""
    return (order[:, None] * in_chunk + jnp.arange(in_chunk)).reshape(-1)
