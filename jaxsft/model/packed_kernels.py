"""The kernels for packed rows: forward, gradients by queries, and gradients by keys and values.

In: blocks of arrays, as `packed.py` cuts them, and a list of pairs of blocks (`pairs.py`), over which the grid runs and
in which each kernel looks up what to read and write. Out: sums over the pairs of a block of queries, or of keys, which
lie on the chip until the last pair of it.

All of them hold scores turned, [keys, M lines of queries]: what there is one of for each query, such as the softmax's
total, then lies in rows, as a TPU wants it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxsft.model.needed import Rule
from jaxsft.model.pairs import Blocks, Pairs
from jaxsft.model.products import precision
from jaxsft.model.tiles import LOWEST


def run_kernel(
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


def forward_kernel(rule: Rule, has_sinks: bool, of_q: Any, of_kv: Any, *refs: Any) -> None:
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


def query_kernel(rule: Rule, of_q: Any, of_kv: Any, *refs: Any) -> None:
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


def key_kernel(rule: Rule, of_q: Any, of_kv: Any, *refs: Any) -> None:
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
