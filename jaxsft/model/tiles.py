"""Self-attention of packed rows, tile by tile: those (queries x keys) that hold an allowed pair.

In and out as in `attention.py`, which calls this on one CPU device, where it is the faster way, and where positions are
cut over the mesh axis `context`.

A row of many short examples so costs what these cost, and nothing of the size T x T is ever held. Which tiles are
needed is known when the step runs: the loops over them have a dynamic length, so the gradients are a rule of their own.
Softmax runs along (maximum and total of what was seen so far), and is kept for the backward pass as its logarithm
(FlashAttention, Dao et al. 2022, algorithms 1 and 2).

Where positions are cut, queries stay on their device. Keys and values are gathered before a loop, and their gradients
reduced after it: devices need different tiles, and nothing that all take part in may lie inside the loops. Where each
device has several chunks of the row, the first ones are gathered and gone over, then the second ones, so that no device
ever holds all keys of the row. Only its own are kept for the backward pass, which gathers them again.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsft.mesh import TOKEN_AXES, free_axes, partition_spec
from jaxsft.model.needed import Cut, Kind, Rule, needed_tiles
from jaxsft.model.products import precision
from jaxsft.model.remat import keep

LOWEST = float(jnp.finfo(jnp.float32).min)
"""Score of a pair that is not allowed. Maxima begin above it, so exp(score - maximum) is exactly 0 from the start."""


class Rows(NamedTuple):
    """Segments and positions of queries and of keys."""

    q_segment_ids: Any
    """int32 [B, T], as is `q_positions`."""
    q_positions: Any
    kv_segment_ids: Any
    """int32 [B, T], held whole by every device, as is `kv_positions`."""
    kv_positions: Any
    order: Any
    """int32 [T / chunk]: which chunk of the row lies in each place; those of a device lie side by side."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention_in_tiles(
    rule: Rule, cut: Cut, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, rows: Rows
) -> jax.Array:
    """As `attention.attention` of T queries to the T keys of the same tokens.

    Args:
        rule: scale, window and soft cap.
        cut: into chunks and tiles.
        q: [B, T, N, H].
        k: [B, T, K, H], as is `v`.
        sinks: [N], or none.
        rows: segments, positions and order. `[0, 3, 1, 2]` says that the first quarter of `q`, `k` and `v` is that of
            the row, and the second quarter is the row's last.

    Returns:
        [B, T, N, H] in the dtype of `q`.
    """
    return _forward(rule, cut, q, k, v, sinks, rows)[0]


_ROWS = Rows("b t", "b t", "b s", "b s", "a")
_INPUTS = ("b t n h", "b t k h", "b t k h", "n", _ROWS)
"""The dims of what `attention_in_tiles` is given."""


def _forward(rule: Rule, cut: Cut, *inputs: Any) -> tuple[jax.Array, Any]:
    results = _over_mesh(cut, functools.partial(_local, rule, cut), inputs, _INPUTS, ("b t n h", "b k t g"))
    # Remat keeps both, so that it runs no loop again.
    out, log_total = (keep(x, "attention") for x in results)
    return out, (*inputs, out, log_total)


@jax.named_scope("attention")
def _backward(rule: Rule, cut: Cut, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    local = functools.partial(_local_gradients, rule, cut, free_axes(TOKEN_AXES))
    dims = (*_INPUTS, "b t n h", "b k t g", "b t n h")
    return (*_over_mesh(cut, local, (*kept, gradient), dims, _INPUTS[:4]), None)


attention_in_tiles.defvjp(_forward, _backward)


def _over_mesh(cut: Cut, local: Callable, inputs: tuple, dims: Any, result_dims: Any) -> Any:
    """Runs `local` on each device's own part of the inputs, whose dims are named by letters."""
    if not cut.on_mesh:
        return local(*inputs)
    in_specs, out_specs = jax.tree.map(partition_spec, dims), jax.tree.map(partition_spec, result_dims)
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*inputs)


def _local(
    rule: Rule, cut: Cut, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, rows: Rows
) -> tuple[jax.Array, jax.Array]:
    """One device's part of the forward pass: [B, T, N, H], and the logarithm of the softmax's total [B, K, T, G]."""
    num_kv_heads, einsum = k.shape[2], _einsum(q.dtype)
    q_tiles = cut.fill(_grouped(q, num_kv_heads), 2)

    def add(keys: _Keys, at: Tile, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, maximum, total = (at.queries(x) for x in totals)
        scores = rule.scores(einsum("kmh,ksh->kms", at.queries(q_tiles), at.keys(keys.k)))
        scores = jnp.where(_allowed(rule, at, keys.rows, scores), scores, LOWEST)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
        exponentials = jnp.exp(scores - new_maximum[..., None])
        shrink = jnp.exp(maximum - new_maximum)
        out = out * shrink[..., None] + einsum("kms,ksh->kmh", exponentials.astype(v.dtype), at.keys(keys.v))
        new = out, new_maximum, total * shrink + exponentials.sum(axis=-1)
        return tuple(at.put_queries(x, part) for x, part in zip(totals, new, strict=True))

    shape = q_tiles.shape[:-1]
    maximum, total = jnp.full(shape, LOWEST / 2), jnp.zeros(shape, jnp.float32)
    if sinks is not None:
        maximum, total = jnp.broadcast_to(_of_heads(sinks, num_kv_heads), shape), total + 1
    totals: Any = (jnp.zeros(q_tiles.shape, jnp.float32), maximum, total)
    for number in range(k.shape[1] // cut.chunk):
        (k, v), totals = _after(number, (k, v), totals)
        totals = _over_tiles(rule, cut, _gathered(cut, k, v, rows, number), add, totals)
    out, maximum, total = (cut.unfill(x, 2) for x in totals)
    return _ungrouped(out / total[..., None]).astype(q.dtype), maximum + jnp.log(total)


def _local_gradients(
    rule: Rule,
    cut: Cut,
    token_axes: tuple[str, ...],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    rows: Rows,
    out: jax.Array,
    log_total: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array | None, ...]:
    """One device's part of the backward pass: gradients by q, k, v and sinks, these summed over `token_axes`."""
    num_kv_heads, einsum = k.shape[2], _einsum(q.dtype)
    q_tiles, out_gradient = (cut.fill(_grouped(x, num_kv_heads), 2) for x in (q, gradient))
    log_totals = cut.fill(log_total, 2)
    # A matmul that contracts the rows of both factors is slow on a CPU: gradients of keys are made, and added up, with
    # the head dim first.
    q_turned, gradient_turned = (jnp.moveaxis(x, -1, 2) for x in (q_tiles, out_gradient))
    # sum_s p_ts * dp_ts, where dp_ts = gradient_t . v_s
    mean = (out_gradient.astype(jnp.float32) * cut.fill(_grouped(out, num_kv_heads), 2)).sum(axis=-1)

    def add(keys: _Keys, at: Tile, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        scores, to_products = jax.vjp(rule.scores, einsum("kmh,ksh->kms", at.queries(q_tiles), at.keys(keys.k)))
        scores = jnp.where(_allowed(rule, at, keys.rows, scores), scores, LOWEST)
        probabilities = jnp.exp(scores - at.queries(log_totals)[..., None])
        by_probability = einsum("kmh,ksh->kms", at.queries(out_gradient), at.keys(keys.v))
        (by_product,) = to_products(probabilities * (by_probability - at.queries(mean)[..., None]))
        by_product, probabilities = by_product.astype(q.dtype), probabilities.astype(q.dtype)
        of_q, of_k, of_v = totals
        return (
            at.put_queries(of_q, at.queries(of_q) + einsum("kms,ksh->kmh", by_product, at.keys(keys.k))),
            at.put_keys(of_k, at.keys(of_k, 3) + einsum("khm,kms->khs", at.queries(q_turned, 3), by_product), 3),
            at.put_keys(
                of_v, at.keys(of_v, 3) + einsum("khm,kms->khs", at.queries(gradient_turned, 3), probabilities), 3
            ),
        )

    of_q: Any = jnp.zeros(q_tiles.shape, jnp.float32)
    of_keys: Any = []
    for number in range(k.shape[1] // cut.chunk):
        (k, v), (of_q, of_keys) = _after(number, (k, v), (of_q, of_keys))
        keys = _gathered(cut, k, v, rows, number)
        nothing = [jnp.zeros(jnp.moveaxis(x, -1, 2).shape, jnp.float32) for x in (keys.k, keys.v)]
        of_q, *of_these = _over_tiles(rule, cut, keys, add, (of_q, *nothing))
        of_keys.append([_scatter(cut, cut.unfill(x, 3)) for x in of_these])
    of_sinks = None
    if sinks is not None:
        taken = jnp.exp(_of_heads(sinks, num_kv_heads) - log_total)
        of_sinks = -(taken * cut.unfill(mean, 2)).sum(axis=(0, 2)).reshape(sinks.shape)
        of_sinks = (jax.lax.psum(of_sinks, token_axes) if cut.on_mesh else of_sinks).astype(sinks.dtype)
    of_k, of_v = (jnp.concatenate(chunks, axis=3) for chunks in zip(*of_keys, strict=True))
    of_k, of_v = (jnp.transpose(x, (0, 3, 1, 2)).astype(k.dtype) for x in (of_k, of_v))
    return _ungrouped(cut.unfill(of_q, 2)).astype(q.dtype), of_k, of_v, of_sinks


class _Keys(NamedTuple):
    """Keys and values that a device holds at once: of every device's chunks, those in the same place."""

    k: jax.Array
    """[B, K, S, H], as is `v`, in chunks that are filled up."""
    v: jax.Array
    rows: Rows
    """Of this device's queries, and of these keys, filled up with a segment of its own: finite, and cut off again."""
    q_order: jax.Array
    """int32: which chunks of the row the queries are."""
    kv_order: jax.Array


def _gathered(cut: Cut, k: jax.Array, v: jax.Array, rows: Rows, number: int) -> _Keys:
    """The keys of chunk `number` of each device; k and v are [B, T, K, H], of this device."""
    num_own = k.shape[1] // cut.chunk
    own = slice(number * cut.chunk, (number + 1) * cut.chunk)
    k, v = (cut.fill(_gather(cut, _by_head(x[:, own])), 2) for x in (k, v))
    segment_ids, positions = (
        x.reshape(len(x), -1, num_own, cut.chunk)[:, :, number].reshape(len(x), -1)
        for x in (rows.kv_segment_ids, rows.kv_positions)
    )
    order = rows.order.reshape(-1, num_own)
    these = Rows(
        cut.fill(rows.q_segment_ids, value=-1),
        cut.fill(rows.q_positions),
        cut.fill(segment_ids, value=-1),
        cut.fill(positions),
        rows.order,
    )
    return _Keys(k, v, these, order[jax.lax.axis_index("context") if cut.on_mesh else 0], order[:, number])


def _gather(cut: Cut, x: jax.Array) -> jax.Array:
    """[B, K, S, H] of all devices, side by side."""
    return jax.lax.all_gather(x, "context", axis=2, tiled=True) if cut.on_mesh else x


def _scatter(cut: Cut, x: jax.Array) -> jax.Array:
    """The way back, for gradients: of [B, K, H, S], the sum over devices of this device's part."""
    return jax.lax.psum_scatter(x, "context", scatter_dimension=3, tiled=True) if cut.on_mesh else x


def _after(number: int, inputs: Any, done: Any) -> Any:
    """What a part needs, not before those that came before it are done: together, they would hold all keys."""
    return (inputs, done) if number == 0 else jax.lax.optimization_barrier((inputs, done))


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


def _allowed(rule: Rule, at: Tile, rows: Rows, like: jax.Array) -> jax.Array:
    """Which pairs of a tile count, [1, T' * G, S']: one line for each row of `like` [K, T' * G, S']."""
    segments, places = (
        (_part(of_q, at.row, at.query, at.num_queries, 1), _part(of_kv, at.row, at.key, at.num_keys, 1))
        for of_q, of_kv in (
            (rows.q_segment_ids, rows.kv_segment_ids),
            (rows.q_positions, rows.kv_positions),
        )
    )
    allowed = rule.allowed(segments, places)
    groups = like.shape[1] // at.num_queries
    return jnp.broadcast_to(allowed[:, None], (at.num_queries, groups, at.num_keys)).reshape(1, *like.shape[1:])


def _over_tiles(rule: Rule, cut: Cut, keys: _Keys, add: Callable[[_Keys, Tile, Any], Any], totals: Any) -> Any:
    for kind, needed in needed_tiles(rule, cut, keys.rows.q_positions, keys.q_order, keys.kv_order):
        row, query, key = jnp.nonzero(needed, size=needed.size)
        which = row, kind.start(cut, query), kind.start(cut, key)

        def of_kind(n: jax.Array | int, totals: Any, kind: Kind = kind, which: tuple = which) -> Any:
            row, query, key = (x[n] for x in which)
            for offset, num_queries, num_keys in kind.strips():
                totals = add(keys, Tile(num_queries, num_keys, row, query + offset, key), totals)
            return totals

        if needed.size == 1:
            # XLA would move the matmuls out of a loop over a single tile, and compute them whether needed or not.
            of_this = functools.partial(of_kind, 0)
            totals = jax.lax.cond(needed.reshape(()), of_this, lambda totals: totals, totals)
        else:
            totals = jax.lax.fori_loop(0, jnp.count_nonzero(needed), of_kind, totals)
    return totals


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
