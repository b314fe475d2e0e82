"""Attention: queries of packed rows against keys of the same rows, or of a cache.

One function; what may attend to what follows from segment ids and positions alone, so a packed row, a padded row and a
half-filled cache are one case. Projections and rotary positions are `decoder.py`'s.
"""

import functools

import jax
import jax.numpy as jnp

from jaxsft.model.layers import precision

BLOCK_SIZE = 128
"""Queries whose scores exist at once. On CPU 128 is faster than 256 and 512, as the scores stay in its caches."""

NUM_STAGES = 4
"""Self-attention goes over its blocks in so many loops of growing key length: 5/8 of the work of one loop over all
keys, where unrolling every block would save 1/2 but compile for long, and hold the scores of many blocks at once."""


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    block_size: int = BLOCK_SIZE,
) -> jax.Array:
    """Causal attention within segments, with float32 softmax, in memory linear in T.

    A query attends to the keys of its own segment at its own position or an earlier one. Padding (segment 0) attends to
    padding, so that no row is empty and nothing becomes NaN. Positions restart in each segment:

        segment_ids = [1, 1, 2, 2, 2, 0]      query 3 (segment 2, position 1) attends to keys 2 and 3
        positions   = [0, 1, 0, 1, 2, 0]

    Query heads are grouped: head n reads key/value head n // (N / K). Scores are scaled by 1 / sqrt(H).

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H], as is `v`; K divides N.
        q_segment_ids: int32 [B, T], as is `q_positions`.
        kv_segment_ids: int32 [B, S], as is `kv_positions`. Every query must be allowed at least one key. Where S == T,
            key i is that of query i (self-attention) and positions grow with the index inside a segment, so the keys
            after a query are not looked at.
        block_size: queries computed at once; keeps [B, N, block, S] scores instead of [B, N, T, S].

    Returns:
        [B, T, N, H] in the dtype of `q`.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    num_blocks = -(-num_queries // block_size)
    # Queries that fill up the last block are padding: finite, and cut off again.
    fill = num_blocks * block_size - num_queries if num_blocks > 1 else 0
    queries = [_fill(x, fill) for x in (q, q_segment_ids, q_positions)]
    keys = (k, v, kv_segment_ids, kv_positions)

    num_stages = min(num_blocks, NUM_STAGES) if num_keys == num_queries else 1
    bounds = [num_blocks * stage // num_stages * min(block_size, num_queries) for stage in range(num_stages + 1)]
    outs: list[jax.Array] = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        seen = min(end, num_keys) if num_keys == num_queries else num_keys
        stage_queries = [x[:, start:end] for x in queries]
        if outs:
            # One stage after the other: run side by side, each would hold its own scores.
            stage_queries, outs[-1] = jax.lax.optimization_barrier((stage_queries, outs[-1]))
        outs.append(_in_blocks(*stage_queries, *(x[:, :seen] for x in keys), block_size=block_size))
    out = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)
    return out[:, :num_queries]


def _fill(x: jax.Array, count: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2)) if count else x


def _in_blocks(
    q: jax.Array,
    q_segment_ids: jax.Array,
    q_positions: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_segment_ids: jax.Array,
    kv_positions: jax.Array,
    *,
    block_size: int,
) -> jax.Array:
    """All keys for one block of queries after the other; T is at most `block_size`, or a multiple of it."""

    # Recomputed in the backward pass, which so keeps no probabilities.
    @jax.checkpoint
    def block(queries: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, segment_ids, positions = queries
        same_segment = segment_ids[:, :, None] == kv_segment_ids[:, None, :]
        not_later = kv_positions[:, None, :] <= positions[:, :, None]
        return _dense(q, k, v, same_segment & not_later)

    queries = (q, q_segment_ids, q_positions)
    if q.shape[1] <= block_size:
        return block(queries)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, block_size, *x.shape[2:]), 1, 0)

    return jnp.moveaxis(jax.lax.map(block, tuple(cut(x) for x in queries)), 0, 1).reshape(q.shape)


def _dense(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array) -> jax.Array:
    """Softmax attention with all scores at once; `allowed` is bool [B, T, S]."""
    batch, num_queries, num_heads, head_dim = q.shape
    q_btkgh = q.reshape(batch, num_queries, k.shape[2], num_heads // k.shape[2], head_dim)
    einsum = functools.partial(jnp.einsum, precision=precision(q.dtype))
    scores = einsum("btkgh,bskh->bkgts", q_btkgh, k, preferred_element_type=jnp.float32)
    # A finite floor: -inf - -inf would be NaN. exp of it is exactly 0, in the gradients as well.
    scores = jnp.where(allowed[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return einsum("bkgts,bskh->btkgh", probabilities, v).reshape(q.shape)
