"""Self-attention of packed rows on one CPU device, tile by tile: those (queries x keys) that hold an allowed pair.

In and out as in `attention.py`, which calls this where it is the faster way.

A row of many short examples so costs what these cost, and nothing of the size T x T is ever held. Which tiles are
needed is known when the step runs: the loops over them have a dynamic length, so the gradients are a rule of their own.
Softmax runs along (maximum and total of what was seen so far), and is kept for the backward pass as its logarithm
(FlashAttention, Dao et al. 2022, algorithms 1 and 2).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxsft.model.layers import precision

TILE = 64
"""Queries, and keys, of a small tile: few enough that short examples meet little of each other."""
SMALL_IN_LARGE = 8
"""A large tile has so many small ones along each side. It takes their place where those needed hold at least half of
the pairs that it computes, as larger matmuls take half the time."""
STRIPS = 4
"""A large tile on the diagonal, in which no query sees the keys after it, is computed in so many strips of queries,
each with the keys up to its end: 10 of 16 parts."""

SAVED_NAME = "attention"
"""Name of what a layer can keep for its backward pass, where it keeps no more of it than matmuls and attention."""

LOWEST = float(jnp.finfo(jnp.float32).min)
"""Score of a pair that is not allowed. Maxima begin above it, so exp(score - maximum) is exactly 0 from the start."""


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention_in_tiles(
    rule: Rule,
    tile: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    segment_ids: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """As `attention.attention` of T queries to the T keys of the same tokens.

    Args:
        rule: scale, window and soft cap.
        tile: side of a small tile, which divides T.
        q: [B, T, N, H].
        k: [B, T, K, H], as is `v`.
        sinks: [N], or none.
        segment_ids: int32 [B, T], as is `positions`.

    Returns:
        [B, T, N, H] in the dtype of `q`.
    """
    return _forward(rule, tile, q, k, v, sinks, segment_ids, positions)[0]


def _forward(rule: Rule, tile: int, *arrays: Any) -> tuple[jax.Array, Any]:
    q, k, v, sinks, segment_ids, positions = arrays
    q_tiles, k_tiles, v_tiles = _grouped(q, k.shape[2]), _by_head(k), _by_head(v)
    einsum = _einsum(q.dtype)

    def add(at: Tile, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, maximum, total = (at.queries(x) for x in totals)
        scores = rule.scores(einsum("kmh,ksh->kms", at.queries(q_tiles), at.keys(k_tiles)))
        scores = jnp.where(_allowed(rule, at, segment_ids, positions, scores), scores, LOWEST)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
        exponentials = jnp.exp(scores - new_maximum[..., None])
        shrink = jnp.exp(maximum - new_maximum)
        out = out * shrink[..., None] + einsum("kms,ksh->kmh", exponentials.astype(v.dtype), at.keys(v_tiles))
        new = out, new_maximum, total * shrink + exponentials.sum(axis=-1)
        return tuple(at.put_queries(x, part) for x, part in zip(totals, new, strict=True))

    shape = q_tiles.shape[:-1]
    maximum, total = jnp.full(shape, LOWEST / 2), jnp.zeros(shape, jnp.float32)
    if sinks is not None:
        maximum, total = jnp.broadcast_to(_of_heads(sinks, k.shape[2]), shape), total + 1
    totals = _over_tiles(rule, tile, positions, add, (jnp.zeros(q_tiles.shape, jnp.float32), maximum, total))
    out, maximum, total = totals
    out = _ungrouped(out / total[..., None]).astype(q.dtype)
    # Remat keeps both, so that it runs no loop again.
    out, log_total = (checkpoint_name(x, SAVED_NAME) for x in (out, maximum + jnp.log(total)))
    return out, (*arrays, out, log_total)


@jax.named_scope("attention")
def _backward(rule: Rule, tile: int, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    q, k, v, sinks, segment_ids, positions, out, log_total = kept
    num_kv_heads, einsum = k.shape[2], _einsum(q.dtype)
    q_tiles, out_gradient = _grouped(q, num_kv_heads), _grouped(gradient, num_kv_heads)
    k_tiles, v_tiles = _by_head(k), _by_head(v)
    # A matmul that contracts the rows of both factors is slow on a CPU: gradients of keys are made, and added up, with
    # the head dim first.
    q_turned, gradient_turned = (jnp.moveaxis(x, -1, 2) for x in (q_tiles, out_gradient))
    # sum_s p_ts * dp_ts, where dp_ts = gradient_t . v_s
    mean = (out_gradient.astype(jnp.float32) * _grouped(out, num_kv_heads)).sum(axis=-1)

    def add(at: Tile, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        scores, to_products = jax.vjp(rule.scores, einsum("kmh,ksh->kms", at.queries(q_tiles), at.keys(k_tiles)))
        scores = jnp.where(_allowed(rule, at, segment_ids, positions, scores), scores, LOWEST)
        probabilities = jnp.exp(scores - at.queries(log_total)[..., None])
        by_probability = einsum("kmh,ksh->kms", at.queries(out_gradient), at.keys(v_tiles))
        (by_product,) = to_products(probabilities * (by_probability - at.queries(mean)[..., None]))
        by_product, probabilities = by_product.astype(q.dtype), probabilities.astype(q.dtype)
        of_q, of_k, of_v = totals
        return (
            at.put_queries(of_q, at.queries(of_q) + einsum("kms,ksh->kmh", by_product, at.keys(k_tiles))),
            at.put_keys(of_k, at.keys(of_k, 3) + einsum("khm,kms->khs", at.queries(q_turned, 3), by_product), 3),
            at.put_keys(
                of_v, at.keys(of_v, 3) + einsum("khm,kms->khs", at.queries(gradient_turned, 3), probabilities), 3
            ),
        )

    nothing = [
        jnp.zeros(x.shape, jnp.float32) for x in (q_tiles, *(jnp.moveaxis(x, -1, 2) for x in (k_tiles, v_tiles)))
    ]
    of_q, of_k, of_v = _over_tiles(rule, tile, positions, add, tuple(nothing))
    of_sinks = None
    if sinks is not None:
        taken = jnp.exp(_of_heads(sinks, num_kv_heads) - log_total)
        of_sinks = -(taken * mean).sum(axis=(0, 2)).reshape(sinks.shape).astype(sinks.dtype)
    of_k, of_v = (jnp.transpose(x, (0, 3, 1, 2)).astype(k.dtype) for x in (of_k, of_v))
    return _ungrouped(of_q).astype(q.dtype), of_k, of_v, of_sinks, None, None


attention_in_tiles.defvjp(_forward, _backward)


class Tile(NamedTuple):
    """`num_queries` from `query` on and `num_keys` from `key` on, of one row. Arrays are cut along T or S."""

    num_queries: int
    num_keys: int
    row: jax.Array
    query: jax.Array
    key: jax.Array

    def queries(self, x: jax.Array, axis: int = 2) -> jax.Array:
        """[B, K, T, G, ...] to [K, T' * G, ...]: queries of a group are the rows of one matmul."""
        part = _part(x, self.row, self.query, self.num_queries, axis)
        return part.reshape(*part.shape[: axis - 1], -1, *part.shape[axis + 1 :])

    def keys(self, x: jax.Array, axis: int = 2) -> jax.Array:
        """[B, K, S, ...] to [K, S', ...]."""
        return _part(x, self.row, self.key, self.num_keys, axis)

    def put_queries(self, x: jax.Array, part: jax.Array) -> jax.Array:
        return _put(x, part.reshape(x.shape[1], self.num_queries, *x.shape[3:]), self.row, self.query, 2)

    def put_keys(self, x: jax.Array, part: jax.Array, axis: int = 2) -> jax.Array:
        return _put(x, part, self.row, self.key, axis)


def _part(x: jax.Array, row: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    starts: list[Any] = [0] * x.ndim
    sizes = list(x.shape)
    starts[0], starts[axis], sizes[0], sizes[axis] = row, start, 1, size
    return jax.lax.dynamic_slice(x, starts, sizes)[0]


def _put(x: jax.Array, part: jax.Array, row: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    starts: list[Any] = [0] * x.ndim
    starts[0], starts[axis] = row, start
    return jax.lax.dynamic_update_slice(x, part[None], starts)


def _allowed(rule: Rule, at: Tile, segment_ids: jax.Array, positions: jax.Array, like: jax.Array) -> jax.Array:
    """Which pairs of a tile count, [1, T' * G, S']: one line for each row of `like` [K, T' * G, S']."""
    segments, places = (
        (_part(x, at.row, at.query, at.num_queries, 1), _part(x, at.row, at.key, at.num_keys, 1))
        for x in (segment_ids, positions)
    )
    allowed = rule.allowed(segments, places)
    groups = like.shape[1] // at.num_queries
    return jnp.broadcast_to(allowed[:, None], (at.num_queries, groups, at.num_keys)).reshape(1, *like.shape[1:])


def _over_tiles(rule: Rule, tile: int, positions: jax.Array, add: Callable[[Tile, Any], Any], totals: Any) -> Any:
    for kind, needed in _needed(rule, tile, positions):
        which = jnp.nonzero(needed, size=needed.size)

        def of_kind(n: jax.Array | int, totals: Any, kind: Kind = kind, which: tuple = which) -> Any:
            row, query, key = (x[n] for x in which)
            for first, num_queries, num_keys in kind.strips():
                totals = add(Tile(num_queries, num_keys, row, query * kind.size + first, key * kind.size), totals)
            return totals

        if needed.size == 1:
            # XLA would move the matmuls out of a loop over a single tile, and compute them whether needed or not.
            of_this = functools.partial(of_kind, 0)
            totals = jax.lax.cond(needed.reshape(()), of_this, lambda totals: totals, totals)
        else:
            totals = jax.lax.fori_loop(0, jnp.count_nonzero(needed), of_kind, totals)
    return totals


class Kind(NamedTuple):
    """Tiles of one size; `on_diagonal` if all lie there and are computed in strips."""

    size: int
    on_diagonal: bool

    def strips(self) -> list[tuple[int, int, int]]:
        """What is computed, one after another: first query, number of queries, number of keys from the first on."""
        if not self.on_diagonal:
            return [(0, self.size, self.size)]
        strip = self.size // STRIPS
        return [(first, strip, first + strip) for first in range(0, self.size, strip)]

    def enough(self) -> int:
        """Half of the pairs that are computed."""
        return sum(queries * keys for _, queries, keys in self.strips()) // 2


def _needed(rule: Rule, tile: int, positions: jax.Array) -> Iterator[tuple[Kind, jax.Array]]:
    """Kinds of tiles, and which [B, T / size, T / size] of them are computed; every allowed pair is in one."""
    num_rows, length = positions.shape
    num_tiles = length // tile
    before = positions if rule.window is None else jnp.minimum(positions, rule.window - 1)
    # Positions grow by 1 or more inside an example, so it begins no earlier than this.
    first = jnp.maximum(jnp.arange(length) - before, 0).reshape(num_rows, num_tiles, tile).min(axis=2) // tile
    index = jnp.arange(num_tiles)
    needed = (index >= first[..., None]) & (index <= index[:, None])
    num_large = num_tiles // SMALL_IN_LARGE
    if num_large:
        inner = num_large * SMALL_IN_LARGE
        parts = needed[:, :inner, :inner].reshape(num_rows, num_large, SMALL_IN_LARGE, num_large, SMALL_IN_LARGE)
        pairs, diagonal = parts.sum(axis=(2, 4)) * tile**2, jnp.eye(num_large, dtype=bool)
        on, off = Kind(tile * SMALL_IN_LARGE, on_diagonal=True), Kind(tile * SMALL_IN_LARGE, on_diagonal=False)
        is_large = pairs >= jnp.where(diagonal, on.enough(), off.enough())
        yield on, is_large & diagonal
        if num_large > 1:
            yield off, is_large & ~diagonal
        needed = needed.at[:, :inner, :inner].set(
            (parts & ~is_large[:, :, None, :, None]).reshape(num_rows, inner, inner)
        )
    yield Kind(tile, on_diagonal=False), needed


def _grouped(x: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B, T, N, H] to [B, K, T, G, H]."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], num_kv_heads, -1, x.shape[-1]), 2, 1)


def _ungrouped(x: jax.Array) -> jax.Array:
    """The way back from `_grouped`."""
    x = jnp.moveaxis(x, 1, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _by_head(x: jax.Array) -> jax.Array:
    """[B, S, K, H] to [B, K, S, H]."""
    return jnp.moveaxis(x, 2, 1)


def _of_heads(sinks: jax.Array, num_kv_heads: int) -> jax.Array:
    """[N] to float32 [1, K, 1, G]."""
    return sinks.astype(jnp.float32).reshape(1, num_kv_heads, 1, -1)


def _einsum(dtype: jnp.dtype) -> Callable[..., jax.Array]:
    return functools.partial(jnp.einsum, precision=precision(dtype), preferred_element_type=jnp.float32)
