"""Attention: queries of packed rows against keys of the same rows, or of a cache.

In: queries, keys and values by head, and of each its segment and its position. Out: what each query gathers.

One function; what may attend to what follows from segment ids and positions alone, so a packed row, a padded row and a
half-filled cache are one case. Projections and rotary positions are `decoder.py`'s. By which program it is computed,
`choose_kernel` says, and nothing else.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxsft.config import AttentionKernel, ConfigError
from jaxsft.mesh import constrain, is_cut_evenly, num_parts, on_cpu, on_one_device, platform_and_kind
from jaxsft.model.cudnn import cudnn_attention, cudnn_problem
from jaxsft.model.needed import SMALL_IN_LARGE, TILE, Cut, Rule
from jaxsft.model.packed import packed_attention
from jaxsft.model.pairs import MOST_PAIRS, room_for_pairs
from jaxsft.model.products import precision
from jaxsft.model.remat import keep
from jaxsft.model.splash import largest_block, splash_attention
from jaxsft.model.tiles import Rows, attention_in_tiles

BLOCK_SIZE = 128
"""Queries whose scores exist at once."""

NUM_STAGES = 4
"""Self-attention goes over its blocks in so many loops of growing key length: 5/8 of the work of one loop over all
keys, where unrolling every block would save 1/2 but compile for long, and hold the scores of many blocks at once."""

MATMULS_OF_PACKED = 9 / 7
"""Matrix products of a block, forward and backward, to those of splash attention, whose backward pass can be one
kernel."""

WORTH_IT = 0.5
"""`auto` takes the kernels for packed rows where they compute at most this share of what splash attention computes.
They were never timed on a TPU; twice as slow for a block, they would still be ahead."""


class Choice(NamedTuple):
    """What computes attention, and why that."""

    kernel: Literal["splash", "packed", "cudnn", "xla"]
    why: str


def choose_kernel(
    wanted: AttentionKernel,
    q: Any,
    k: Any,
    *,
    share: float | None = None,
    num_segments: int | None = None,
    soft_cap: float | None = None,
    has_sinks: bool = False,
) -> Choice:
    """What computes self-attention of arrays of these shapes and dtypes on the mesh in scope.

    Args:
        wanted: `model.attention`.
        q: [B, T, N, H], or anything with its shape and dtype, as is `k`.
        k: [B, T, K, H].
        share: of the pairs of queries and keys that splash attention computes, those that the kernels for packed rows
            do (`pairs.share_of_whole_rows`), if that is known.
        num_segments: of a row at most, padding counted, if that is known; cuDNN needs to know.
        soft_cap: of scores.
        has_sinks: whether heads may attend to nothing.

    Raises:
        ConfigError: a kernel is asked for that cannot be had; says why.
    """
    platform, kind = platform_and_kind()
    by_cudnn = wanted == "cudnn" or (wanted == "auto" and platform == "gpu")
    if wanted == "xla":
        return Choice("xla", "as asked for")
    if wanted == "auto" and platform != "tpu" and not by_cudnn:
        return Choice("xla", f"there is no kernel for {kind or 'unknown devices'}")
    problem = (
        cudnn_problem(platform, kind, q, k, num_segments=num_segments, soft_cap=soft_cap, has_sinks=has_sinks)
        if by_cudnn
        else _tpu_problem(platform, kind, q)
    )
    if (problem := problem or _mesh_problem(platform, q, k)) is not None:
        if wanted != "auto":
            raise ConfigError(f"model.attention: {wanted}, but {problem}; set it to xla, or leave it out")
        return Choice("xla", problem)
    if by_cudnn:
        rows = f"{kind}, packed layout, up to {num_segments} segments in a row"
        return Choice("cudnn", rows if wanted == "auto" else f"as asked for; {rows}")
    if wanted != "auto" and platform == "cpu":
        return Choice(wanted, "as asked for; on a CPU it is interpreted, which is slow and good for tests only")
    too_many = _too_many_pairs(q, k)
    if wanted == "packed":
        if too_many is not None:
            raise ConfigError(f"model.attention: packed, but {too_many}; set it to splash, or leave it out")
        return Choice("packed", "as asked for")
    blocks = f"{kind}, blocks of up to {largest_block(kind, q.shape[-1])}"
    if wanted == "splash" or share is None:
        return Choice("splash", blocks)
    if too_many is not None:
        return Choice("splash", f"{blocks}; not those for packed rows, as {too_many}")
    part = f"packed rows need {share * MATMULS_OF_PACKED:.0%} of the matrix products of splash attention"
    return Choice("packed" if share * MATMULS_OF_PACKED <= WORTH_IT else "splash", f"{blocks}; {part}")


def _tpu_problem(platform: str, kind: str, q: Any) -> str | None:
    """Why the kernels for TPUs cannot be had on these devices."""
    if platform not in ("tpu", "cpu"):
        return f"it runs on TPUs, not on {kind}"
    if platform == "tpu" and q.dtype != jnp.bfloat16:
        return f"on TPUs it multiplies in bfloat16, and model.compute_dtype is {q.dtype}"
    return None


def _mesh_problem(platform: str, q: Any, k: Any) -> str | None:
    """Why no kernel can be had on the mesh in scope."""
    if platform != "cpu" and jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1:
        return "no mesh is in scope that says how arrays are cut"
    for shape, letters in ((q.shape, "b t n h"), (k.shape, "b t k h")):
        if not is_cut_evenly(shape, letters):
            sizes = ", ".join(f"{size} {letter}" for size, letter in zip(shape, letters.split(), strict=True))
            return f"the mesh does not cut {sizes} evenly"
    return None


def _too_many_pairs(q: Any, k: Any) -> str | None:
    """Why the kernels for packed rows cannot be had where splash attention can."""
    (num_rows, length, num_heads, head_dim), num_kv_heads = q.shape, k.shape[2]
    room = room_for_pairs(
        num_rows // num_parts("b"),
        length // num_parts("t"),
        length,
        group_size=num_heads // num_kv_heads,
        head_dim=head_dim,
    )
    return None if room <= MOST_PAIRS else f"a device's rows have {room:,} pairs of blocks, more than {MOST_PAIRS:,}"


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
    order: Sequence[int] | None = None,
    block_size: int | None = None,
    kernel: AttentionKernel = "xla",
    num_segments: int | None = None,
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
            key i is that of query i (self-attention), segments are contiguous and positions grow by at least 1 from one
            token of a segment to the next, so neither keys after a query nor those before its segment are looked at.
        scale: what scores are multiplied by; 1 / sqrt(H) if left out.
        window: keys that a query sees at most, counted back from its own position; all if left out.
        soft_cap: scores become soft_cap * tanh(score / soft_cap) (Gemma 2).
        sinks: [N], a score of each head for attending to nothing (gpt-oss).
        order: the chunks of the row in the order in which devices along `context` hold them (`balance.py`), for
            self-attention on such a mesh; as they are in the row if left out.
        block_size: queries computed at once; keeps [B, N, block, S] scores instead of [B, N, T, S]. Where it goes by
            tiles (`tiles.py`) the side of one, of a kernel the most in a block, and no scores are kept. If left out,
            what is fast.
        kernel: of self-attention where positions grow by exactly 1 from one token of a segment to the next, what is to
            compute it (`choose_kernel`).
        num_segments: of a row at most, padding counted; cuDNN computes nothing without it.

    Raises:
        ConfigError: a kernel is asked for that cannot be had.

    Returns:
        [B, T, N, H] in the dtype of `q`.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    is_self = num_keys == num_queries
    rule = Rule(q.shape[-1] ** -0.5 if scale is None else scale, window, soft_cap)
    known: dict[str, Any] = {"num_segments": num_segments, "soft_cap": soft_cap, "has_sinks": sinks is not None}
    chosen = choose_kernel(kernel, q, k, **known).kernel if is_self else "xla"
    if chosen == "cudnn":
        assert num_segments is not None and order is None
        return cudnn_attention(rule, q, k, v, q_segment_ids, num_segments=num_segments)
    if chosen == "splash":
        return splash_attention(
            rule,
            q,
            k,
            v,
            sinks,
            (q_segment_ids, kv_segment_ids),
            order=order,
            largest_block=block_size or largest_block(platform_and_kind()[1], q.shape[-1]),
            interpret=on_cpu(),
        )
    if chosen == "packed":
        return packed_attention(
            rule,
            q,
            k,
            v,
            sinks,
            (q_segment_ids, kv_segment_ids),
            (q_positions, kv_positions),
            order=order,
            block_size=block_size,
            interpret=on_cpu(),
        )
    if is_self and (cut := _tiles_of(len(q), num_queries, block_size, order)) is not None:
        chunks = jnp.arange(num_queries // cut.chunk) if order is None else jnp.asarray(order, jnp.int32)
        rows = Rows(q_segment_ids, q_positions, kv_segment_ids, kv_positions, chunks)
        return attention_in_tiles(rule, cut, q, k, v, sinks, rows)
    assert order is None, "only tiles know of an order"
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    block_size, dense = block_size or BLOCK_SIZE, functools.partial(_dense, rule=rule, sinks=sinks)
    # Queries that fill up the last block are padding: finite, and cut off again.
    fill = -num_queries % block_size if num_queries > block_size else 0
    queries = [_fill(x, fill) for x in (q, q_segment_ids, q_positions)]
    keys = [k, v, kv_segment_ids, kv_positions]
    reach = num_keys if window is None else block_size + window - 1
    if is_self and reach < num_keys:
        keys = [_fill(k, fill), _fill(v, fill), _fill(kv_segment_ids, fill, -1), _fill(kv_positions, fill)]
        out = _in_blocks(queries, keys, dense, block_size=block_size, reach=reach)
    elif is_self:
        out = _in_stages(queries, keys, dense, block_size=block_size)
    else:
        out = _in_blocks(queries, keys, dense, block_size=block_size)
    return _saved(out[:, :num_queries])


def _tiles_of(num_rows: int, length: int, tile: int | None, order: Sequence[int] | None) -> Cut | None:
    """How self-attention is cut into tiles; None where it goes over blocks of queries."""
    in_large = SMALL_IN_LARGE if on_cpu() else 1
    tile = tile or TILE * SMALL_IN_LARGE // in_large
    if on_one_device():
        return Cut(tile, in_large, length, on_mesh=False) if on_cpu() and length > tile else None
    if num_parts("t") == 1 or not is_cut_evenly((num_rows, length), "b t"):
        return None
    chunk = length // (num_parts("t") if order is None else len(order))
    num_tiles = -(-chunk // tile)
    return Cut(-(-chunk // num_tiles), in_large, chunk, on_mesh=True)  # as even as it goes, with little to fill up


def _in_stages(queries: list[jax.Array], keys: list[jax.Array], dense: Callable, *, block_size: int) -> jax.Array:
    """Self-attention as `_in_blocks`, in `NUM_STAGES` loops, each over the keys up to its own last query."""
    length, num_keys = queries[0].shape[1], keys[0].shape[1]
    block_size = min(block_size, length)
    num_blocks = length // block_size
    num_stages = min(num_blocks, NUM_STAGES)
    bounds = [num_blocks * stage // num_stages * block_size for stage in range(num_stages + 1)]
    outs: list[jax.Array] = []
    for start, end in itertools.pairwise(bounds):
        stage_queries = [x[:, start:end] for x in queries]
        if outs:
            # One stage after the other: run side by side, each would hold its own scores.
            stage_queries, outs[-1] = jax.lax.optimization_barrier((stage_queries, outs[-1]))
        outs.append(_in_blocks(stage_queries, [x[:, : min(end, num_keys)] for x in keys], dense, block_size=block_size))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


def _saved(out: jax.Array) -> jax.Array:
    """[B, T, N, H], which remat may keep, cut over the mesh."""
    return keep(constrain(out, "b t n h"), "attention")


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
    length, dtype = queries[0].shape[1], queries[0].dtype
    if length > block_size:
        # The gradients of keys and values are added up over the blocks in the dtype that enters the loop.
        keys = [*(x.astype(jnp.float32) for x in keys[:2]), *keys[2:]]

    # Computed again in the backward pass, so that no probabilities are kept for it.
    @jax.checkpoint
    def block(start: jax.Array | int, queries: list[jax.Array]) -> jax.Array:
        seen = [*(x.astype(dtype) for x in keys[:2]), *keys[2:]]
        if reach is not None:
            # Where fewer than `reach` keys lie before a block, the slice holds later ones too, which no query is
            # allowed to see.
            first = jnp.maximum(start + block_size - reach, 0)
            seen = [jax.lax.dynamic_slice_in_dim(x, first, min(reach, length), axis=1) for x in seen]
        return dense(*queries, *seen)

    if length <= block_size:
        return block(0, queries)

    starts = jnp.arange(0, length, block_size)
    return _joined(jax.lax.map(lambda each: block(*each), (starts, [_cut(x, block_size) for x in queries])))


def _cut(x: jax.Array, block_size: int) -> jax.Array:
    """[B, T, ...] to [T / block, B, block, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block_size, *x.shape[2:]), 1, 0)


def _joined(blocks: jax.Array) -> jax.Array:
    """The way back from `_cut`."""
    whole = jnp.moveaxis(blocks, 0, 1)
    return whole.reshape(whole.shape[0], -1, *whole.shape[3:])


def _dense(
    q: jax.Array,
    q_segment_ids: jax.Array,
    q_positions: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_segment_ids: jax.Array,
    kv_positions: jax.Array,
    *,
    rule: Rule,
    sinks: jax.Array | None,
) -> jax.Array:
    """Softmax attention with all scores at once."""
    batch, num_queries, num_heads, head_dim = q.shape
    allowed = rule.allowed((q_segment_ids, kv_segment_ids), (q_positions, kv_positions))
    q_btkgh = q.reshape(batch, num_queries, k.shape[2], num_heads // k.shape[2], head_dim)
    einsum = functools.partial(jnp.einsum, precision=precision(q.dtype))
    # The dims are in the order in which a matmul gives them: for [B, K, G, T, S], XLA on CPU would transpose all
    # scores.
    scores = rule.scores(einsum("btkgh,bskh->bktgs", q_btkgh, k, preferred_element_type=jnp.float32))
    # A finite floor: -inf - -inf would be NaN. exp of it is exactly 0, in the gradients as well.
    scores = jnp.where(allowed[:, None, :, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        nothing = sinks.reshape(1, k.shape[2], 1, -1, 1)
        nothing = jnp.broadcast_to(nothing, (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, nothing], axis=-1)
    probabilities = jax.nn.softmax(scores, axis=-1)
    if sinks is not None:
        probabilities = probabilities[..., :-1]
    return einsum("bktgs,bskh->btkgh", probabilities.astype(v.dtype), v).reshape(q.shape)
