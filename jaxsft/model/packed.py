"""Self-attention of packed rows on TPUs, block by block: those (queries x keys) that hold an allowed pair.

In and out as in `attention.py`, which calls this where it can be had. A row of many short examples costs what these
cost: the sum of the squares of their lengths, in whole blocks, where kernels that go by the place in the row alone
compute half the square of its length. Which blocks are needed is known when the step runs. They are made into a list
(`pairs_of`), over which the grid of a kernel runs, and in which it looks up what to read and write.

One kernel goes forward, one makes the gradients by queries, one those by keys and values (FlashAttention 2, Dao 2023,
algorithms 1 and 2). All of them hold scores turned, [keys, queries]: what there is one of for each query, such as the
softmax's total, then lies in rows, as a TPU wants it. Queries of a group are computed together, so that a block of keys
is read once for all of them.

On a mesh each device calls them on its own rows, heads and queries, and holds the keys of whole rows for one layer.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxsft.mesh import num_parts, partition_spec
from jaxsft.model.keys import in_order_of_row, whole_rows
from jaxsft.model.layers import precision
from jaxsft.model.needed import Rule
from jaxsft.model.remat import keep

LANES = 128
LARGEST_GROUP = 8
"""Query heads that are computed together. Of 64, scores of the smallest block do not fit into a v5p's memory on the
chip (VMEM); larger groups read their keys several times."""
LOWEST = float(jnp.finfo(jnp.float32).min)
"""Score of a pair that is not allowed. Maxima begin above it, so exp(score - maximum) is exactly 0 from the start."""


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
    """Queries and keys of a block: 512 lines of queries x heads of a group or a little more, and 256 keys.

    Smaller ones leave out more of what no query sees, larger ones spend less on their way. Not measured on a TPU.
    """
    lines = 512 if head_dim <= 128 else 256
    return max(lines // group_size // LANES, 1) * LANES, 256


def groups_of(group_size: int) -> int:
    """Into how many a group of query heads is cut: 1 up to 8 of them, 2 for 16, 3 for 9, 11 for 11."""
    return next(n for n in range(1, group_size + 1) if group_size % n == 0 and group_size // n <= LARGEST_GROUP)


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


# Which blocks.


def pairs_of(rule: Rule, blocks: Blocks, rows: Rows) -> tuple[Pairs, Pairs]:
    """Pairs of blocks in which a query may see a key, sorted by queries, and sorted by keys.

    With blocks of 4 and one row of segments of 6 and 2 tokens, queries 0 to 3 see block 0, queries 4 to 7 blocks 0 and
    1: (0, 0), (1, 0), (1, 1), and by keys (0, 0), (1, 0), (1, 1) again. Every block of queries and every block of keys
    is in some pair, so that each result is written.
    """
    num_rows, num_keys = rows.kv_segment_ids.shape
    # Positions grow by 1 or more inside an example, so it begins no earlier than this.
    before = rows.q_positions if rule.window is None else jnp.minimum(rows.q_positions, rule.window - 1)
    begin = jnp.where(rows.q_segment_ids > 0, jnp.maximum(rows.q_places - before, 0), rows.q_places)
    begin, place = (_filled(x, blocks.queries, mode="edge") for x in (begin, rows.q_places[None]))
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
    kv_ids = _filled(jnp.stack([rows.kv_segment_ids, rows.kv_positions], axis=2), blocks.keys)
    q_ids = _filled(q_ids, blocks.queries, axis=2, value=-1)
    q_ids = jnp.swapaxes(q_ids.reshape(len(q), 2, -1, blocks.queries), 1, 2)
    return _Arrays(
        _lines(blocks, q, k.shape[2]),
        _by_head(blocks, k),
        _by_head(blocks, v),
        jnp.tile(q_ids.reshape(-1, 2, blocks.queries), (1, 1, groups)),
        kv_ids.reshape(-1, blocks.keys, 2),
    )


def _filled(x: jax.Array, block: int, axis: int = 1, value: int = 0, mode: Any = "constant") -> jax.Array:
    """With whole blocks along an axis."""
    fill = [(0, 0)] * x.ndim
    fill[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, fill, mode, **({"constant_values": value} if mode == "constant" else {}))


def _lines(blocks: Blocks, x: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B, T, N, H] to [K, B * blocks, M, H]."""
    x = _filled(x, blocks.queries)
    x = x.reshape(len(x), -1, blocks.queries, num_kv_heads, x.shape[2] // num_kv_heads, x.shape[3])
    return jnp.transpose(x, (3, 0, 1, 4, 2, 5)).reshape(num_kv_heads, -1, blocks.queries * x.shape[4], x.shape[5])


def _unlined(blocks: Blocks, x: jax.Array, num_rows: int, length: int) -> jax.Array:
    """The way back from `_lines`."""
    x = x.reshape(len(x), num_rows, -1, x.shape[2] // blocks.queries, blocks.queries, x.shape[3])
    x = jnp.transpose(x, (1, 2, 4, 0, 3, 5))
    return x.reshape(num_rows, -1, x.shape[3] * x.shape[4], x.shape[5])[:, :length]


def _by_head(blocks: Blocks, x: jax.Array) -> jax.Array:
    """[B, S, K, H] to [K, B * blocks, keys of one, H]."""
    x = _filled(x, blocks.keys)
    return jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1, blocks.keys, x.shape[3])


def _of_rows(x: jax.Array, num_rows: int, length: int) -> jax.Array:
    """The way back from `_by_head`."""
    x = x.reshape(len(x), num_rows, -1, x.shape[3])
    return jnp.moveaxis(x, 0, 2)[:, :length]


def _sink_lines(blocks: Blocks, sinks: jax.Array, num_kv_heads: int) -> jax.Array:
    """[N] to float32 [K, 1, M]."""
    sinks = sinks.astype(jnp.float32).reshape(num_kv_heads, 1, -1)
    return jnp.repeat(sinks, blocks.queries, axis=2)


# The kernels.


def _dot(left: jax.Array, right: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    return jax.lax.dot_general(
        left,
        right,
        (((contracted[0],), (contracted[1],)), ((), ())),
        precision=precision(left.dtype),
        preferred_element_type=jnp.float32,
    )


def _scores(rule: Rule, q: jax.Array, k: jax.Array, q_rows: jax.Array, kv_columns: jax.Array) -> Any:
    """Of a block, [keys, M]: scores before the mask, and whether they count."""
    scores = rule.scores(_dot(k, q, (1, 1)))
    distance = q_rows[1:2] - kv_columns[:, 1:2]
    allowed = (q_rows[0:1] == kv_columns[:, 0:1]) & (distance >= 0)
    return scores, allowed if rule.window is None else allowed & (distance < rule.window)


def _is_first(of: Any, number: Any) -> Any:
    return (number == 0) | (of[jnp.maximum(number - 1, 0)] != of[number])


def _is_last(of: Any, number: Any) -> Any:
    return (number == pl.num_programs(1) - 1) | (of[number + 1] != of[number])


def _forward_kernel(rule: Rule, has_sinks: bool, of_q: Any, of_kv: Any, *refs: Any) -> None:
    q, k, v, q_rows, kv_columns, *sinks, out, log_total, sums, maximum, total = refs
    number = pl.program_id(1)

    @pl.when(_is_first(of_q, number))
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)
        maximum[...] = sinks[0][...] if has_sinks else jnp.full_like(maximum, LOWEST / 2)
        total[...] = jnp.full_like(total, 1.0 if has_sinks else 0.0)

    scores, allowed = _scores(rule, q[...], k[...], q_rows[...], kv_columns[...])
    scores = jnp.where(allowed, scores, LOWEST)
    new_maximum = jnp.maximum(maximum[...], scores.max(axis=0, keepdims=True))
    exponentials = jnp.exp(scores - new_maximum)
    shrink = jnp.exp(maximum[...] - new_maximum)
    total[...] = total[...] * shrink + exponentials.sum(axis=0, keepdims=True)
    sums[...] = sums[...] * shrink + _dot(v[...], exponentials.astype(v.dtype), (0, 0))
    maximum[...] = new_maximum

    @pl.when(_is_last(of_q, number))
    def _() -> None:
        of_some = jnp.where(total[...] == 0.0, 1.0, total[...])  # padding sees nothing
        out[...] = (sums[...] / of_some).T.astype(out.dtype)
        log_total[...] = maximum[...] + jnp.log(of_some)


def _by_products(rule: Rule, refs: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    """Of a block, [keys, M]: probabilities, and gradients by the products of queries and keys."""
    q, k, v, q_rows, kv_columns, gradient, log_total, mean = (ref[...] for ref in refs)
    scores, allowed = _scores(rule, q, k, q_rows, kv_columns)
    probabilities = jnp.exp(jnp.where(allowed, scores, LOWEST) - log_total)
    by_score = probabilities * (_dot(v, gradient, (1, 1)) - mean)
    slope: Any = rule.scale
    if rule.soft_cap is not None:
        slope = slope * (1.0 - jnp.square(scores / rule.soft_cap))
    return probabilities, by_score * slope


def _query_kernel(rule: Rule, of_q: Any, of_kv: Any, *refs: Any) -> None:
    *inputs, out, sums = refs
    number = pl.program_id(1)

    @pl.when(_is_first(of_q, number))
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    k = inputs[1][...]
    by_product = _by_products(rule, tuple(inputs))[1]
    sums[...] += _dot(by_product.astype(k.dtype), k, (0, 0))

    @pl.when(_is_last(of_q, number))
    def _() -> None:
        out[...] = sums[...].astype(out.dtype)


def _key_kernel(rule: Rule, of_q: Any, of_kv: Any, *refs: Any) -> None:
    *inputs, out_k, out_v, sums_k, sums_v = refs
    number = pl.program_id(1)

    @pl.when(_is_first(of_kv, number))
    def _() -> None:
        sums_k[...], sums_v[...] = jnp.zeros_like(sums_k), jnp.zeros_like(sums_v)

    q, gradient = inputs[0][...], inputs[5][...]
    probabilities, by_product = _by_products(rule, tuple(inputs))
    sums_k[...] += _dot(by_product.astype(q.dtype), q, (1, 0))
    sums_v[...] += _dot(probabilities.astype(gradient.dtype), gradient, (1, 0))

    @pl.when(_is_last(of_kv, number))
    def _() -> None:
        out_k[...], out_v[...] = sums_k[...].astype(out_k.dtype), sums_v[...].astype(out_v.dtype)


def _run(
    name: str,
    kernel: Any,
    blocks: Blocks,
    pairs: Pairs,
    inputs: list[Any],
    outputs: list[Any],
    scratch: list[tuple[int, ...]],
) -> list[jax.Array]:
    """Runs a kernel for every head of keys, over a list of pairs.

    Args:
        name: in programs and profiles.
        inputs: (array, what its blocks are looked up by).
        outputs: (shape and dtype, what its blocks are looked up by).
        scratch: shapes of float32 sums.
    """

    def spec(shape: tuple[int, ...], by: str) -> pl.BlockSpec:
        """Blocks are the last two dims; before them are heads of keys, where there are such, and numbers of blocks."""
        index = {
            "head q": lambda head, number, of_q, of_kv: (head, of_q[number], 0, 0),
            "head kv": lambda head, number, of_q, of_kv: (head, of_kv[number], 0, 0),
            "q": lambda head, number, of_q, of_kv: (of_q[number], 0, 0),
            "kv": lambda head, number, of_q, of_kv: (of_kv[number], 0, 0),
            "head": lambda head, number, of_q, of_kv: (head, 0, 0),
        }[by]
        return pl.BlockSpec((*(None,) * (len(shape) - 2), *shape[-2:]), index)

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(len(inputs[0][0]), pairs.num_pairs),
        in_specs=[spec(array.shape, by) for array, by in inputs],
        out_specs=[spec(shape.shape, by) for shape, by in outputs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    )
    run = pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=[shape for shape, _ in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=blocks.interpret,
        name=name,
    )
    return run(pairs.queries, pairs.keys, *(array for array, _ in inputs))


_INPUTS = ("head q", "head kv", "head kv", "q", "kv")
"""What blocks of `_Arrays` are looked up by."""


def _forward(rule: Rule, blocks: Blocks, *inputs: Any) -> tuple[jax.Array, Any]:
    q, k, v, sinks, rows = inputs
    arrays, (pairs, _) = _arrays(blocks, q, k, v, rows), pairs_of(rule, blocks, rows)
    num_kv_heads, num_blocks, lines, head_dim = arrays.q.shape
    of_sinks = [] if sinks is None else [(_sink_lines(blocks, sinks, num_kv_heads), "head")]
    out, log_total = _run(
        "packed_forward",
        functools.partial(_forward_kernel, rule, sinks is not None),
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
    (of_q,) = _run(
        "packed_by_queries",
        functools.partial(_query_kernel, rule),
        blocks,
        by_queries,
        inputs,
        [(jax.ShapeDtypeStruct(arrays.q.shape, q.dtype), "head q")],
        [(lines, q.shape[3])],
    )
    of_k, of_v = _run(
        "packed_by_keys",
        functools.partial(_key_kernel, rule),
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
