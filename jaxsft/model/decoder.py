"""The decoder: tokens to hidden states, all layers stacked and scanned, with or without a key/value cache.

In: tokens, segment ids and positions of packed rows. Out: hidden states after the final norm; logits are the loss's
business (`loss.py`), except for `logits`, which generation and tests use. Families (`families/`) only say how the
`config.json` and the tensors of a Hugging Face model become a `DecoderConfig` and these weights.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsft.mesh import constrain
from jaxsft.model.attention import attention
from jaxsft.model.layers import GatedMLP, Linear, RMSNorm, Rope, precision, rope_frequencies, rotate


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The mathematics of a decoder; made from a `config.json` by its family."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    """Positions that the model was made for; a row may hold more, but what it then computes was never trained."""
    rms_norm_eps: float
    rope: Rope
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    initializer_range: float
    """Standard deviation of random weights."""

    @property
    def sizes(self) -> dict[str, int]:
        """Letter of a dim to its size."""
        return {
            "l": self.num_layers,
            "v": self.vocab_size,
            "d": self.hidden_size,
            "n": self.num_heads,
            "k": self.num_kv_heads,
            "h": self.head_dim,
            "f": self.intermediate_size,
        }


class Cache(NamedTuple):
    """Keys and values of the tokens so far; slots from `length` on are empty (segment 0)."""

    k: jax.Array
    """[L, B, S, K, H], rotated"""
    v: jax.Array
    """[L, B, S, K, H]"""
    segment_ids: jax.Array
    """int32 [B, S]"""
    positions: jax.Array
    """int32 [B, S]"""
    length: jax.Array
    """int32 []: slots written, the same in every row."""


class Slots(NamedTuple):
    """What every layer needs to know of the rows: whom a query may attend to, and where the new keys go."""

    cos: jax.Array
    sin: jax.Array
    q_segment_ids: jax.Array
    q_positions: jax.Array
    kv_segment_ids: jax.Array
    kv_positions: jax.Array
    start: jax.Array | int


class Attention(nnx.Module):
    """The attention half of a layer, from normed residual stream to what is added to it."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        shared: dict[str, Any] = dict(bias=config.attention_bias, std=config.initializer_range, dtype=dtype, rngs=rngs)
        self.q_proj = Linear("d -> n h", config.sizes, **shared)
        self.k_proj = Linear("d -> k h", config.sizes, **shared)
        self.v_proj = Linear("d -> k h", config.sizes, **shared)
        self.o_proj = Linear("n h -> d", config.sizes, **shared)

    def __call__(self, x: jax.Array, slots: Slots, cached: tuple[jax.Array, jax.Array] | None) -> tuple[jax.Array, Any]:
        """[B, T, D] -> [B, T, D], and this layer's cached keys and values [B, S, K, H] with the new ones written."""
        q = rotate(constrain(self.q_proj(x), "b t n h"), slots.cos, slots.sin)
        k = rotate(constrain(self.k_proj(x), "b t k h"), slots.cos, slots.sin)
        v = constrain(self.v_proj(x), "b t k h")
        if cached is not None:
            old_k, old_v = cached
            k = jax.lax.dynamic_update_slice_in_dim(old_k, k.astype(old_k.dtype), slots.start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(old_v, v.astype(old_v.dtype), slots.start, axis=1)
            cached = (k, v)
        mixed = attention(
            q,
            k.astype(q.dtype),
            v.astype(q.dtype),
            q_segment_ids=slots.q_segment_ids,
            kv_segment_ids=slots.kv_segment_ids,
            q_positions=slots.q_positions,
            kv_positions=slots.kv_positions,
        )
        return self.o_proj(constrain(mixed, "b t n h")), cached


class Layers(nnx.Module):
    """All layers at once (every weight has a leading `l`), or one of them (inside the scan, without it)."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        sizes, eps = config.sizes, config.rms_norm_eps
        self.input_layernorm = RMSNorm("l d", sizes, eps=eps, dtype=dtype)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm("l d", sizes, eps=eps, dtype=dtype)
        self.mlp = GatedMLP(sizes, bias=config.mlp_bias, std=config.initializer_range, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, slots: Slots, cached: tuple[jax.Array, jax.Array] | None) -> tuple[jax.Array, Any]:
        """One layer: [B, T, D] -> [B, T, D], and its cached keys and values."""
        mixed, cached = self.self_attn(self.input_layernorm(x), slots, cached)
        x = constrain(x + mixed, "b t d")
        x = constrain(x + self.mlp(self.post_attention_layernorm(x)), "b t d")
        return x, cached


class Embedding(nnx.Module):
    """A table [V, D], of token embeddings or of an output projection."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        table = config.initializer_range * jax.random.normal(rngs.params(), shape, dtype)
        self.weight = nnx.Param(table, axes="v d")


class Decoder(nnx.Module):
    """A causal decoder. Its state holds `embed_tokens`, `layers`, `norm` and, untied, `lm_head`."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        compute_dtype: jnp.dtype | str,
        param_dtype: jnp.dtype | str,
        remat: Literal["none", "dots", "full"],
        rngs: nnx.Rngs,
    ):
        """Random weights: normal(initializer_range), norms ones, biases zeros, each weight of its own key of `rngs`."""
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.remat = remat
        dtype = jnp.dtype(param_dtype)
        self.embed_tokens = Embedding(config, dtype=dtype, rngs=rngs)
        self.layers = Layers(config, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm("d", config.sizes, eps=config.rms_norm_eps, dtype=dtype)
        self.lm_head = None if config.tie_embeddings else Embedding(config, dtype=dtype, rngs=rngs)

    @overload
    def __call__(self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array: ...

    @overload
    def __call__(
        self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, *, cache: Cache
    ) -> tuple[jax.Array, Cache]: ...

    def __call__(
        self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, *, cache: Cache | None = None
    ) -> jax.Array | tuple[jax.Array, Cache]:
        """Hidden states [B, T, D] after the final norm, in the compute dtype.

        Args:
            tokens: int32 [B, T], in [0, V); an id outside is clamped, so it must be checked where tokens are made.
            segment_ids: int32 [B, T], from 1; 0 is padding.
            positions: int32 [B, T], index within the segment.
            cache: keys and values of earlier tokens. The new ones are written at slots [length, length + T), which must
                exist, and the cache so extended is returned beside the hidden states.
        """
        # Looked up where the table lies, and only then cut by rows: in one step, it would all be replicated.
        hidden = constrain(self.embed_tokens.weight[...].astype(self.compute_dtype)[tokens], "u t d")
        slots, cached = self._slots(segment_ids, positions, cache)
        hidden, cached = self._scan(constrain(hidden, "b t d"), slots, cached)
        hidden = self.norm(hidden)
        if cache is None:
            return hidden
        k, v = cached
        return hidden, Cache(k, v, slots.kv_segment_ids, slots.kv_positions, cache.length + tokens.shape[1])

    def _slots(self, segment_ids: jax.Array, positions: jax.Array, cache: Cache | None) -> tuple[Slots, Any]:
        frequencies = rope_frequencies(self.config.rope, self.config.head_dim)
        angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
        rotation = (jnp.cos(angles), jnp.sin(angles))
        if cache is None:
            return Slots(*rotation, segment_ids, positions, segment_ids, positions, 0), None
        write = jax.lax.dynamic_update_slice_in_dim
        all_segment_ids = write(cache.segment_ids, segment_ids, cache.length, axis=1)
        all_positions = write(cache.positions, positions, cache.length, axis=1)
        slots = Slots(*rotation, segment_ids, positions, all_segment_ids, all_positions, cache.length)
        return slots, (cache.k, cache.v)

    def _scan(self, x: jax.Array, slots: Slots, cached: tuple[jax.Array, jax.Array] | None) -> tuple[jax.Array, Any]:
        graphdef, weights = nnx.split(self.layers)

        def body(x: jax.Array, layer: tuple[nnx.State, Any]) -> tuple[jax.Array, Any]:
            weights, cached = layer
            return nnx.merge(graphdef, weights)(x, slots, cached)

        if self.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None
            # A scan is already a barrier against common-subexpression elimination.
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        return jax.lax.scan(body, x, (weights, cached))

    @property
    def unembedding(self) -> jax.Array:
        """The output projection [V, D] in its stored dtype, tied to the embedding or not."""
        table = self.embed_tokens if self.lm_head is None else self.lm_head
        return table.weight[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [B, T, V] of hidden states [B, T, D]. For generation and tests; training never makes them."""
        return jnp.einsum(
            "btd,vd->btv",
            hidden,
            self.unembedding.astype(hidden.dtype),
            precision=precision(hidden.dtype),
            preferred_element_type=jnp.float32,
        )

    def make_cache(self, batch_size: int, size: int, *, dtype: jnp.dtype | str | None = None) -> Cache:
        """An empty cache of `size` slots per row, in the compute dtype if no other is given."""
        config = self.config
        shape = (config.num_layers, batch_size, size, config.num_kv_heads, config.head_dim)
        empty = jnp.zeros(shape, dtype or self.compute_dtype)
        rows = jnp.zeros((batch_size, size), jnp.int32)
        return Cache(empty, empty, rows, rows, jnp.zeros((), jnp.int32))
