"""Short convolutions between two gates: what mixes the tokens of a layer that has no attention.

In: the normed residual stream, segment ids and positions of packed rows. Out: what is added to the stream, and of a
cache the last tokens of each row. A token sees itself and a few tokens before it, those of its own example only:
positions start anew with each example, and a token at position p has p tokens before it.

Where rows are cut over `context`, what is convolved is brought into the order of the row and back (`balance.py`);
between neighbours there, the compiler sends the few tokens that lie on the other side of a cut.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsft.mesh import constrain
from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.balance import Order, balance, restore
from jaxsft.model.layers import Linear


class ShortConvolution(nnx.Module):
    """`out(c * convolved(b * x))` of three maps b, c and x of the stream; each channel is convolved by itself."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        sizes, std = config.sizes, config.initializer_range
        shared: dict[str, Any] = dict(bias=config.conv_bias, std=std, dtype=dtype, rngs=rngs)
        self.b_proj = Linear("d -> m", sizes, **shared)
        self.c_proj = Linear("d -> m", sizes, **shared)
        self.x_proj = Linear("d -> m", sizes, **shared)
        shape = [sizes[letter] for letter in "lmw"]
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), shape, dtype), axes="l m w")
        self.bias = nnx.Param(jnp.zeros(shape[:2], dtype), axes="l m") if config.conv_bias else None
        self.out_proj = Linear("m -> d", sizes, **shared)

    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        window: jax.Array | None,
        order: Order | None,
        keys: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """[B, T, D] -> [B, T, D], and the window [B, W - 1, M] that the tokens after these need.

        Args:
            x: the normed residual stream.
            segment_ids: int32 [B, T]; with a window, a row's tokens lie before its padding.
            positions: int32 [B, T].
            window: of a cache: what was convolved of the last W - 1 tokens of each row.
            order: of the chunks of a row, where it is not that of the row.
            keys: what adapters drop inputs by.
        """
        maps = [self.b_proj, self.c_proj, self.x_proj]
        b, c, inner = (constrain(y, "b t m") for y in Linear.each(maps, x, keys))
        bias = None if self.bias is None else self.bias[...]
        gated = b * inner
        if order is not None:
            gated, positions = restore(gated, "b t m"), restore(positions, "b t")
        mixed = convolved(gated, self.weight[...], bias, positions, window)
        if order is not None:
            mixed = balance(mixed, "b t m")
        if window is not None:
            window = next_window(window, gated, segment_ids)
        return self.out_proj(constrain(c * mixed, "b t m"), keys), window


@jax.checkpoint
def convolved(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, positions: jax.Array, window: jax.Array | None = None
) -> jax.Array:
    """Each channel's weighted sum over a token and those before it in its example; summed in float32.

    Worked example: x [1, 2, 4] of one channel at positions [0, 1, 0] with weight [10, 1] gives [1, 12, 4].

    Args:
        x: [B, T, M].
        weight: [M, W], the token at hand last.
        bias: [M], or None.
        positions: int32 [B, T], of a token in its example.
        window: [B, W - 1, M]: the tokens before those of `x`; None: there are none.

    Returns:
        [B, T, M], in the dtype of `x`.
    """
    length, width = x.shape[1], weight.shape[-1]
    before = x.astype(jnp.float32)  # all of it, so that gradients of what several tokens see are summed in float32
    if window is None:
        before = jnp.pad(before, ((0, 0), (width - 1, 0), (0, 0)))
    else:
        before = jnp.concatenate([window.astype(jnp.float32), before], axis=1)
    weight = weight.astype(jnp.float32)
    total = jnp.zeros(x.shape, jnp.float32) if bias is None else bias.astype(jnp.float32)
    for distance in range(width):
        first = width - 1 - distance
        seen = before[:, first : first + length]
        total += weight[:, first] * jnp.where((positions >= distance)[..., None], seen, 0.0)
    return total.astype(x.dtype)


def next_window(window: jax.Array, x: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The last tokens of each row, after those of `x` [B, T, M]: [B, W - 1, M]. Padding behind them is passed over."""
    num_tokens = jnp.sum(segment_ids > 0, axis=1)
    at = num_tokens[:, None] + jnp.arange(window.shape[1])
    return jnp.take_along_axis(jnp.concatenate([window, x.astype(window.dtype)], axis=1), at[..., None], axis=1)
