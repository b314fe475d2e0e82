"""Attention: queries of packed rows against keys of the same rows, or of a cache.

One function; what may attend to what follows from segment ids and positions alone, so a packed row, a padded row and a
half-filled cache are one case. Projections and rotary positions are `decoder.py`'s.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsft.mesh import on_cpu
from jaxsft.model.layers import precision

BLOCK_SIZE = 128
"""Queries whose scores exist at once."""
CPU_BLOCK_SIZE = 64
"""The same where a CPU passes over keys (`_passing_over`): the smaller a block, the fewer keys of others it meets."""
LONG_ROW = 1024
"""Tokens of a row from which on that is worth it: matmuls of small blocks are slow."""

NUM_STAGES = 4
"""Self-attention goes over its blocks in so many loops of growing key length: 5/8 of the work of one loop over all
keys, where unrolling every block would save 1/2 but compile for long, and hold the scores of many blocks at once."""


@jax.named_scope("attention")
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    block_size: int | None = None,
) -> jax.Array:
    """Causal attention within segments, with float32 softmax, in memory linear in T.

    A query attends to the keys of its own segment at its own position or an earlier one. Padding (segment 0) attends to
    padding, so that no row is empty and nothing becomes NaN. Positions restart in each segment:

        segment_ids = [1, 1, 2, 2, 2, 0]      query 3 (segment 2, position 1) attends to keys 2 and 3
        positions   = [0, 1, 0, 1, 2, 0]

    Query heads are grouped: head n reads key/value head n // (N / K).

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H], as is `v`; K divides N.
        q_segment_ids: int32 [B, T], as is `q_positions`.
        kv_segment_ids: int32 [B, S], as is `kv_positions`. Every query must be allowed at least one key. Where S == T,
            key i is that of query i (self-attention) and positions grow with the index inside a segment, so the keys
            after a query are not looked at.
        scale: what scores are multiplied by; 1 / sqrt(H) if left out.
        window: keys that a query sees at most, counted back from its own position; all if left out.
        soft_cap: scores become soft_cap * tanh(score / soft_cap) (Gemma 2).
        sinks: [N], a score of each head for attending to nothing (gpt-oss).
        block_size: queries computed at once; keeps [B, N, block, S] scores instead of [B, N, T, S]. If left out, what
            is fast.

    Returns:
        [B, T, N, H] in the dtype of `q`.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    is_self = num_keys == num_queries
    dense = functools.partial(
        _dense, scale=q.shape[-1] ** -0.5 if scale is None else scale, window=window, soft_cap=soft_cap
    )
    if is_self and num_queries >= LONG_ROW and _is_one_cpu():
        block_size = min(block_size or CPU_BLOCK_SIZE, num_queries)
        fill = -num_queries % block_size
        # What fills up the last block is a segment of its own: finite, and cut off again.
        q, k, v, positions = (_fill(x, fill) for x in (q, k, v, q_positions))
        out = _passing_over(dense, block_size, q, k, v, sinks, _fill(q_segment_ids, fill, -1), positions)
        return out[:, :num_queries]
    block_size, dense = block_size or BLOCK_SIZE, functools.partial(dense, sinks=sinks)
    num_blocks = -(-num_queries // block_size)
    # Queries that fill up the last block are padding: finite, and cut off again.
    fill = num_blocks * block_size - num_queries if num_blocks > 1 else 0
    queries = [_fill(x, fill) for x in (q, q_segment_ids, q_positions)]
    keys = [k, v, kv_segment_ids, kv_positions]

    reach = block_size if window is None else block_size + window - 1
    if is_self and window is not None and reach < num_keys:
        keys = [_fill(k, fill), _fill(v, fill), _fill(kv_segment_ids, fill, -1), _fill(kv_positions, fill)]
        return _in_blocks(queries, keys, dense, block_size=block_size, reach=reach)[:, :num_queries]
    num_stages = min(num_blocks, NUM_STAGES) if is_self else 1
    bounds = [num_blocks * stage // num_stages * min(block_size, num_queries) for stage in range(num_stages + 1)]
    outs: list[jax.Array] = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        seen = min(end, num_keys) if is_self else num_keys
        stage_queries = [x[:, start:end] for x in queries]
        if outs:
            # One stage after the other: run side by side, each would hold its own scores.
            stage_queries, outs[-1] = jax.lax.optimization_barrier((stage_queries, outs[-1]))
        outs.append(_in_blocks(stage_queries, [x[:, :seen] for x in keys], dense, block_size=block_size))
    out = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)
    return out[:, :num_queries]


def _fill(x: jax.Array, count: int, value: int = 0) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2), constant_values=value) if count else x


def _in_blocks(
    queries: list[jax.Array], keys: list[jax.Array], dense: Callable, *, block_size: int, reach: int | None = None
) -> jax.Array:
    """One block of queries after the other; T is at most `block_size`, or a multiple of it.

    Args:
        queries: q, segment ids and positions.
        keys: k, v, segment ids and positions.
        dense: attention of some queries to some keys.
        block_size: queries computed at once.
        reach: keys that a block can see, up to its last query's own; all keys if left out.
    """
    length = queries[0].shape[1]

    # Recomputed in the backward pass, which so keeps no probabilities.
    @jax.checkpoint
    def block(start: jax.Array | int, queries: list[jax.Array]) -> jax.Array:
        seen = keys
        if reach is not None:
            # Where fewer keys than `reach` lie before a block, later ones are there, and not allowed.
            first = jnp.maximum(start + block_size - reach, 0)
            seen = [jax.lax.dynamic_slice_in_dim(x, first, min(reach, length), axis=1) for x in keys]
        return dense(*queries, *seen)

    if length <= block_size:
        return block(0, queries)

    starts = jnp.arange(0, length, block_size)
    return _joined(jax.lax.map(lambda each: block(*each), (starts, [_cut(x, block_size) for x in queries])))


# On one CPU device: rows are few, and to decide in the middle of a program costs nothing.


def _is_one_cpu() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return on_cpu() and (mesh.empty or mesh.size == 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _passing_over(
    dense: functools.partial,
    block_size: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    segment_ids: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """Self-attention that passes over the keys of examples that end before a block of queries begins.

    A row of many short examples so costs what these cost, not what one example of its length does. How many blocks of
    keys a block of queries needs is known when the step runs; of the programs for 1, 2, 3, 4, 6, 8, 12, ... blocks, the
    first that is enough is taken. As many as the row of the batch asks for that needs most.

    Args:
        dense: attention of some queries to some keys, with its static options.
        block_size: a divisor of T.
        q: [B, T, N, H], and k and v [B, T, K, H].
        sinks: as in `attention`.
        segment_ids: int32 [B, T], as is `positions`.
    """
    choices, sizes = _choices(dense, block_size, positions)

    def block(each: tuple) -> jax.Array:
        at, choice, *queries = each

        def of_size(size: int) -> Callable[[], jax.Array]:
            return lambda: dense(*queries, *_seen(at, size, (k, v, segment_ids, positions)), sinks=sinks)

        return jax.lax.switch(choice, [of_size(size) for size in sizes])

    ends = jnp.arange(block_size, q.shape[1] + 1, block_size)
    return _joined(jax.lax.map(block, (ends, choices, *(_cut(x, block_size) for x in (q, segment_ids, positions)))))


def _choices(dense: functools.partial, block_size: int, positions: jax.Array) -> tuple[jax.Array, list[int]]:
    """For each block of queries, which of some numbers of keys it takes, all multiples of the block size; and these."""
    length = positions.shape[1]
    num_blocks, window = length // block_size, dense.keywords["window"]
    before = positions if window is None else jnp.minimum(positions, window - 1)
    # Positions grow by 1 or more inside an example, so it begins no earlier than this.
    first = jnp.maximum(jnp.arange(length) - before, 0).min(axis=0).reshape(num_blocks, block_size).min(axis=1)
    needed = jnp.arange(1, num_blocks + 1) - first // block_size
    sizes = [n for n in range(1, num_blocks) if n & (n - 1) == 0 or (n % 3 == 0 and n // 3 & (n // 3 - 1) == 0)]
    sizes.append(num_blocks)
    return jnp.searchsorted(jnp.array(sizes), needed), [size * block_size for size in sizes]


def _seen(end: jax.Array, size: int, keys: tuple[jax.Array, ...]) -> list[jax.Array]:
    """The `size` keys up to `end`; where there are fewer, later ones are there, and not allowed."""
    return [jax.lax.dynamic_slice_in_dim(x, jnp.maximum(end - size, 0), size, axis=1) for x in keys]


def _cut(x: jax.Array, block_size: int) -> jax.Array:
    """[B, T, ...] to [T / block, B, block, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block_size, *x.shape[2:]), 1, 0)


def _joined(blocks: jax.Array) -> jax.Array:
    """The way back from `_cut`."""
    whole = jnp.moveaxis(blocks, 0, 1)
    return whole.reshape(whole.shape[0], -1, *whole.shape[3:])


def _passing_over_forward(dense: functools.partial, block_size: int, *arrays: Any) -> Any:
    return _passing_over(dense, block_size, *arrays), arrays


@jax.named_scope("attention")
def _passing_over_backward(dense: functools.partial, block_size: int, arrays: Any, gradient: jax.Array) -> Any:
    """Block by block once more, of which no probabilities were kept; gradients of keys add up where they lie."""
    q, k, v, sinks, segment_ids, positions = arrays
    choices, sizes = _choices(dense, block_size, positions)

    def block(totals: Any, each: tuple) -> tuple[Any, jax.Array]:
        at, choice, q_block, segments, places, gradient_block = each

        def of_size(size: int) -> Callable[[Any], Any]:
            def run(totals: Any) -> Any:
                *seen, kv_segments, kv_places = _seen(at, size, (k, v, segment_ids, positions))

                def of(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
                    return dense(q, segments, places, k, v, kv_segments, kv_places, sinks=sinks)

                q_gradient, *gradients, of_sinks = jax.vjp(of, q_block, *seen, sinks)[1](gradient_block)
                new = [
                    jax.lax.dynamic_update_slice_in_dim(total, part + more, jnp.maximum(at - size, 0), axis=1)
                    for total, part, more in zip(totals[:2], _seen(at, size, totals[:2]), gradients, strict=True)
                ]
                return (*new, jax.tree.map(jnp.add, totals[2], of_sinks)), q_gradient

            return run

        return jax.lax.switch(choice, [of_size(size) for size in sizes], totals)

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (k, v, sinks))
    ends = jnp.arange(block_size, q.shape[1] + 1, block_size)
    queries = (_cut(x, block_size) for x in (q, segment_ids, positions, gradient))
    totals, q_gradient = jax.lax.scan(block, nothing, (ends, choices, *queries))
    gradients = jax.tree.map(lambda total, x: total.astype(x.dtype), totals, (k, v, sinks))
    return _joined(q_gradient), *gradients, None, None


_passing_over.defvjp(_passing_over_forward, _passing_over_backward)


def _dense(
    q: jax.Array,
    q_segment_ids: jax.Array,
    q_positions: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_segment_ids: jax.Array,
    kv_positions: jax.Array,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """Softmax attention with all scores at once."""
    batch, num_queries, num_heads, head_dim = q.shape
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    allowed = (q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]) & (distance >= 0)
    if window is not None:
        allowed &= distance < window
    q_btkgh = q.reshape(batch, num_queries, k.shape[2], num_heads // k.shape[2], head_dim)
    einsum = functools.partial(jnp.einsum, precision=precision(q.dtype))
    # In the order that a matmul gives them: XLA on CPU would turn [B, K, G, T, S] around, as large as they are.
    scores = einsum("btkgh,bskh->bktgs", q_btkgh, k, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    # A finite floor: -inf - -inf would be NaN. exp of it is exactly 0, in the gradients as well.
    scores = jnp.where(allowed[:, None, :, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        nothing = sinks.astype(jnp.float32).reshape(1, k.shape[2], 1, -1, 1)
        nothing = jnp.broadcast_to(nothing, (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, nothing], axis=-1)
    probabilities = jax.nn.softmax(scores, axis=-1)
    if sinks is not None:
        probabilities = probabilities[..., :-1]
    return einsum("bktgs,bskh->btkgh", probabilities.astype(v.dtype), v).reshape(q.shape)
