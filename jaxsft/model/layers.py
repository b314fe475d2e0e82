"""The parts of a decoder layer: linear maps, norms, the MLP and its activations, and what becomes of logits.

In: hidden states [B, T, ...]. Out: hidden states, or logits.

Weights are born here, each with the letters of its dims as `axes`; `mesh.py` turns letters into shardings and
`families/` turns them into Hugging Face layouts. The layers of a model are stacked: a weight is made with a leading
dim `l`, and what runs inside the scan over layers is the same module with that dim taken off.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsft.mesh import constrain
from jaxsft.model.adapter import Adapter, Frozen
from jaxsft.model.products import product, products
from jaxsft.model.quantized import QuantizedWeight, quantized_products
from jaxsft.model.remat import keep

Sizes = Mapping[str, int]
"""Letter of a dim to its size."""


class Linear(nnx.Module):
    """`x @ weight + bias`, its dims named by letters: `"d -> n h"` maps [B, T, D] to [B, T, N, H]."""

    def __init__(self, dims: str, sizes: Sizes, *, bias: bool, std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Weight `"l d n h"` drawn from normal(std), bias `"l n h"` of zeros, both stored in `dtype`."""
        inputs, outputs = (side.split() for side in dims.split("->"))
        x, y, weight = (" ".join(letters) for letters in (["b", "t", *inputs], ["b", "t", *outputs], inputs + outputs))
        self.einsum = f"{x}, {weight} -> {y}"
        axes = f"l {weight}"
        shape = tuple(sizes[letter] for letter in axes.split())
        # A Variable, or a QuantizedWeight.
        self.weight: Any = nnx.Param(std * jax.random.normal(rngs.params(), shape, dtype), axes=axes)
        axes = " ".join(["l", *outputs])
        shape = tuple(sizes[letter] for letter in axes.split())
        self.bias = nnx.Param(jnp.zeros(shape, dtype), axes=axes) if bias else None
        self.adapter: Adapter | None = None

    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Of x [B, T, inputs]; `keys` [B, T, 2] are what an adapter's dropout is drawn by."""
        if isinstance(self.weight, QuantizedWeight):
            (y,) = quantized_products((self.weight.layout,), x, [self.weight.arrays])
        else:
            y = product(self.einsum, x, self.weight[...])
        return self._finished(x, y, keys)

    def _finished(self, x: jax.Array, y: jax.Array, keys: jax.Array | None) -> jax.Array:
        """With adapter and bias; kept as the sum, so that no summand is kept beside it."""
        if self.adapter is not None:
            is_quantized = isinstance(self.weight, QuantizedWeight)
            weight = self.weight.values(jnp.float32, after=x) if is_quantized else self.weight[...]
            y = self.adapter(x, y, weight, keys)
        if self.bias is not None:
            # In float32, in which its gradient is then summed over tokens.
            y = (y.astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(y.dtype)
        return keep(y, "linear")

    @staticmethod
    def each(maps: Sequence["Linear"], x: jax.Array, keys: jax.Array | None = None) -> Iterable[jax.Array]:
        """What each of some maps makes of the same `x`, their outputs being cut over `tensor`.

        On a mesh with that axis, their gradients by `x` are reduced over it together.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.shape["tensor"] == 1:
            return (each(x, keys) for each in maps)
        quantized = [each.weight for each in maps if isinstance(each.weight, QuantizedWeight)]
        if quantized:
            # They have the same inputs, so that all of them can be quantised where one is.
            assert len(quantized) == len(maps)
            layouts = tuple(weight.layout for weight in quantized)
            ys = quantized_products(layouts, x, [weight.arrays for weight in quantized])
        else:
            ys = products(tuple(each.einsum for each in maps), x, [each.weight[...] for each in maps])
        return (each._finished(x, y, keys) for each, y in zip(maps, ys, strict=True))


@dataclasses.dataclass(frozen=True)
class NormKind:
    """Which norm a model uses."""

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    bias: bool = False
    offset: float = 0.0
    """Added to the weight; gemma stores weights around 0."""
    has_weight: bool = True


class Norm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, or of `x - mean(x)` ("layer"); in float32, cast back once."""

    def __init__(self, axes: str, sizes: Sizes, kind: NormKind, *, dtype: jnp.dtype, over: int = 1):
        """Weight with these axes, 1 (and bias 0) to begin with; the mean is taken over the last `over` dims of `x`."""
        self.kind, self.over = kind, over
        shape = [sizes[letter] for letter in axes.split()]
        self.weight = nnx.Param(jnp.full(shape, 1 - kind.offset, dtype), axes=axes) if kind.has_weight else None
        self.bias = nnx.Param(jnp.zeros(shape, dtype), axes=axes) if kind.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        mean = functools.partial(jnp.mean, axis=tuple(range(-self.over, 0)), keepdims=True)
        x_float = x.astype(jnp.float32)
        if self.kind.kind == "layer":
            x_float = x_float - mean(x_float)
        normed = x_float * jax.lax.rsqrt(mean(jnp.square(x_float)) + self.kind.eps)
        if self.weight is not None:
            normed *= self.weight[...].astype(jnp.float32) + self.kind.offset
        return (normed if self.bias is None else normed + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def squared_relu(x: jax.Array) -> jax.Array:
    """`max(x, 0)^2` (So et al., 2021, Primer)."""
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_fast": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": squared_relu,
}
"""Name of an activation in config.json -> its formula."""


@functools.cache
def gated(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`activation(gate) * up`; the same function each time, as it is part of what a compiled step is known by."""

    def product(gate: jax.Array, up: jax.Array) -> jax.Array:
        return ACTIVATIONS[name](gate) * up

    return product


def xielu(x: jax.Array, alpha_p: jax.Array, alpha_n: jax.Array, beta: jax.Array, eps: jax.Array) -> jax.Array:
    """`p x^2 + beta x` above 0, and `n (exp(min(x, eps)) - 1 - x) + beta x` below, in float32, cast back once.

    p is softplus(alpha_p) and n is beta + softplus(alpha_n) (Huang and Schlag, 2024, xIELU).
    """
    x_float = x.astype(jnp.float32)
    alpha_p, alpha_n, beta, eps = (each.astype(jnp.float32) for each in (alpha_p, alpha_n, beta, eps))
    above = jax.nn.softplus(alpha_p) * jnp.square(x_float)
    below = (beta + jax.nn.softplus(alpha_n)) * (jnp.expm1(jnp.minimum(x_float, eps)) - x_float)
    return (jnp.where(x_float > 0, above, below) + beta * x_float).astype(x.dtype)


class Xielu(nnx.Module):
    """The activation `xielu` with numbers of each layer: two are trained, two are kept as the files have them."""

    def __init__(self, sizes: Sizes, *, dtype: jnp.dtype):
        """Both slopes begin as 0.8, as in transformers."""
        of_layers = (sizes["l"], 1)
        self.alpha_p = nnx.Param(jnp.full(of_layers, jnp.log(jnp.expm1(0.8)), dtype), axes="l z")
        self.alpha_n = nnx.Param(jnp.full(of_layers, jnp.log(jnp.expm1(0.3)), dtype), axes="l z")
        self.beta = Frozen(jnp.full(of_layers, 0.5, jnp.float32), axes="l z")
        self.eps = Frozen(jnp.full(of_layers, -1e-6, jnp.float32), axes="l z")

    def __call__(self, x: jax.Array) -> jax.Array:
        return xielu(x, self.alpha_p[...], self.alpha_n[...], self.beta[...], self.eps[...])


class MLP(nnx.Module):
    """`down(activation(gate(x), up(x)))`, or without a gate `down(activation(up(x)))`."""

    def __init__(
        self,
        sizes: Sizes,
        *,
        activation: Callable[..., jax.Array],
        gated: bool,
        bias: bool,
        std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.act_fn = Xielu(sizes, dtype=dtype) if activation is xielu else None
        self.gate_proj = Linear("d -> f", sizes, bias=bias, std=std, dtype=dtype, rngs=rngs) if gated else None
        self.up_proj = Linear("d -> f", sizes, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.down_proj = Linear("f -> d", sizes, bias=bias, std=std, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        inner = [self.up_proj] if self.gate_proj is None else [self.gate_proj, self.up_proj]
        activation = self.activation if self.act_fn is None else self.act_fn
        return self.down_proj(constrain(activation(*Linear.each(inner, x, keys)), "b t f"), keys)


@dataclasses.dataclass(frozen=True)
class Logits:
    """What becomes of `hidden . unembedding`: scaled, perhaps soft-capped, and masked beyond the vocabulary."""

    vocab_size: int
    """Ids from here on are rows that only fill up the table: they can be neither target nor answer."""
    scale: float = 1.0
    soft_cap: float | None = None

    def __call__(self, products: jax.Array, *, first_id: jax.Array | int = 0) -> jax.Array:
        """Logits of float32 products [..., V], whose column 0 is token `first_id`; the lowest float where there is no
        token."""
        logits = products * self.scale if self.scale != 1.0 else products
        if self.soft_cap is not None:
            logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
        is_token = first_id + jnp.arange(products.shape[-1]) < self.vocab_size
        return jnp.where(is_token, logits, jnp.finfo(jnp.float32).min)

    def slope(self, logits: jax.Array) -> jax.Array | float:
        """d logits / d products, from the logits themselves."""
        if self.soft_cap is None:
            return self.scale
        # Ids that are no tokens have the lowest float, and slope 0.
        return self.scale * (1.0 - jnp.square(jnp.clip(logits / self.soft_cap, -1.0, 1.0)))
