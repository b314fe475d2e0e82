"""Matrix products of tokens and weights, with gradients that are summed over tokens in float32.

In: tokens [B, T, ...], and weights in the dtype in which they are stored. Out: products in the dtype of the tokens.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxsft.mesh import on_one_device, partition_spec


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Matmul precision of operands of `dtype`: float32 means float32 here, also where hardware would round to less."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def cast(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`weight.astype(dtype)` to the bit, where a weight is used in matmuls of that dtype.

    To bfloat16 in two steps, of which the first does it all. One step alone the compiler for TPUs takes out of the loop
    over layers: it rounds the weights of all layers before the first, and keeps them beside the stored ones until the
    last gradient is there (v5p, libtpu 0.0.42.1; of an optimization barrier it takes no notice).
    """
    if dtype == jnp.bfloat16 and weight.dtype == jnp.float32:
        weight = jax.lax.reduce_precision(weight, exponent_bits=8, mantissa_bits=7)
    return weight.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(dims: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`jnp.einsum(dims, x, weight)` in the dtype of `x`, with the weight in its stored dtype.

    The gradient by the weight is a sum over tokens: it is float32 from the matmul on, so that what is added up over
    microbatches and devices was not rounded before (docs/precision.md). And it comes out in the weight's own order:
    JAX's own rule makes it transposed and turns it around. XLA on CPU then turns the larger factor around instead, and
    leaves its fast matmul: a step of SmolLM2-135M took 1.15 times as long.
    """
    return jnp.einsum(dims, x, cast(weight, x.dtype), precision=precision(x.dtype))


def _product_forward(dims: str, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.einsum(dims, x, cast(weight, x.dtype), precision=precision(x.dtype)), (x, weight)


def _product_backward(dims: str, kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, stored = kept
    weight, einsum = cast(stored, x.dtype), functools.partial(jnp.einsum, precision=precision(x.dtype))
    summed = functools.partial(einsum, preferred_element_type=jnp.float32)
    if on_one_device():
        # As matrices: of more dims, XLA on CPU turns `x` or the weight around first, element by element, which for `x`
        # takes half as long again as the product.
        num_tokens, num_inputs = x.shape[0] * x.shape[1], math.prod(x.shape[2:])
        gradients, inputs = gradient.reshape(num_tokens, -1), x.reshape(num_tokens, num_inputs)
        by_x = einsum("to,io->ti", gradients, weight.reshape(num_inputs, -1)).reshape(x.shape)
        return by_x, summed("ti,to->io", inputs, gradients).reshape(weight.shape).astype(stored.dtype)
    of_x, of_weight, of_y = _letters(dims)
    by_x = einsum(f"{of_y}, {of_weight} -> {of_x}", gradient, weight)
    return by_x, summed(f"{of_x}, {of_y} -> {of_weight}", x, gradient).astype(stored.dtype)


product.defvjp(_product_forward, _product_backward)


def _letters(dims: str) -> tuple[str, str, str]:
    """Those of `x`, of the weight and of what comes out: of `"b t d, d f -> b t f"`, `b t d`, `d f` and `b t f`."""
    factors, of_y = dims.split(" -> ")
    of_x, of_weight = factors.split(", ")
    return of_x, of_weight, of_y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def products(all_dims: tuple[str, ...], x: jax.Array, weights: list[jax.Array]) -> list[jax.Array]:
    """The `product` of `x` with each of some weights whose outputs are cut over `tensor`.

    Of the gradient by `x`, each device there has one summand for each product. Left to the partitioner, each of these
    is summed up over `tensor` by itself; here a device adds up its own before that, which is then done once.
    """
    return _products_forward(all_dims, x, weights)[0]


def _products_forward(all_dims: tuple[str, ...], x: jax.Array, weights: list[jax.Array]) -> tuple[list[jax.Array], Any]:
    return [_product_forward(dims, x, weight)[0] for dims, weight in zip(all_dims, weights, strict=True)], (x, weights)


def _products_backward(
    all_dims: tuple[str, ...], kept: tuple[jax.Array, list[jax.Array]], gradients: list[jax.Array]
) -> tuple[jax.Array, list[jax.Array]]:
    x, weights = kept
    exact, letters = precision(x.dtype), [_letters(dims) for dims in all_dims]
    x_gradient = gradient_by_x(all_dims, [cast(weight, x.dtype) for weight in weights], gradients)
    by_weights = [
        jnp.einsum(f"{of_x}, {of_y} -> {of_weight}", x, gradient, precision=exact, preferred_element_type=jnp.float32)
        for (of_x, of_weight, of_y), gradient in zip(letters, gradients, strict=True)
    ]
    return x_gradient, [each.astype(weight.dtype) for each, weight in zip(by_weights, weights, strict=True)]


products.defvjp(_products_forward, _products_backward)


def gradient_by_x(all_dims: tuple[str, ...], weights: list[jax.Array], gradients: list[jax.Array]) -> jax.Array:
    """That by the one `x` of `products`, from weights in its dtype."""
    letters = [_letters(dims) for dims in all_dims]

    def by_x(weights: list[jax.Array], gradients: list[jax.Array]) -> jax.Array:
        summands = [
            jnp.einsum(f"{of_y}, {of_weight} -> {of_x}", gradient, weight, precision=precision(gradient.dtype))
            for (of_x, of_weight, of_y), weight, gradient in zip(letters, weights, gradients, strict=True)
        ]
        return jax.lax.psum(sum(summands), "tensor")

    return jax.shard_map(
        by_x,
        in_specs=(
            [partition_spec(of_weight, over=("tensor",)) for _, of_weight, _ in letters],
            [partition_spec(of_y) for *_, of_y in letters],
        ),
        out_specs=partition_spec(letters[0][0]),
        check_vma=False,
    )(weights, gradients)
