"""A kernel of attention, held against the formula before a run relies on it: output and gradients of a few tiny rows.

In: which kernel, and the structure of the model. Out: how far the two are apart, or an error that says what is wrong.
The rows are packed and padded; groups of queries, window, soft cap, sinks, scale and head dim are those of the model.
Scores are spread so far that a query mostly looks at one key or two: one key too many or too few then changes much more
than rounding does.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft.batch import count_segments
from jaxsft.config import AttentionKernel, ConfigError
from jaxsft.mesh import constrain, num_parts, platform_and_kind
from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.attention import attention, choose_kernel
from jaxsft.model.balance import balance, balanced_order, restore
from jaxsft.model.cudnn import room_for_segments
from jaxsft.model.needed import Rule

LENGTH = 360
"""Tokens of a row, about: three blocks, of which the last is filled up."""
BLOCK_SIZE = 128
LONGEST_WINDOW = 100
"""One that reaches over a whole row would leave nothing out: what is longer is checked as one of these."""
SPREAD = 3.0
"""Standard deviation of scores."""
BOUNDS = {"float32": 1e-4, "bfloat16": 0.05}
"""Compute dtype -> how far results may be apart by rounding, relative to the largest of them."""
RESULTS = ("output", "gradient by queries", "gradient by keys", "gradient by values", "gradient by sinks")


def check_kernel(
    wanted: AttentionKernel,
    config: DecoderConfig,
    dtype: jnp.dtype | str,
    *,
    attend: Callable[..., jax.Array] = attention,
) -> float:
    """Holds the kernel that `wanted` leads to, on the mesh in scope, against the formula.

    Args:
        wanted: `model.attention`.
        config: of the model.
        dtype: its compute dtype.
        attend: what is checked, called as `attention` is.

    Returns:
        The largest difference, relative to the largest number of what differs.

    Raises:
        ConfigError: the two are further apart than rounding can bring them, or the kernel does not compile.
    """
    dtype, largest = jnp.dtype(dtype), 0.0
    for window in sorted(set(config.windows), key=lambda window: window or 0):
        shortened = None if window is None else min(window, LONGEST_WINDOW)
        differences = jax.jit(functools.partial(_differences, wanted, config, dtype, shortened, attend))
        try:
            apart = [float(each) for each in differences()]
        except jax.errors.JaxRuntimeError as error:
            raise _refusal(wanted, dtype, f"does not run: {' '.join(str(error).split())[:300]}") from error
        wrong = [
            f"{name} by {each:.1%}" if each < np.inf else f"{name}, which is not finite"
            for name, each in zip(RESULTS, apart, strict=False)
            if each > BOUNDS[dtype.name]
        ]
        if wrong:
            seen = "all earlier tokens of an example" if shortened is None else f"a window of {shortened}"
            bound = f"rounding brings at most {BOUNDS[dtype.name]:.2%}"
            raise _refusal(wanted, dtype, f"differs from the formula, with {seen}: {', '.join(wrong)} ({bound})")
        largest = max(largest, *apart)
    return largest


def _refusal(wanted: AttentionKernel, dtype: jnp.dtype, what: str) -> ConfigError:
    return ConfigError(
        f"model.attention: {wanted}: on {platform_and_kind()[1]}, in {dtype.name}, the kernel {what}; set "
        "model.attention to xla"
    )


def _differences(
    wanted: AttentionKernel,
    config: DecoderConfig,
    dtype: jnp.dtype,
    window: int | None,
    attend: Callable[..., jax.Array],
) -> list[jax.Array]:
    """Of each of `RESULTS`, the largest difference relative to the largest number; infinite if one is not finite."""
    segment_ids, positions = packed_rows(num_parts("b"), num_parts("t"))
    # Where a device has several heads of keys, here it has two: queries of one could be taken for those of another.
    num_kv_heads = min(config.num_kv_heads, 2 * num_parts("k"))
    num_heads = num_kv_heads * (config.num_heads // config.num_kv_heads)
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    rule = Rule(scale, window, config.attention_soft_cap)
    keys = jax.random.split(jax.random.key(0), 5)
    large = (SPREAD / (scale * config.head_dim**0.5)) ** 0.5

    def drawn(key: jax.Array, heads: int, letter: str, size: float = 1.0) -> jax.Array:
        x = size * jax.random.normal(key, (*segment_ids.shape, heads, config.head_dim))
        return constrain(x.astype(dtype), f"b t {letter} h")

    # What becomes of padding is of no account.
    is_token = (segment_ids > 0)[:, :, None, None]
    q, cotangent = drawn(keys[0], num_heads, "n", large), jnp.where(is_token, drawn(keys[1], num_heads, "n"), 0)
    k, v = drawn(keys[2], num_kv_heads, "k", large), drawn(keys[3], num_kv_heads, "k")
    sinks = constrain(jax.random.normal(keys[4], (num_heads,)), "n") if config.sinks else None
    num_segments = room_for_segments(int(count_segments(segment_ids).max()))
    known: dict[str, Any] = {"num_segments": num_segments, "soft_cap": rule.soft_cap, "has_sinks": config.sinks}
    assert choose_kernel(wanted, q, k, **known).kernel != "xla", "nothing to check"

    def by_kernel(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
        order = balanced_order(*segment_ids.shape)
        to_order, back = (balance, restore) if order is not None else (lambda x, axes: x,) * 2
        ids, places = (to_order(constrain(jnp.asarray(x), "b t"), "b t") for x in (segment_ids, positions))
        all_ids, all_places = (constrain(x, "b s") for x in (ids, places))
        out = attend(
            *(to_order(x, axes) for x, axes in ((q, "b t n h"), (k, "b t k h"), (v, "b t k h"))),
            q_segment_ids=ids,
            kv_segment_ids=all_ids,
            q_positions=places,
            kv_positions=all_places,
            scale=scale,
            window=window,
            soft_cap=rule.soft_cap,
            sinks=sinks,
            order=order,
            block_size=BLOCK_SIZE,
            kernel=wanted,
            num_segments=num_segments,
        )
        return jnp.where(is_token, back(out, "b t n h"), 0)

    def by_formula(*inputs: jax.Array) -> jax.Array:
        return jnp.where(is_token, formula(rule, segment_ids, positions, *inputs), 0)

    inputs = (q, k, v, sinks)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (*inputs, cotangent))
    given, expected = (
        [out, *jax.tree.leaves(vjp(cotangent))]
        for (out, vjp), cotangent in (
            (jax.vjp(by_kernel, *inputs), cotangent),
            (jax.vjp(by_formula, *exact[:4]), exact[4]),
        )
    )
    return [_apart(ours.astype(jnp.float32), theirs) for ours, theirs in zip(given, expected, strict=True)]


def _apart(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    # A maximum may pass over what is not a number.
    return jnp.where(jnp.isfinite(ours).all(), jnp.abs(ours - theirs).max() / jnp.abs(theirs).max(), jnp.inf)


def packed_rows(num_rows: int, num_devices: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions, int32 [rows, about LENGTH]: examples of all lengths in turns, padding behind them."""
    length = 2 * num_devices * max(LENGTH // (2 * num_devices), 16)
    lengths = [2 * length // 5, length // 4, 1, 3, length // 5]
    segment_ids, positions = np.zeros((2, num_rows, length), np.int32)
    for row in range(num_rows):
        turned = lengths[row % len(lengths) :] + lengths[: row % len(lengths)]
        segment_ids[row] = _filled(np.repeat(np.arange(len(turned)) + 1, turned), length)
        positions[row] = np.concatenate([np.arange(each) for each in [*turned, length - sum(turned)]])
    return segment_ids, positions


def _filled(x: np.ndarray, length: int) -> np.ndarray:
    return np.pad(x, (0, length - len(x)))


def formula(
    rule: Rule,
    segment_ids: np.ndarray,
    positions: np.ndarray,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
) -> jax.Array:
    """Attention as it is written down, all scores at once: float32 [B, T, N, H], arguments as those of `attention`."""
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    scores = rule.scale * einsum("btnh,bsnh->bnts", q, k)
    if rule.soft_cap is not None:
        scores = rule.soft_cap * jnp.tanh(scores / rule.soft_cap)
    back = positions[:, :, None] - positions[:, None]
    seen = (segment_ids[:, :, None] == segment_ids[:, None]) & (back >= 0)
    seen &= back < (LENGTH * 10**3 if rule.window is None else rule.window)
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    if sinks is not None:
        nothing = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, nothing], axis=3)
    return einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=3)[..., : k.shape[1]], v)
