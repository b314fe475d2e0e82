"""Self-attention of packed rows on TPUs, block by block: those (queries x keys) that hold an allowed pair.

In and out as in `attention.py`, which calls this where it can be had. A row of many short examples costs what these
cost, the sum of the squares of their lengths in whole blocks: the kernels (`packed_kernels.py`) go over a list of the
blocks that hold an allowed pair (`pairs.py`). Kernels that go by the place in the row alone compute half the square of
its length.

One kernel goes forward, one makes the gradients by queries, one those by keys and values (FlashAttention 2, Dao 2023,
algorithms 1 and 2). Queries of a group are computed together, so that a block of keys is read once for all of them.

On a mesh each device calls them on its own rows, heads and queries, and holds the keys of whole rows for one layer.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft.mesh import num_parts, partition_spec
from jaxsft.model.keys import in_order_of_row, whole_rows
from jaxsft.model.needed import Rule
from jaxsft.model.packed_kernels import forward_kernel, key_kernel, query_kernel, run_kernel
from jaxsft.model.pairs import Blocks, Rows, block_sizes, filled, groups_of, pairs_of
from jaxsft.model.remat import keep


def packed_attention(
    rule: Rule,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    segment_ids: tuple[jax.Array, jax.Array],
    positions: tuple[jax.Array, jax.Array],
    *,
    order: Sequence[int] | None,
    block_size: int | None,
    interpret: bool,
) -> jax.Array:
    """As `attention.attention` of T queries to the T keys of the same tokens; padding gives zeros.

    Args:
        rule: scale, window and soft cap.
        q: [B, T, N, H], which the mesh in scope cuts evenly.
        k: [B, T, K, H], as is `v`.
        sinks: [N], or none.
        segment_ids: int32 [B, T] of queries, and of keys; 0 is padding.
        positions: as `segment_ids`.
        order: chunks of the row in the order in which devices hold them, those of a device growing; as they are in the
            row if left out.
        block_size: queries, and keys, of a block; if left out, those of `block_sizes`.
        interpret: run without a TPU, for tests.

    Returns:
        [B, T, N, H] in the dtype of `q`.
    """
    num_devices, length, group_size = num_parts("t"), q.shape[1], q.shape[2] // k.shape[2]
    num_groups = groups_of(group_size)
    order = tuple(range(num_devices) if order is None else order)
    sizes = (block_size,) * 2 if block_size else block_sizes(group_size // num_groups, q.shape[3])
    blocks = Blocks(*sizes, interpret=interpret)
    places = np.arange(length, dtype=np.int32).reshape(len(order), -1)[list(order)].reshape(num_devices, -1)
    assert (np.diff(places, axis=1) > 0).all(), "the chunks of a device stand in the order of the row"

    def local(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, *ids: jax.Array) -> jax.Array:
        own = jax.lax.axis_index("context") if num_devices > 1 else 0
        of_keys = [in_order_of_row(x, order) for x in ids[2:]]
        rows = Rows(ids[0], ids[1], jnp.asarray(places)[own], *of_keys)
        k, v = (jnp.repeat(whole_rows(x, order, num_devices), num_groups, axis=2) for x in (k, v))
        return attention_of_blocks(rule, blocks, q, k, v, sinks, rows)

    inputs = (q, k, v, sinks, segment_ids[0], positions[0], segment_ids[1], positions[1])
    if jax.sharding.get_abstract_mesh().empty:
        return local(*inputs)
    in_specs = tuple(map(partition_spec, ("b t n h", "b t k h", "b t k h", "n", "b t", "b t", "b s", "b s")))
    return jax.shard_map(local, in_specs=in_specs, out_specs=partition_spec("b t n h"), check_vma=False)(*inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention_of_blocks(
    rule: Rule, blocks: Blocks, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, rows: Rows
) -> jax.Array:
    """One device's part: its queries to all keys of its rows.

    Args:
        rule: scale, window and soft cap.
        blocks: how queries and keys are cut.
        q: [B, T, N, H].
        k: [B, S, K, H], in the order of the row, as is `v`.
        sinks: [N], or none.
        rows: segments, positions and places.

    Returns:
        [B, T, N, H] in the dtype of `q`.
    """
    return _forward(rule, blocks, q, k, v, sinks, rows)[0]


_INPUTS = ("head q", "head kv", "head kv", "q", "kv")
"""What blocks of `_Arrays` are looked up by."""


def _forward(rule: Rule, blocks: Blocks, *inputs: Any) -> tuple[jax.Array, Any]:
    q, k, v, sinks, rows = inputs
    arrays, (pairs, _) = _arrays(blocks, q, k, v, rows), pairs_of(rule, blocks, rows)
    num_kv_heads, num_blocks, lines, head_dim = arrays.q.shape
    of_sinks = [] if sinks is None else [(_sink_lines(blocks, sinks, num_kv_heads), "head")]
    out, log_total = run_kernel(
        "packed_forward",
        functools.partial(forward_kernel, rule, sinks is not None),
        blocks,
        pairs,
        [*zip(arrays, _INPUTS, strict=True), *of_sinks],
        [
            (jax.ShapeDtypeStruct(arrays.q.shape, q.dtype), "head q"),
            (jax.ShapeDtypeStruct((num_kv_heads, num_blocks, 1, lines), jnp.float32), "head q"),
        ],
        [(head_dim, lines), (1, lines), (1, lines)],
    )
    # Remat keeps both, so that it runs no kernel again.
    out, log_total = keep(_unlined(blocks, out, *q.shape[:2]), "attention"), keep(log_total, "attention")
    return out, (*inputs, out, log_total)


@jax.named_scope("attention")
def _backward(rule: Rule, blocks: Blocks, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    q, k, v, sinks, rows, out, log_total = kept
    arrays, (by_queries, by_keys) = _arrays(blocks, q, k, v, rows), pairs_of(rule, blocks, rows)
    lines = arrays.q.shape[2]
    # sum_s p_ts * dp_ts, where dp_ts = gradient_t . v_s
    means = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    mean = _lines(blocks, means, len(arrays.q)).reshape(log_total.shape)
    more = [(_lines(blocks, gradient, len(arrays.q)), "head q"), (log_total, "head q"), (mean, "head q")]
    inputs = [*zip(arrays, _INPUTS, strict=True), *more]
    (of_q,) = run_kernel(
        "packed_by_queries",
        functools.partial(query_kernel, rule),
        blocks,
        by_queries,
        inputs,
        [(jax.ShapeDtypeStruct(arrays.q.shape, q.dtype), "head q")],
        [(lines, q.shape[3])],
    )
    of_k, of_v = run_kernel(
        "packed_by_keys",
        functools.partial(key_kernel, rule),
        blocks,
        by_keys,
        inputs,
        [(jax.ShapeDtypeStruct(x.shape, x.dtype), "head kv") for x in (arrays.k, arrays.v)],
        [(blocks.keys, x.shape[3]) for x in (k, v)],
    )
    of_sinks: Any = None
    if sinks is not None:
        taken = jnp.exp(_sink_lines(blocks, sinks, len(arrays.q))[:, None] - log_total) * mean
        of_sinks = -taken.sum(axis=(1, 2)).reshape(len(taken), -1, blocks.queries).sum(axis=2)
        of_sinks = of_sinks.reshape(sinks.shape).astype(sinks.dtype)
    return (
        _unlined(blocks, of_q, *q.shape[:2]),
        _of_rows(of_k, *k.shape[:2]),
        _of_rows(of_v, *v.shape[:2]),
        of_sinks,
        None,
    )


attention_of_blocks.defvjp(_forward, _backward)


# The arrays, as the kernels want them.


class _Arrays(NamedTuple):
    """Cut into blocks: `M` lines of a block are the queries of the first head of a group, then those of the next."""

    q: jax.Array
    """[K, B * blocks, M, H]"""
    k: jax.Array
    """[K, B * blocks, keys of one, H], as is `v`."""
    v: jax.Array
    q_rows: jax.Array
    """int32 [B * blocks, 2, M]: segments and positions."""
    kv_columns: jax.Array
    """int32 [B * blocks, keys of one, 2]"""


def _arrays(blocks: Blocks, q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows) -> _Arrays:
    groups = q.shape[2] // k.shape[2]
    # Of padding, and of what fills up blocks, queries are of segment -1 and keys of segment 0.
    q_ids = jnp.stack([jnp.where(rows.q_segment_ids > 0, rows.q_segment_ids, -1), rows.q_positions], axis=1)
    kv_ids = filled(jnp.stack([rows.kv_segment_ids, rows.kv_positions], axis=2), blocks.keys)
    q_ids = filled(q_ids, blocks.queries, axis=2, value=-1)
    q_ids = jnp.swapaxes(q_ids.reshape(len(q), 2, -1, blocks.queries), 1, 2)
    return _Arrays(
        _lines(blocks, q, k.shape[2]),
        _by_head(blocks, k),
        _by_head(blocks, v),
        jnp.tile(q_ids.reshape(-1, 2, blocks.queries), (1, 1, groups)),
        kv_ids.reshape(-1, blocks.keys, 2),
    )


def _lines(blocks: Blocks, x: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B, T, N, H] to [K, B * blocks, M, H]."""
    x = filled(x, blocks.queries)
    x = x.reshape(len(x), -1, blocks.queries, num_kv_heads, x.shape[2] // num_kv_heads, x.shape[3])
    return jnp.transpose(x, (3, 0, 1, 4, 2, 5)).reshape(num_kv_heads, -1, blocks.queries * x.shape[4], x.shape[5])


def _unlined(blocks: Blocks, x: jax.Array, num_rows: int, length: int) -> jax.Array:
    """The way back from `_lines`."""
    x = x.reshape(len(x), num_rows, -1, x.shape[2] // blocks.queries, blocks.queries, x.shape[3])
    x = jnp.transpose(x, (1, 2, 4, 0, 3, 5))
    return x.reshape(num_rows, -1, x.shape[3] * x.shape[4], x.shape[5])[:, :length]


def _by_head(blocks: Blocks, x: jax.Array) -> jax.Array:
    """[B, S, K, H] to [K, B * blocks, keys of one, H]."""
    x = filled(x, blocks.keys)
    return jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1, blocks.keys, x.shape[3])


def _of_rows(x: jax.Array, num_rows: int, length: int) -> jax.Array:
    """The way back from `_by_head`."""
    x = x.reshape(len(x), num_rows, -1, x.shape[3])
    return jnp.moveaxis(x, 0, 2)[:, :length]


def _sink_lines(blocks: Blocks, sinks: jax.Array, num_kv_heads: int) -> jax.Array:
    """[N] to float32 [K, 1, M]."""
    sinks = sinks.astype(jnp.float32).reshape(num_kv_heads, 1, -1)
    return jnp.repeat(sinks, blocks.queries, axis=2)
