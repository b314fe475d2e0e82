"""Cases of `gpu.py` about attention of one layer: whether it is right, and how fast."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_cases import Case, milliseconds, room_for, rows_of

from jaxsft.config import ConfigError
from jaxsft.model.attention import attention
from jaxsft.model.kernel_check import formula
from jaxsft.model.needed import Rule


def numbers(is_small: bool) -> list[Case]:
    """Heads, their width, the window and the rows."""
    length = 128 if is_small else 1024
    heads = [(8, 8, 64), (8, 4, 128), (8, 2, 128), (8, 1, 64), (9, 3, 64), (4, 2, 256), (8, 2, 96), (8, 4, 192)]
    kinds = ["packed", "one example", "padded", "of one token", "eight and no padding"]
    chosen = [(each, window, "packed") for each in heads for window in (None, length // 8)]
    chosen += [((8, 2, 128), window, kind) for kind in kinds[1:] for window in (None, 1, length // 8)]
    return [
        Case({"heads": each, "window": window, "rows": kind, "length": length}, apart)
        for each, window, kind in chosen[:: 4 if is_small else 1]
    ]


def apart(*, heads: tuple[int, int, int], window: int | None, rows: str, length: int) -> dict[str, Any]:
    """Root of the mean square, and the largest, of what output and gradients are apart from the formula, relative."""
    num_heads, num_kv_heads, head_dim = heads
    ids, positions = rows_of(rows, 2, length)
    keys = jax.random.split(jax.random.key(0), 4)
    of_heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    q, k, v, g = (
        jax.random.normal(key, (*ids.shape, n, head_dim), jnp.bfloat16) for key, n in zip(keys, of_heads, strict=True)
    )
    is_token = jnp.asarray(ids > 0)[..., None, None]

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(attend: Callable[..., Any], q: Any, k: Any, v: Any, g: Any) -> Any:
        out, vjp = jax.vjp(lambda *x: jnp.where(is_token, attend(*x), 0), q, k, v)
        return [out, *vjp(jnp.where(is_token, g, 0))]

    def by(kernel: Any) -> Callable[..., Any]:
        return functools.partial(
            attention,
            q_segment_ids=jnp.asarray(ids),
            kv_segment_ids=jnp.asarray(ids),
            q_positions=jnp.asarray(positions),
            kv_positions=jnp.asarray(positions),
            window=window,
            kernel=kernel,
            num_segments=room_for(ids),
        )

    rule = Rule(head_dim**-0.5, window, None)
    exact = with_gradients(
        lambda *x: formula(rule, ids, positions, *x, None), *(x.astype(jnp.float32) for x in (q, k, v, g))
    )

    def errors(found: list[Any]) -> list[list[float]]:
        """Relative, but where it must be 0, as of queries that see themselves alone: there to 0.1."""
        pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in zip(found, exact, strict=True)]
        return [
            [float(np.sqrt(np.square(x - y).mean() / max(np.square(y).mean(), 1e-2))) for x, y in pairs],
            [float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-1)) for x, y in pairs],
        ]

    def same(one: list[Any], other: list[Any]) -> bool:
        return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(one, other, strict=True))

    ours = with_gradients(by("xla"), q, k, v, g)
    line: dict[str, Any] = {"segments": room_for(ids), "apart": "output, gradients by queries, keys, values"}
    line["ours"], line["ours_largest"] = errors(ours)
    line["ours_repeats"] = same(ours, with_gradients(by("xla"), q, k, v, g))
    try:
        theirs = with_gradients(by("cudnn"), q, k, v, g)
    except ConfigError as error:
        return line | {"skipped": str(error)}
    line["cudnn"], line["cudnn_largest"] = errors(theirs)
    line["repeats"] = same(theirs, with_gradients(by("cudnn"), q, k, v, g))
    # Other tokens in one segment: whoever is in another one must not notice, to the bit.
    others = (ids != 1)[..., None, None]
    changed = with_gradients(by("cudnn"), *(jnp.where(others, x, 3 - x) for x in (q, k, v, g)))
    line["sealed"] = same(*([np.where(others, np.asarray(x), 0) for x in each] for each in (theirs, changed)))
    for name in ("cudnn", "cudnn_largest"):
        pairs = zip(line[name], line[name.replace("cudnn", "ours")], strict=True)
        line[f"{name}_to_ours"] = max(their / max(mine, 1e-4) for their, mine in pairs)
    # The largest of some thousand errors is another one each time, and decides nothing.
    line["is_right"] = line["sealed"] and line["cudnn_to_ours"] <= 1.5
    return line


def speed(is_small: bool) -> list[Case]:
    """Rows of 4,096 and 16,384, of the heads of Llama 3 8B and of SmolLM2 135M."""
    sizes = [(2, 256)] if is_small else [(4, 4096), (1, 16384)]
    heads = [(4, 2, 64)] if is_small else [(32, 8, 128), (9, 3, 64)]
    return [
        Case({"by": by, "heads": each, "rows": kind, "num_rows": num_rows, "length": length, "room": room}, timed)
        for each in heads
        for num_rows, length in sizes
        for kind in ("one example", "packed")
        for by, room in (("xla", 1), ("cudnn", 1), ("cudnn", 4), ("cudnn, not packed", 1))
        if (by, room) != ("cudnn", 4) or kind == "packed"
    ]


def timed(*, by: str, heads: tuple[int, int, int], rows: str, num_rows: int, length: int, room: int) -> dict[str, Any]:
    """Milliseconds forward, and forward and backward; `room` times as many segments as there need be."""
    num_heads, num_kv_heads, head_dim = heads
    ids, positions = rows_of(rows, num_rows, length)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (*ids.shape, n, head_dim), jnp.bfloat16)
        for key, n in zip(keys, (num_heads, num_kv_heads, num_kv_heads), strict=True)
    )
    num_segments = room * room_for(ids)
    places = jnp.asarray(ids), jnp.asarray(positions)

    def attend(q: Any, k: Any, v: Any, ids: Any, positions: Any) -> Any:
        if by == "cudnn, not packed":
            if jax.default_backend() != "gpu":
                raise ConfigError("cuDNN runs on NVIDIA GPUs")
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return attention(
            q,
            k,
            v,
            q_segment_ids=ids,
            kv_segment_ids=ids,
            q_positions=positions,
            kv_positions=positions,
            kernel=by,  # type: ignore[arg-type]
            num_segments=num_segments,
        )

    def loss(q: Any, k: Any, v: Any, *places: Any) -> Any:
        return attend(q, k, v, *places).astype(jnp.float32).sum()

    pairs = (positions + 1.0)[ids > 0].sum() if by != "cudnn, not packed" else np.float64(ids.size * (length + 1) / 2)
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v, *places).compile()
    forward, both = (milliseconds(each, q, k, v, *places) for each in (jax.jit(attend), compiled))
    flops = 4 * pairs * num_heads * head_dim
    return {
        "segments": num_segments,
        "forward_ms": forward,
        "both_ms": both,
        "forward_tflops": float(flops / forward / 1e9),
        "both_tflops": float(3.5 * flops / both / 1e9),
        "temporary_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
    }
