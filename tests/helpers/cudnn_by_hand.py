"""What cuDNN would compute of packed rows, by its own description, in place of the kernels that need a GPU.

After `install()`, JAX's calls of cuDNN (`jax._src.cudnn.fused_attention_stablehlo`) run on CPUs: each segment is looked
up by the offset that cuDNN is told, in elements of a flat array, and computed by itself with plain products. What is in
no segment is never written, which is NaN here, and so are statistics of places that no segment has. Gradients are made
of the statistics and the output that the backward call is given (FlashAttention 2, Dao 2023, algorithm 2).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax._src.interpreters import mlir


def install():
    """Lets the two calls run on CPUs."""
    for primitive, by_hand in (
        (fused._dot_product_attention_fwd_p, forward),
        (fused._dot_product_attention_bwd_p, backward),
    ):
        mlir.register_lowering(primitive, mlir.lower_fun(by_hand, multiple_results=True), platform="cpu")


def forward(q, k, v, bias, q_seqlen, kv_seqlen, q_offsets, kv_offsets, *tables, **settings):
    shapes = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((q_seqlen.size, q.shape[2], q.shape[1]), jnp.float32),
    )
    told = (q_seqlen, kv_seqlen, q_offsets, kv_offsets)
    return jax.pure_callback(lambda *arrays: _forward(settings, *arrays), shapes, q, k, v, *told)


def backward(
    q, k, v, bias, q_seqlen, kv_seqlen, q_offsets, kv_offsets, table_k, table_v, statistics, out, gradient, **settings
):
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v))
    told = (q_seqlen, kv_seqlen, q_offsets, kv_offsets)
    arrays = (q, k, v, *told, statistics, out, gradient)
    return jax.pure_callback(lambda *arrays: _backward(settings, *arrays), shapes, *arrays)


def _segments(settings, q, k, q_seqlen, kv_seqlen, q_offsets, kv_offsets):
    """Of each segment its number, its tokens in flat arrays, and which keys a query sees: bool [queries, keys]."""
    assert settings["mask_type"].name == "PADDING_CAUSAL" and settings["layout"] == fused.AttentionLayout.BTNH.value
    assert settings["dropout_rate"] == 0 and settings["variadic_args"] == (False, False)
    lengths, kv_lengths, starts, kv_starts = (
        np.asarray(x).ravel() for x in (q_seqlen, kv_seqlen, q_offsets, kv_offsets)
    )
    window = settings["sliding_window_length"] or 10**9
    for number, (length, kv_length) in enumerate(zip(lengths, kv_lengths, strict=True)):
        places, kv_places = np.arange(length), np.arange(kv_length)
        back = places[:, None] - kv_places[None]
        start, rest = divmod(starts[number], q.shape[2] * q.shape[3])
        kv_start, kv_rest = divmod(kv_starts[number], k.shape[2] * k.shape[3])
        assert rest == kv_rest == 0
        # Beyond the array lies other memory: here, its beginning.
        yield number, start + places, (kv_start + kv_places) % k[..., 0, 0].size, (back >= 0) & (back < window)


def _flat(x):
    """[B, T, N, H] to float32 [B * T, N, H]."""
    return np.asarray(x, np.float32).reshape(-1, *x.shape[2:])


def _scores(settings, q, k, allowed):
    groups = q.shape[1] // k.shape[1]
    scores = settings["scale"] * np.einsum("tnh,snh->nts", q, np.repeat(k, groups, axis=1))
    return np.where(allowed, scores, -np.inf)


def _forward(settings, q, k, v, *told):
    flat_q, flat_k, flat_v = map(_flat, (q, k, v))
    out = np.full(flat_q.shape, np.nan, np.float32)
    statistics = np.full((np.asarray(told[0]).size, q.shape[2], q.shape[1]), np.nan, np.float32)
    for number, queries, keys, allowed in _segments(settings, q, k, *told):
        if not len(queries):
            continue
        assert np.isnan(out[queries]).all(), "no token is of two segments"
        scores = _scores(settings, flat_q[queries], flat_k[keys], allowed)
        highest = scores.max(axis=2, keepdims=True)
        total = np.log(np.exp(scores - highest).sum(axis=2)) + highest[:, :, 0]
        values = np.repeat(flat_v[keys], q.shape[2] // v.shape[2], axis=1)
        out[queries] = np.einsum("nts,snh->tnh", np.exp(scores - total[:, :, None]), values)
        statistics[number, :, : len(queries)] = total
    return out.reshape(q.shape).astype(q.dtype), statistics


def _backward(settings, q, k, v, q_seqlen, kv_seqlen, q_offsets, kv_offsets, statistics, out, gradient):
    flat_q, flat_k, flat_v, flat_out, flat_gradient = map(_flat, (q, k, v, out, gradient))
    groups = q.shape[2] // k.shape[2]
    of_q, of_k, of_v = (np.full(x.shape, np.nan, np.float32) for x in (flat_q, flat_k, flat_v))
    for number, queries, keys, allowed in _segments(settings, q, k, q_seqlen, kv_seqlen, q_offsets, kv_offsets):
        if not len(queries):
            continue
        scores = _scores(settings, flat_q[queries], flat_k[keys], allowed)
        weights = np.exp(scores - np.asarray(statistics)[number, :, : len(queries), None])
        g, values = flat_gradient[queries], np.repeat(flat_v[keys], groups, axis=1)
        mean = (g * flat_out[queries]).sum(axis=2).T[:, :, None]
        of_scores = settings["scale"] * weights * (np.einsum("tnh,snh->nts", g, values) - mean)
        of_q[queries] = np.einsum("nts,snh->tnh", of_scores, np.repeat(flat_k[keys], groups, axis=1))
        by_head = (
            np.einsum("nts,tnh->snh", of_scores, flat_q[queries]),
            np.einsum("nts,tnh->snh", weights, g),
        )
        of_k[keys], of_v[keys] = (x.reshape(len(keys), -1, groups, x.shape[2]).sum(axis=2) for x in by_head)
    return tuple(each.reshape(x.shape).astype(x.dtype) for each, x in ((of_q, q), (of_k, k), (of_v, v)))
