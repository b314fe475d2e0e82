"""Self-attention of packed rows on NVIDIA GPUs, by cuDNN's kernels for segments of unequal length.

In and out as in `attention.py`, which calls this where it can be had. cuDNN is told where each segment of a row begins
and how long it is, and computes each by itself: causal, within a window, forward and backward. It is told nothing of
positions: a window counts places within a segment, which is the same where positions grow by exactly 1 from one token
of a segment to the next, as those that `batches/loader.py` makes do. Padding is a segment too, so that every number is
written.

How many segments a row has at most must be known when the program is compiled, and comes from who packs the rows
(`Loader.most_segments`). A row that has more becomes NaN: two examples taken for one would see each other.

On a mesh each device calls the kernels on its own rows and heads. JAX has them in a private module, which nobody else
here touches; what it is called with depends on JAX's version.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsft.mesh import num_parts, partition_spec
from jaxsft.model.needed import Rule
from jaxsft.model.remat import keep

fused: Any
try:
    from jax._src.cudnn import fused_attention_stablehlo as fused
except ImportError:
    fused = None

KNOWN_JAX = ((0, 10), (0, 11), (0, 12))
"""Versions of JAX whose way to call cuDNN was read."""
GROUPED_SINCE = (0, 11, 1)
"""Before this version of JAX, the places of keys were counted in heads of queries, so that of grouped queries all
segments but the first of all would see the wrong keys, silently (jax PR 39521)."""
SCORE_FUNCTION_SINCE = (0, 12)
"""Since this one, the calls take a function of scores as well."""
OLDEST_CUDNN = 90600
FEWEST_SEGMENTS = 2
"""With fewer, JAX takes the rows for whole ones."""
MOST_ELEMENTS = 2**31 - 1
"""Places are counted in elements of the queries of a device, as int32."""
MOST_STATISTICS_BYTES = 2**31
"""The kernels write a number for each head and each place of the row, and that for each segment, as if it were as long
as the row: bytes of these, while a layer is computed, that are put up with at most."""


def room_for_segments(most: int) -> int:
    """Segments of a row for which a program is compiled: a power of two, so that few programs differ.

    5 segments at most give 8, and 8 give 8.
    """
    return max(1 << (most - 1).bit_length(), FEWEST_SEGMENTS)


def cudnn_problem(
    platform: str,
    kind: str,
    q: Any,
    k: Any,
    *,
    num_segments: int | None,
    soft_cap: float | None,
    has_sinks: bool,
) -> str | None:
    """Why cuDNN cannot compute attention on the mesh in scope, if it cannot.

    Args:
        platform, kind: of the devices (`mesh.platform_and_kind`).
        q: [B, T, N, H], or anything with its shape and dtype, as is `k`.
        k: [B, T, K, H].
        num_segments: of a row at most, padding counted, if that is known.
        soft_cap: of scores.
        has_sinks: whether heads may attend to nothing.
    """
    if platform not in ("gpu", "cuda"):
        return f"cuDNN runs on NVIDIA GPUs, not on {kind or 'unknown devices'}"
    if (problem := _library_problem()) is not None:
        return problem
    if (capability := device_capability()) is None:
        return f"cuDNN runs on NVIDIA GPUs, not on {kind}"
    if capability < (9, 0):
        return f"cuDNN computes packed rows on Hopper and newer GPUs (compute capability 9.0), not on {kind}"
    if q.dtype != jnp.bfloat16:
        return f"cuDNN computes in bfloat16, and model.compute_dtype is {q.dtype}"
    (num_rows, length, num_heads, head_dim), widest = q.shape, 256 if capability[0] == 9 else 128
    if head_dim > widest or head_dim % 8:
        return f"cuDNN takes heads of up to {widest} numbers, a multiple of 8, on {kind}; the model's have {head_dim}"
    if has_sinks:
        return "cuDNN's kernels for packed rows know no attention sinks"
    if soft_cap is not None:
        return "cuDNN's kernels for packed rows know no soft cap of scores"
    if num_parts("t") > 1:
        return "cuDNN wants whole rows, and mesh.context cuts them"
    if num_segments is None:
        return "how many segments a row has at most is not known before it is read, as packed rows are streamed"
    own_heads = num_heads // num_parts("n")
    own_places = num_rows // num_parts("b") * length * own_heads
    if own_places * head_dim > MOST_ELEMENTS:
        return (
            f"a device's queries have {own_places * head_dim:,} numbers, and cuDNN counts up to {MOST_ELEMENTS:,}; "
            "a smaller train.microbatch_size has fewer"
        )
    if (num_bytes := 4 * num_segments * own_places) > MOST_STATISTICS_BYTES:
        return (
            f"with up to {num_segments:,} segments in a row cuDNN needs {num_bytes / 2**30:.1f} GiB beside a layer, "
            f"more than {MOST_STATISTICS_BYTES / 2**30:.0f}; a smaller train.microbatch_size needs less"
        )
    return None


def _library_problem() -> str | None:
    """Why cuDNN cannot be called at all."""
    if fused is None or jax.__version_info__[:2] not in KNOWN_JAX:
        return f"how JAX {jax.__version__} calls cuDNN is not known here"
    try:
        version = fused.check_cudnn_version()
    except RuntimeError:
        return "JAX found no cuDNN"
    if version < OLDEST_CUDNN:
        return f"cuDNN {version} is too old for packed rows, which need {OLDEST_CUDNN}"
    return None


def device_capability() -> tuple[int, int] | None:
    """The least compute capability of this process's devices; None where one of them is no NVIDIA GPU."""
    found = [re.fullmatch(r"(\d+)\.(\d+)", str(getattr(d, "compute_capability", ""))) for d in jax.local_devices()]
    return min(((int(each[1]), int(each[2])) for each in found if each), default=None) if all(found) else None


def cudnn_attention(
    rule: Rule, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, num_segments: int
) -> jax.Array:
    """As `attention.attention` of T queries to the T keys of the same tokens.

    Args:
        rule: scale and window.
        q: [B, T, N, H], which the mesh in scope cuts evenly, and not along T.
        k: [B, T, K, H], as is `v`.
        segment_ids: int32 [B, T]; tokens of a segment stand side by side.
        num_segments: of a row at most, padding counted.

    Returns:
        [B, T, N, H] in the dtype of `q`; NaN in rows that have more segments.
    """
    assert rule.soft_cap is None and num_segments >= FEWEST_SEGMENTS and num_parts("t") == 1
    local = functools.partial(_local, rule, num_segments)
    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v, segment_ids)
    in_specs = tuple(map(partition_spec, ("b t n h", "b t k h", "b t k h", "b t")))
    return jax.shard_map(local, in_specs=in_specs, out_specs=partition_spec("b t n h"), check_vma=False)(
        q, k, v, segment_ids
    )


def _local(rule: Rule, num_segments: int, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    """One device's part."""
    segments = segments_of(ids, num_segments)
    # Of the queries, as that costs nothing where they are rotated.
    is_right = segments.counts <= num_segments
    q = jnp.where(is_right[:, None, None, None], q, jnp.nan)
    return _attention(rule, q, k, v, segments)


class Segments(NamedTuple):
    """Where segments lie, as cuDNN is told.

    Worked example: segment_ids `[[1, 1, 2, 0, 0], [1, 1, 1, 1, 1]]` with room for 4 give

        lengths = [[2, 1, 2, -1], [5, -1, -1, -1]]
        starts  = [[0, 2, 3, -1, -1], [0, -1, -1, -1, -1]]
        counts  = [3, 1]
        numbers = [[0, 0, 1, 2, 2], [3, 3, 3, 3, 3]]      over all rows
        places  = [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]
    """

    lengths: jax.Array
    """int32 [B, M]; -1 where there is no segment."""
    starts: jax.Array
    """int32 [B, M + 1], within the row; -1 where there is no segment, as there is none in the last column."""
    counts: jax.Array
    """int32 [B]"""
    numbers: jax.Array
    """int32 [B, T], of the segment of each token, counted over all rows."""
    places: jax.Array
    """int32 [B, T], of each token within its segment."""


def segments_of(segment_ids: jax.Array, num_segments: int) -> Segments:
    """Where the segments of rows [B, T] lie; those of a row that has too many are not all there."""
    length = segment_ids.shape[1]
    is_first = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)], constant_values=True)
    numbers = jnp.cumsum(is_first, axis=1, dtype=jnp.int32)  # from 1
    # Before segment m stand all tokens of the m segments before it.
    before = (numbers[:, None] <= jnp.arange(num_segments + 1, dtype=jnp.int32)[:, None]).sum(axis=2, dtype=jnp.int32)
    is_there = before[:, :-1] < length
    starts = jnp.where(is_there, before[:, :-1], -1)
    tokens = jnp.arange(length, dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(is_first, tokens, 0), axis=1)
    counts = numbers[:, -1]
    told = jnp.minimum(counts, num_segments)
    return Segments(
        jnp.where(is_there, jnp.diff(before, axis=1), -1),
        jnp.pad(starts, [(0, 0), (0, 1)], constant_values=-1),
        counts,
        jnp.minimum(numbers, num_segments) - 1 + (jnp.cumsum(told, dtype=jnp.int32) - told)[:, None],
        tokens - start,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(rule: Rule, q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments) -> jax.Array:
    return _forward(rule, q, k, v, segments)[0]


def _forward(rule: Rule, q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments) -> tuple[jax.Array, Any]:
    repeated = [_repeat(x, q.shape[2]) for x in (k, v)]
    operands = (q, *repeated, *_told(q, segments))
    out, statistics = fused._dot_product_attention_fwd_impl(*operands, **_settings(rule), is_training=True)
    # Remat keeps both, so that the kernel need not run again: of the statistics [B * M, N, T], what was written.
    log_total = keep(statistics[segments.numbers, :, segments.places], "attention")
    out = keep(out, "attention")
    return out, (q, k, v, segments, out, log_total)


@jax.named_scope("attention")
def _backward(rule: Rule, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    q, k, v, segments, out, log_total = kept
    (num_rows, length, num_heads, _), num_segments = q.shape, segments.lengths.shape[1]
    statistics = jnp.zeros((num_rows * num_segments, num_heads, length), jnp.float32)
    statistics = statistics.at[segments.numbers, :, segments.places].set(log_total, unique_indices=True)
    repeated = [_repeat(x, num_heads) for x in (k, v)]
    operands = (q, *repeated, *_told(q, segments), statistics, out, gradient.astype(out.dtype))
    of_q, of_k, of_v = fused._dot_product_attention_bwd_impl(*operands, **_settings(rule))
    return of_q, _summed(of_k, k), _summed(of_v, v), None


_attention.defvjp(_forward, _backward)


def _told(q: jax.Array, segments: Segments) -> tuple[jax.Array, ...]:
    """What the calls take behind queries, keys and values: no bias, where segments lie, and no tables of pages."""
    nothing = jnp.zeros(0, q.dtype)
    lengths, starts = segments.lengths, segments.starts
    return nothing, lengths, lengths, starts, starts, nothing, nothing


def _settings(rule: Rule) -> dict[str, Any]:
    settings = {
        "scale": rule.scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, and no gradient of one
        "mask_type": fused.MaskType.PADDING_CAUSAL,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": rule.window,
    }
    if jax.__version_info__ >= SCORE_FUNCTION_SINCE:
        settings |= {"score_mod_args": (), "score_mod": None}
    return settings


def _repeat(x: jax.Array, num_heads: int) -> jax.Array:
    """Keys or values [B, T, K, H] of each head of queries, where JAX needs them so."""
    if jax.__version_info__ >= GROUPED_SINCE:
        return x
    return jnp.repeat(x, num_heads // x.shape[2], axis=2)


def _summed(gradient: jax.Array, x: jax.Array) -> jax.Array:
    """The way back from `_repeat`, for gradients."""
    if gradient.shape == x.shape:
        return gradient
    groups = gradient.reshape(*x.shape[:3], -1, x.shape[3])
    return groups.sum(axis=3, dtype=jnp.float32).astype(x.dtype)
