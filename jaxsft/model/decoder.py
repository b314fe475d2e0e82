"""The decoder: tokens to hidden states, all layers stacked and scanned, with or without a key/value cache.

In: tokens, segment ids and positions of packed rows. Out: hidden states after the final norm; logits are the loss's
business (`loss.py`), except for `logits`, which generation and tests use. Families (`families/`) only say how the
`config.json` and the tensors of a Hugging Face model become a `DecoderConfig` and these weights.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsft.config import AttentionKernel
from jaxsft.mesh import constrain
from jaxsft.model.adapter import Constant
from jaxsft.model.architecture import MIXERS, DecoderConfig, LayerKind, Mixer, period_of
from jaxsft.model.attention import attention
from jaxsft.model.balance import Order, balance, balanced_order, restore
from jaxsft.model.convolution import ShortConvolution
from jaxsft.model.embedding import Embedding
from jaxsft.model.experts import MixtureMLP, RouterSums
from jaxsft.model.layers import MLP, Linear, Norm
from jaxsft.model.noise import fold, noise_scale, noisy, token_keys
from jaxsft.model.products import precision
from jaxsft.model.remat import POLICIES, Remat, all_but_slices, keep
from jaxsft.model.rope import Rotation, example_lengths, rotate, rotation


class Cache(NamedTuple):
    """Keys and values of the tokens so far; slots from `length` on are empty (segment 0). Of layers without attention,
    what they must know of the tokens so far; each L counts the layers of its kind."""

    k: jax.Array
    """[L, B, S, K, H], rotated. Where angles depend on the length (`Rope.changes_at`), a cache is made anew."""
    v: jax.Array
    """[L, B, S, K, H]"""
    segment_ids: jax.Array
    """int32 [B, S]"""
    positions: jax.Array
    """int32 [B, S]"""
    length: jax.Array
    """int32 []: slots written, the same in every row."""
    windows: jax.Array | None = None
    """[L, B, W - 1, M]: of each row's last tokens, what short convolutions see again; None in models without."""


class Output(NamedTuple):
    """What a decoder makes of tokens."""

    hidden: jax.Array
    """[B, T, D], after the final norm, in the compute dtype."""
    cache: Cache | None
    """The cache that was given, with the new tokens."""
    router: RouterSums | None
    """Sums of the routers of a mixture: leaves with a leading L."""


class Slots(NamedTuple):
    """What every layer needs to know of the rows: whom a query may attend to, and where the new keys go."""

    rotations: tuple[Rotation, ...]
    """Of the queries, one for each rope."""
    q_segment_ids: jax.Array
    q_positions: jax.Array
    kv_segment_ids: jax.Array
    kv_positions: jax.Array
    order: Order | None
    """Of the chunks of a row, where it is not that of the row (`balance.py`)."""
    start: jax.Array | int
    keys: jax.Array | None
    """uint32 [B, T, 2]: what tokens draw their noise by; None where there is none."""


class Attention(nnx.Module):
    """The attention half of a layer, from normed residual stream to what is added to it."""

    def __init__(self, config: DecoderConfig, *, kernel: AttentionKernel, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.kernel = kernel
        self.num_segments: int | None = None  # of a row at most, where that is known (`with_attention`)
        shared: dict[str, Any] = dict(std=config.initializer_range, dtype=dtype, rngs=rngs)
        self.q_proj = Linear("d -> n h", config.sizes, bias=config.qkv_bias, **shared)
        self.k_proj = Linear("d -> k h", config.sizes, bias=config.qkv_bias, **shared)
        self.v_proj = Linear("d -> k h", config.sizes, bias=config.qkv_bias, **shared)
        self.o_proj = Linear("n h -> d", config.sizes, bias=config.attention_bias, **shared)
        self.q_norm, self.k_norm = (self._norm(letter, dtype) for letter in "nk")
        self.sinks = nnx.Param(jnp.zeros([config.sizes[a] for a in "ln"], dtype), axes="l n") if config.sinks else None

    def _norm(self, heads: str, dtype: jnp.dtype) -> Norm | None:
        config = self.config
        if config.qk_norm == "none":
            return None
        axes = "l h" if config.qk_norm == "head" else f"l {heads} h"
        over = 2 if config.qk_norm == "all heads" else 1
        return Norm(axes, config.sizes, config.qk_norm_kind or config.norm, dtype=dtype, over=over)

    def __call__(
        self, x: jax.Array, slots: Slots, cached: tuple[jax.Array, jax.Array] | None, kind: LayerKind
    ) -> tuple[jax.Array, Any]:
        """[B, T, D] -> [B, T, D], and this layer's cached keys and values [B, S, K, H] with the new ones written."""
        config = self.config
        projected = Linear.each([self.q_proj, self.k_proj, self.v_proj], x, slots.keys)
        q, k, v = (constrain(y, f"b t {heads} h") for y, heads in zip(projected, "nkk", strict=True))
        if self.q_norm is not None and self.k_norm is not None and not config.qk_norm_after_rope:
            q, k = self.q_norm(q), self.k_norm(k)
        if kind.rope is not None:
            interleaved = config.ropes[kind.rope].interleaved
            q, k = (rotate(x, slots.rotations[kind.rope], interleaved=interleaved) for x in (q, k))
        if self.q_norm is not None and self.k_norm is not None and config.qk_norm_after_rope:
            q, k = self.q_norm(q), self.k_norm(k)
        if cached is not None:
            old_k, old_v = cached
            k = jax.lax.dynamic_update_slice_in_dim(old_k, k.astype(old_k.dtype), slots.start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(old_v, v.astype(old_v.dtype), slots.start, axis=1)
            cached = (k, v)
            k, v = k.astype(q.dtype), v.astype(q.dtype)
        if config.query_scale is not None:
            q = (q * config.query_scale(slots.q_positions)[:, :, None, None]).astype(q.dtype)
        mixed = attention(
            q,
            k,
            v,
            q_segment_ids=slots.q_segment_ids,
            kv_segment_ids=slots.kv_segment_ids,
            q_positions=slots.q_positions,
            kv_positions=slots.kv_positions,
            scale=config.attention_scale,
            window=kind.window,
            soft_cap=config.attention_soft_cap,
            sinks=None if self.sinks is None else self.sinks[...],
            order=slots.order,
            kernel=self.kernel if cached is None else "xla",
            num_segments=self.num_segments,
        )
        return self.o_proj(mixed, slots.keys), cached


class Layers(nnx.Module):
    """All layers at once (every weight has a leading `l`), or one of them (inside the scan, without it).

    Where layers differ in what mixes their tokens, the `l` of a mixer counts the layers that have it, whose numbers its
    Variables know as `layers`; one of the layers has its own mixer, and None in place of the others.
    """

    def __init__(self, config: DecoderConfig, *, kernel: AttentionKernel, dtype: jnp.dtype, rngs: nnx.Rngs):
        def norm(name: str) -> Norm | None:
            return Norm("l d", config.sizes, config.norm, dtype=dtype) if name in config.norms else None

        self.config = config
        self.pre_attention_norm = norm("pre_attention")
        make: dict[Mixer, Callable[[DecoderConfig], nnx.Module]] = {
            "self_attn": lambda config: Attention(config, kernel=kernel, dtype=dtype, rngs=rngs),
            "conv": lambda config: ShortConvolution(config, dtype=dtype, rngs=rngs),
        }
        mixers = {mixer: _of_some_layers(make[mixer], config, mixer) for mixer in config.mixers}
        self.self_attn: Any = mixers.get("self_attn")
        self.conv: Any = mixers.get("conv")
        self.post_attention_norm = norm("post_attention")
        self.pre_mlp_norm = norm("pre_mlp")
        shared: dict[str, Any] = dict(bias=config.mlp_bias, std=config.initializer_range, dtype=dtype, rngs=rngs)
        self.mlp = (
            MLP(config.sizes, activation=config.activation, gated=config.gated, **shared)
            if config.routing is None
            else MixtureMLP(config.sizes, routing=config.routing, gating=config.activation, **shared)
        )
        self.post_mlp_norm = norm("post_mlp")
        self.number: Constant | None = None
        """Of the layer, where it draws noise."""

    def __call__(
        self, x: jax.Array, slots: Slots, cached: dict[Mixer, Any] | None, kind: LayerKind
    ) -> tuple[jax.Array, Any]:
        """One layer: [B, T, D] -> [B, T, D]; and what its mixer keeps in the cache, and the sums of its router."""
        x = keep(x, "input")
        if slots.keys is not None and self.number is not None:
            slots = slots._replace(keys=fold(slots.keys, self.number[...]))
        normed = x if self.pre_attention_norm is None else self.pre_attention_norm(x)
        own = None if cached is None else cached[kind.mixer]
        if kind.mixer == "self_attn":
            mixed, own = self.self_attn(normed, slots, own, kind)
        else:
            mixed, own = self.conv(normed, slots.q_segment_ids, slots.q_positions, own, slots.order, slots.keys)
        after = keep(self._add(x, mixed, self.post_attention_norm), "residual")
        mlp_input = x if self.config.parallel else after
        if self.pre_mlp_norm is not None:
            mlp_input = self.pre_mlp_norm(mlp_input)
        elif self.config.parallel:
            mlp_input = normed  # one norm for both
        router = None
        if isinstance(self.mlp, MixtureMLP):
            out, router = self.mlp(mlp_input, slots.q_segment_ids > 0, slots.keys)
        else:
            out = self.mlp(mlp_input, slots.keys)
        return self._add(after, out, self.post_mlp_norm), ({kind.mixer: own}, router)

    def _add(self, x: jax.Array, out: jax.Array, norm: Norm | None) -> jax.Array:
        out = out if norm is None else norm(out)
        if (scale := self.config.residual_scale) != 1.0:
            # In the compute dtype, the factor itself would be rounded.
            out = (out.astype(jnp.float32) * scale).astype(out.dtype)
        return constrain(x + out, "b t d")


class Decoder(nnx.Module):
    """A causal decoder. Its state holds `embed_tokens`, `layers`, `norm` and, untied, `lm_head`."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        compute_dtype: jnp.dtype | str,
        param_dtype: jnp.dtype | str,
        remat: Remat,
        unroll: bool = False,
        attention: AttentionKernel = "auto",
        rngs: nnx.Rngs,
    ):
        """Random weights: normal(initializer_range), norms ones, biases zeros, each weight of its own key of `rngs`.

        Args:
            unroll: each layer is compiled by itself, in place of one period of layers that is run again and again.
            attention: what computes attention without a cache (`attention.choose_kernel`).
        """
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.remat = remat
        self.unroll = unroll
        dtype = jnp.dtype(param_dtype)
        table = functools.partial(Embedding, config=config, dtype=dtype, rngs=rngs)
        self.embed_tokens = table("v d", config.vocab_size)
        self.embed_positions = table("p d", config.max_position) if config.learned_positions else None
        self.layers = Layers(config, kernel=attention, dtype=dtype, rngs=rngs)
        self.last_layers: Layers | None = None
        """Those from some layer on, where they are trained and what lies before them is not (`freezing.py`)."""
        self.norm = Norm("d", config.sizes, config.norm, dtype=dtype)
        self.lm_head = None if config.tie_embeddings else table("v d", config.vocab_size)

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        *,
        cache: Cache | None = None,
        noise: jax.Array | None = None,
        neftune_alpha: float = 0.0,
    ) -> Output:
        """Hidden states after the final norm.

        Args:
            tokens: int32 [B, T], in [0, V); an id outside is clamped, so it must be checked where tokens are made.
            segment_ids: int32 [B, T], from 1; 0 is padding.
            positions: int32 [B, T], index within the segment.
            cache: keys and values of earlier tokens. The new ones are written at slots [length, length + T), which must
                exist, and the cache so extended is returned beside the hidden states.
            noise: uint32 [B, 2], the keys of the rows (`noise.py`), by which adapters drop inputs; None: they do not.
            neftune_alpha: how much noise is added to embeddings, by the same keys, as they enter the first layer's sum:
                scaled, and without learned positions.
        """
        order = balanced_order(*tokens.shape) if cache is None else None
        keys = None if noise is None else constrain(token_keys(noise, tokens.shape[1]), "b t w")
        scale = None
        if neftune_alpha:
            scale = noise_scale(segment_ids, positions, alpha=neftune_alpha, width=self.config.sizes["d"])
        if order is not None:
            keys = None if keys is None else balance(keys, "b t w")
            scale = None if scale is None else balance(scale, "b t")
            tokens, segment_ids, positions = (balance(x, "b t") for x in (tokens, segment_ids, positions))
        hidden = self._embed(tokens, positions, keys, scale)
        slots, cached = self._slots(segment_ids, positions, cache, order)
        slots = slots._replace(keys=keys)
        hidden, (cached, router) = self._run(hidden, slots, cached)
        hidden = self.norm(hidden)
        if order is not None:
            hidden = restore(hidden, "b t d")
        if cache is not None:
            k, v = cached.get("self_attn", (cache.k, cache.v))
            rows = slots.kv_segment_ids, slots.kv_positions
            cache = Cache(k, v, *rows, cache.length + tokens.shape[1], cached.get("conv"))
        return Output(hidden, cache, router)

    def residuals(self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """The residual stream [L + 1, B, T, D]: embeddings, and what each layer leaves. To see where models part."""
        slots, _ = self._slots(segment_ids, positions, None, None)
        stream = [self._embed(tokens, positions, None, None)]
        for stack, first, count in self._stacks():
            graphdefs, weights = _graphdefs(stack), nnx.state(stack)
            kinds = self.config.layers[first : first + count]
            for kind, of_layer in zip(kinds, _split(weights, kinds), strict=True):
                stream.append(nnx.merge(graphdefs[kind.mixer], of_layer)(stream[-1], slots, None, kind)[0])
        return jnp.stack(stream)

    @property
    def drops_inputs(self) -> bool:
        """Whether adapters drop some of their inputs in training."""
        return self.layers.number is not None

    @property
    def stacks(self) -> list[Layers]:
        """Layers that are stacked together: mostly all of them."""
        return [self.layers] if self.last_layers is None else [self.layers, self.last_layers]

    def _stacks(self) -> Iterator[tuple[Layers, int, int]]:
        """Stacks, the number of each one's first layer, and how many they are."""
        first = 0
        for stack in self.stacks:
            count = max(map(len, jax.tree.leaves(nnx.state(stack))))  # a mixer may be that of a few of them
            yield stack, first, count
            first += count

    def _embed(
        self, tokens: jax.Array, positions: jax.Array, keys: jax.Array | None, scale: jax.Array | None
    ) -> jax.Array:
        hidden = self.embed_tokens(tokens, self.compute_dtype)
        if self.config.embedding_scale != 1.0:
            hidden *= self.config.embedding_scale
        if scale is not None:
            assert keys is not None
            hidden = noisy(constrain(hidden, "b t d"), keys, scale)
        if self.embed_positions is not None:
            hidden += self.embed_positions(positions, self.compute_dtype)
        if self.config.embedding_norm:
            hidden = self.norm(hidden)
        return constrain(hidden, "b t d")

    def _slots(
        self, segment_ids: jax.Array, positions: jax.Array, cache: Cache | None, order: Order | None
    ) -> tuple[Slots, Any]:
        all_segment_ids, all_positions, start = segment_ids, positions, jnp.zeros((), jnp.int32)
        cached: dict[Mixer, Any] | None = None
        if order is not None:
            # Gathered here, once for all layers.
            all_segment_ids, all_positions = (constrain(x, "b s") for x in (segment_ids, positions))
        if cache is not None:
            write = jax.lax.dynamic_update_slice_in_dim
            all_segment_ids = write(cache.segment_ids, segment_ids, cache.length, axis=1)
            all_positions = write(cache.positions, positions, cache.length, axis=1)
            start, cached = cache.length, {"self_attn": (cache.k, cache.v)}
            if cache.windows is not None:
                cached["conv"] = cache.windows

        lengths = None
        if any(rope.depends_on_length for rope in self.config.ropes):
            lengths = example_lengths(segment_ids, all_segment_ids, all_positions)
        rotations = tuple(rotation(rope, positions, lengths) for rope in self.config.ropes)
        return Slots(rotations, segment_ids, positions, all_segment_ids, all_positions, order, start, None), cached

    @jax.named_scope("layers")
    def _run(self, x: jax.Array, slots: Slots, cached: dict[Mixer, Any] | None) -> tuple[jax.Array, Any]:
        """All layers, stack by stack."""
        outs = []
        for stack, first, count in self._stacks():
            of_stack = jax.tree.map(lambda each: each[first : first + count], cached)  # noqa: B023 (used at once)
            x, out = self._run_stack(stack, self.config.layers[first : first + count], x, slots, of_stack)
            outs.append(out)
        return x, outs[0] if len(outs) == 1 else _put_together(outs, jnp.concatenate)

    def _run_stack(
        self,
        stack: Layers,
        kinds: tuple[LayerKind, ...],
        x: jax.Array,
        slots: Slots,
        cached: dict[Mixer, Any] | None,
    ) -> tuple[jax.Array, Any]:
        """Whole periods of the layers' pattern in a scan, the rest (or all, unrolled) one after the other."""
        graphdefs, weights = _graphdefs(stack), nnx.state(stack)
        period = period_of(kinds)
        scanned = 0 if self.unroll else len(kinds) // period * period

        def make_layer(kind: LayerKind, *, in_scan: bool, number: int | None = None) -> Callable:
            """Of its weights, or of those of a period of which it is layer `number`."""

            def layer(x: jax.Array, weights: nnx.State, slots: Slots, cached: Any) -> tuple[jax.Array, Any]:
                if number is not None:
                    weights = _picked(weights, kinds, number)
                return nnx.merge(graphdefs[kind.mixer], weights)(x, slots, cached, kind)

            policy = POLICIES[self.remat]
            if self.remat == "none" and (not in_scan or self.config.routing is not None):
                if number is None:
                    return layer
                policy = all_but_slices
            # A scan is already a barrier against common-subexpression elimination.
            return jax.checkpoint(layer, policy=policy, prevent_cse=not in_scan)

        def run(x: jax.Array, kinds: tuple[LayerKind, ...], of_layers: Any) -> tuple[jax.Array, Any]:
            outs = []
            for kind, *of_layer in zip(kinds, *(_split(each, kinds) for each in of_layers), strict=True):
                x, out = make_layer(kind, in_scan=False)(x, of_layer[0], slots, of_layer[1])
                outs.append(out)
            return x, _put_together(outs, jnp.stack)

        def scan(x: jax.Array, of_layers: Any) -> tuple[jax.Array, Any]:
            def body(x: jax.Array, of_period: Any) -> tuple[jax.Array, Any]:
                # The compiler unrolls a loop of one turn, which then is no barrier.
                in_scan, (of_layers, cached) = scanned > period, of_period
                outs = []
                for number, kind in enumerate(kinds[:period]):
                    own, of_layer = _own(of_layers, kind), _picked(_own(cached, kind), kinds, number)
                    x, out = make_layer(kind, in_scan=in_scan, number=number)(x, own, slots, of_layer)
                    outs.append(out)
                return x, _put_together(outs, jnp.stack)

            # What enters a layer is what the backward pass needs of it. The weights that enter the scan are there
            # anyway; of slices of them, made before a layer, it would keep copies.
            if period == 1:
                layer = make_layer(kinds[0], in_scan=scanned > 1)
                return jax.lax.scan(lambda x, of_layer: layer(x, of_layer[0], slots, of_layer[1]), x, of_layers)
            num_periods = scanned // period
            periods = jax.tree.map(
                lambda leaf: leaf.reshape(num_periods, len(leaf) // num_periods, *leaf.shape[1:]), of_layers
            )
            x, out = jax.lax.scan(body, x, periods)
            return x, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)

        if scanned == len(kinds):
            return scan(x, (weights, cached))
        if scanned == 0:
            return run(x, kinds, (weights, cached))
        whole_periods, rest = _cut((weights, cached), kinds, scanned)
        x, first_out = scan(x, whole_periods)
        x, last_out = run(x, kinds[scanned:], rest)
        return x, _put_together([first_out, last_out], jnp.concatenate)

    @property
    def unembedding(self) -> jax.Array:
        """The output projection [V, D] in its stored dtype, tied to the embedding or not; with an adapter, float32."""
        return self.embed_tokens.weight[...] if self.lm_head is None else self.lm_head.projection

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [B, T, V] of hidden states [B, T, D]. For generation and tests; training never makes them."""
        products = jnp.einsum(
            "btd,vd->btv",
            hidden,
            self.unembedding.astype(hidden.dtype),
            precision=precision(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        return self.config.logits(products)

    def make_cache(self, batch_size: int, size: int) -> Cache:
        """An empty cache of `size` slots per row."""
        config = self.config
        shape = (len(config.layers_of("layers.self_attn")), batch_size, size, config.num_kv_heads, config.head_dim)
        empty = jnp.zeros(shape, self.compute_dtype)
        rows = jnp.zeros((batch_size, size), jnp.int32)
        windows = None
        if num_convolutions := len(config.layers_of("layers.conv")):
            of_windows = (num_convolutions, batch_size, config.conv_width - 1, config.sizes["m"])
            windows = jnp.zeros(of_windows, self.compute_dtype)
        return Cache(empty, empty, rows, rows, jnp.zeros((), jnp.int32), windows)


# Stacks of layers: trees whose leaves have a leading dim of all layers, or under the name of a mixer of its layers.


def _of_some_layers(make: Callable[[DecoderConfig], nnx.Module], config: DecoderConfig, mixer: Mixer) -> nnx.Module:
    """A mixer of the layers that have it."""
    numbers = config.layers_of(f"layers.{mixer}")
    if len(numbers) == len(config.layers):
        return make(config)
    some = make(dataclasses.replace(config, layers=tuple(config.layers[number] for number in numbers)))
    for variable in jax.tree.leaves(nnx.state(some), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        variable.set_metadata(layers=numbers)
    return some


def _graphdefs(stack: Layers) -> dict[Mixer, Any]:
    """The structure of a layer with each mixer."""
    graphdefs: dict[Mixer, Any] = {}
    for mixer in stack.config.mixers:
        layer = nnx.merge(*nnx.split(stack))  # a copy
        for other in stack.config.mixers:
            if other != mixer:
                setattr(layer, other, None)
        graphdefs[mixer] = nnx.graphdef(layer)
    return graphdefs


def _own(tree: Any, kind: LayerKind) -> Any:
    """Without what belongs to other mixers than that of the layer."""
    if tree is None:
        return None
    return type(tree)({name: part for name, part in tree.items() if name not in MIXERS or name == kind.mixer})


def _mixer_at(path: tuple[Any, ...]) -> Mixer | None:
    """The mixer that a leaf of a stack belongs to; None: all layers have it."""
    return next((key.key for key in path if getattr(key, "key", None) in MIXERS), None)


def _number_of(path: tuple[Any, ...], kinds: tuple[LayerKind, ...], number: int) -> int:
    """How many of the layers before `number` have the leaf: its place among them."""
    mixer = _mixer_at(path)
    return number if mixer is None else sum(kind.mixer == mixer for kind in kinds[:number])


def _picked(tree: Any, kinds: tuple[LayerKind, ...], number: int) -> Any:
    """Of a stack that has no other mixers than its own, the layer `number`."""
    return jax.tree_util.tree_map_with_path(lambda path, each: each[_number_of(path, kinds, number)], tree)


def _split(tree: Any, kinds: tuple[LayerKind, ...]) -> list[Any]:
    """A stack to trees of one layer each; backwards, the parts are put together in one copy."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    parts = [[part[0] for part in jax.lax.split(leaf, (1,) * len(leaf))] for _, leaf in leaves]
    trees = []
    for number, kind in enumerate(kinds):
        at = [_number_of(path, kinds, number) for path, _ in leaves]
        # Of a mixer that is not this layer's there may be no such part.
        of_layer = [part[i] if i < len(part) else None for part, i in zip(parts, at, strict=True)]
        trees.append(_own(jax.tree.unflatten(structure, of_layer), kind))
    return trees


def _cut(tree: Any, kinds: tuple[LayerKind, ...], at: int) -> list[Any]:
    """The first `at` layers of a stack, and the rest."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    firsts = [_number_of(path, kinds, at) for path, _ in leaves]
    parts = [jax.lax.split(leaf, (n, len(leaf) - n)) for n, (_, leaf) in zip(firsts, leaves, strict=True)]
    return [jax.tree.unflatten(structure, [each[i] for each in parts]) for i in range(2)]


def _put_together(outs: list[Any], join: Callable) -> Any:
    """What layers return beside the residual stream, stacked, or stacks of it concatenated; of each mixer by itself."""
    cached = {
        mixer: jax.tree.map(lambda *each: join(each), *(own[mixer] for own, _ in outs if mixer in own))
        for mixer in MIXERS
        if any(mixer in own for own, _ in outs)
    }
    return cached, jax.tree.map(lambda *each: join(each), *(router for _, router in outs))
