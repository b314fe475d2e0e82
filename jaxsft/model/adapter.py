"""An adapter of low rank beside a map whose own weight is not trained: A and B, their scale, and DoRA's magnitude.

In: the input of the map and what its weight makes of it. Out: that with what A and B add. Which maps get adapters, and
of which rank, is decided in `lora.py`; this is what they compute.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsft.mesh import constrain
from jaxsft.model.noise import fold, uniform
from jaxsft.model.products import precision, product


class LoraParam(nnx.Param):
    """A weight of an adapter."""


class Frozen(nnx.Variable):
    """A weight of the model that is not trained."""


class Constant(nnx.Variable):
    """What is neither trained nor a weight of a file: it follows from the config."""


def of_layers(variable: nnx.Variable) -> dict[str, Any]:
    """The metadata of a Variable that says whose layers' it is, where not all have it; for one that takes its place."""
    layers = variable.get_metadata().get("layers")
    return {} if layers is None else {"layers": layers}


class Adapter(nnx.Module):
    """`x A B`, scaled, of one map of all layers at once, or (inside the scan) of one layer's.

    Layers may have ranks of their own: A and B have the largest, and are 0 beyond a layer's, which then stay 0, as the
    gradient of either is a multiple of the other.
    """

    def __init__(
        self,
        inputs: str,
        outputs: str,
        sizes: Mapping[str, int],
        *,
        ranks: np.ndarray,
        scales: np.ndarray,
        dropout: float,
        dora: bool,
        number: int,
        leading: str = "l",
        key: jax.Array,
        dtype: jnp.dtype,
    ):
        """A is drawn from U(-1 / sqrt(in), 1 / sqrt(in)) and B is 0, as in PEFT; of a look-up A is 0, B normal(0, 1).

        Args:
            inputs: letters of what goes in, such as "n h".
            outputs: letters of what comes out; an input "v" is that of a look-up.
            sizes: letter of a dim to its size.
            ranks: int [L], or [] of a table; 0 for a layer without.
            scales: float32, likewise: what `x A B` is multiplied by.
            dropout: share of the inputs that A is not shown in training.
            dora: outputs have a trained magnitude, which `lora.with_magnitudes` sets to that of the weights.
            number: of this adapter among those of a layer; each draws numbers of its own.
            leading: letters before those of the map: "l", "l e" of experts, none of a table.
            key: of A.
            dtype: of A and B.
        """
        self.dropout, self.number = dropout, number
        self.inputs, self.outputs = inputs, outputs
        experts = (1,) * (len(leading.split()) - ranks.ndim)
        rank = int(ranks.max())
        sizes = {**sizes, "r": rank}

        def axes_and_shape(letters: str) -> tuple[str, tuple[int, ...]]:
            axes = f"{leading} {letters}".strip()
            return axes, tuple(sizes[letter] for letter in axes.split())

        is_lookup = inputs == "v"
        is_used = jnp.arange(rank) < ranks[..., None]
        axes, shape = axes_and_shape(f"{inputs} r")
        width = int(np.prod([sizes[letter] for letter in inputs.split()]))
        bound = width**-0.5
        a = jnp.zeros(shape, dtype) if is_lookup else jax.random.uniform(key, shape, dtype, -bound, bound)
        used = is_used.reshape(*ranks.shape, *experts, *(1 for _ in inputs.split()), rank)
        self.a = LoraParam(jnp.where(used, a, 0), axes=axes)
        axes, shape = axes_and_shape(f"r {outputs}")
        b = jax.random.normal(key, shape, dtype) if is_lookup else jnp.zeros(shape, dtype)
        used = is_used.reshape(*ranks.shape, *experts, rank, *(1 for _ in outputs.split()))
        self.b = LoraParam(jnp.where(used, b, 0), axes=axes)
        self.scale = Constant(jnp.asarray(scales, jnp.float32), axes="l" if ranks.ndim else "")
        axes, shape = axes_and_shape(outputs)
        self.magnitude = LoraParam(jnp.ones(shape, jnp.float32), axes=axes) if dora else None

    def __call__(self, x: jax.Array, y: jax.Array, weight: jax.Array, keys: jax.Array | None) -> jax.Array:
        """What the map makes of `x`, in the dtype of `y`.

        y + scale * x A B, and with DoRA that times magnitude / |weight + scale * A B|, the norm of each output's
        weights, through which no gradient goes (Liu et al. 2024, section 4.3).

        Args:
            x: [B, T, inputs].
            y: [B, T, outputs], what the weight alone makes of it, without a bias.
            weight: [inputs, outputs].
            keys: uint32 [B, T, 2], of the tokens of this layer; None: nothing is dropped.
        """
        low = self._low(x if keys is None or not self.dropout else self._drop(x, keys))
        y_float = y.astype(jnp.float32) + self._raise(low)
        if self.magnitude is not None:
            ratio = self.magnitude[...] / jax.lax.stop_gradient(self.norm(weight))
            y_float *= jnp.where(self.scale[...] > 0, ratio, 1.0)  # a layer of rank 0 has no adapter, and no magnitude
        return y_float.astype(y.dtype)

    def _low(self, x: jax.Array) -> jax.Array:
        return constrain(product(f"b t {self.inputs}, {self.inputs} r -> b t r", x, self.a[...]), "b t r")

    def _raise(self, low: jax.Array) -> jax.Array:
        """float32; the scale stays as exact as it is."""
        added = product(f"b t r, r {self.outputs} -> b t {self.outputs}", low, self.b[...])
        return self.scale[...] * added.astype(jnp.float32)

    def _drop(self, x: jax.Array, keys: jax.Array) -> jax.Array:
        size = int(np.prod(x.shape[2:]))
        is_kept = uniform(fold(keys, self.number), size).reshape(x.shape) >= self.dropout
        return jnp.where(is_kept, x / (1 - self.dropout), 0).astype(x.dtype)

    def added(self) -> jax.Array:
        """float32 [inputs, outputs] (of one layer): what the weight would have more, with the adapter in it."""
        a, b = (each[...].astype(jnp.float32) for each in (self.a, self.b))
        exact = precision(jnp.dtype(jnp.float32))
        return self.scale[...] * jnp.einsum(
            f"{self.inputs} r, r {self.outputs} -> {self.inputs} {self.outputs}", a, b, precision=exact
        )

    def norm(self, weight: jax.Array) -> jax.Array:
        """float32 [outputs]: |weight + scale * A B| of each output's weights, without making A B.

        |w + s A b|^2 = |w|^2 + 2 s (w A) . b + s^2 b . (A^T A) b.
        """
        a, b, w, scale = (each.astype(jnp.float32) for each in (self.a[...], self.b[...], weight, self.scale[...]))
        inputs, outputs, exact = self.inputs, self.outputs, precision(jnp.dtype(jnp.float32))
        products = jnp.einsum(f"{inputs} {outputs}, {inputs} r -> r {outputs}", w, a, precision=exact)
        of_a = jnp.einsum(f"{inputs} r, {inputs} s -> r s", a, a, precision=exact)
        squares = jnp.einsum(f"r {outputs}, r s, s {outputs} -> {outputs}", b, of_a, b, precision=exact)
        own = jnp.sum(jnp.square(w), axis=tuple(range(len(inputs.split()))))
        return jnp.sqrt(own + 2 * scale * jnp.sum(products * b, axis=0) + jnp.square(scale) * squares)

    def looked_up(self, rows: jax.Array, low: jax.Array) -> jax.Array:
        """Rows [B, T, D] of a table, with what rows [B, T, R] of A add."""
        return (rows.astype(jnp.float32) + self._raise(low)).astype(rows.dtype)
