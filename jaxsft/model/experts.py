"""Mixture of experts: a router chooses some experts for each token, and their outputs are summed up, weighted.

In: hidden states, and which of them are tokens. Out: what the MLP of a dense model would give, and the sums that the
routers' losses are made of. How tokens get to their experts is the business of `dispatch.py`.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsft.mesh import constrain
from jaxsft.model.adapter import Adapter, Frozen
from jaxsft.model.dispatch import ExpertWeights, Gating, choose, choose_by, experts_of_tokens, fill_up
from jaxsft.model.layers import MLP, Linear, Sizes
from jaxsft.model.quantized import QuantizedExperts, QuantizedWeight


@dataclasses.dataclass(frozen=True)
class Routing:
    """Who is chosen, and how the chosen ones are weighted."""

    num_experts: int
    top_k: int
    """Experts per token."""
    normalise: bool
    """Chosen probabilities are divided by their sum. A softmax over the chosen logits alone is the same."""
    router_bias: bool
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of the router's logits: of all experts together, or of each by itself."""
    correction_bias: bool = False
    """Experts are chosen by their scores plus a number of each that is in the files and is never trained."""
    least_sum: float = 0.0
    """Chosen scores are divided by no less than that."""
    shared_size: int = 0
    """Width of the expert that every token goes to; 0: there is none."""
    shared_gate: bool = False
    """What that one adds is multiplied by a sigmoid of a product with the token."""


class SharedExpert(MLP):
    """The MLP of all tokens beside the chosen experts, perhaps with a gate of its own."""

    def __init__(
        self, sizes: Sizes, *, gate: bool, gating: Gating, bias: bool, std: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        super().__init__(sizes, activation=gating, gated=True, bias=bias, std=std, dtype=dtype, rngs=rngs)
        # A linear map with one output, and to optimizers a matrix, as it is in files.
        shape = (sizes["l"], sizes["d"], 1)
        self.gate = nnx.Param(std * jax.random.normal(rngs.params(), shape, dtype), axes="l d z") if gate else None

    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        out = super().__call__(x, keys)
        if self.gate is None:
            return out
        products = jnp.einsum("btd,dz->btz", x.astype(jnp.float32), self.gate[...].astype(jnp.float32))
        return (out.astype(jnp.float32) * jax.nn.sigmoid(products)).astype(out.dtype)


class RouterSums(NamedTuple):
    """What the auxiliary losses of a layer are made of: float32 sums over its real tokens."""

    probabilities: jax.Array
    """[E]: of softmax(router logits); with sigmoids, of each one's share of the sum of all."""
    counts: jax.Array
    """[E]: of choices; whole numbers, so exact to 2^24."""
    z: jax.Array
    """[]: of logsumexp(router logits)^2."""


def router_losses(sums: RouterSums, num_tokens: Any) -> tuple[Any, Any]:
    """(load balance, z), each a mean over layers; of `jax.Array`s or numpy's.

    Balance is E * sum_e (share of tokens that chose e) * (mean probability of e), after Fedus et al. 2021 (Switch
    Transformer), equation 4; choices spread evenly over the experts give top_k. z is the mean over tokens of
    logsumexp(router logits)^2 (Zoph et al. 2022, ST-MoE, equation 5).

    Args:
        sums: leaves with a leading L.
        num_tokens: that they are over, padding not counted.
    """
    num_experts = sums.counts.shape[-1]
    balance = (sums.counts / num_tokens * (sums.probabilities / num_tokens)).sum(axis=-1).mean() * num_experts
    return balance, (sums.z / num_tokens).mean()


class PerExpert(nnx.Module):
    """One linear map for each expert, `"d -> f"`: weight `"l e d f"`, bias `"l e f"`. `MixtureMLP` applies them."""

    def __init__(self, dims: str, sizes: Sizes, *, bias: bool, std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        inputs, output = (side.strip() for side in dims.split("->"))
        axes = f"l e {inputs} {output}"
        shape = tuple(sizes[letter] for letter in axes.split())
        self.weight: Any = nnx.Param(std * jax.random.normal(rngs.params(), shape, dtype), axes=axes)
        axes = f"l e {output}"
        shape = tuple(sizes[letter] for letter in axes.split())
        self.bias = nnx.Param(jnp.zeros(shape, dtype), axes=axes) if bias else None
        self.adapter: Adapter | None = None

    @property
    def stored(self) -> Any:
        """The weight of one layer as it lies: a jax.Array, or `QuantizedExperts`."""
        if isinstance(self.weight, QuantizedWeight):
            return QuantizedExperts(self.weight.arrays, self.weight.layout)
        return self.weight[...]

    @property
    def scaled_adapter(self) -> tuple[jax.Array, jax.Array] | tuple[None, None]:
        """A [E, inputs, R] and B [E, R, outputs], B times the scale."""
        if self.adapter is None:
            return None, None
        return self.adapter.a[...], self.adapter.b[...] * self.adapter.scale[...]


class Experts(nnx.Module):
    """The maps of all experts, by the names that a single MLP gives them."""

    def __init__(self, sizes: Sizes, *, bias: bool, std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate_proj = PerExpert("d -> f", sizes, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.up_proj = PerExpert("d -> f", sizes, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.down_proj = PerExpert("f -> d", sizes, bias=bias, std=std, dtype=dtype, rngs=rngs)


class MixtureMLP(nnx.Module):
    """`sum_e score_e * down_e(gating(gate_e(x), up_e(x)))` over the chosen experts of each token."""

    def __init__(
        self,
        sizes: Sizes,
        *,
        routing: Routing,
        gating: Gating,
        bias: bool,
        std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """`sizes` has `e`, the number of experts, and `f`, the width of one; `bias` is that of the experts."""
        self.routing = routing
        self.gating = gating
        self.router = Linear("d -> e", sizes, bias=routing.router_bias, std=std, dtype=dtype, rngs=rngs)
        self.experts = Experts(sizes, bias=bias, std=std, dtype=dtype, rngs=rngs)
        # In float32 whatever the others are: it decides who is chosen.
        correction = jnp.zeros([sizes[letter] for letter in "le"], jnp.float32)
        self.correction_bias = Frozen(correction, axes="l e") if routing.correction_bias else None
        shared: dict[str, Any] = dict(bias=bias, std=std, dtype=dtype, rngs=rngs)
        wide = {**sizes, "f": routing.shared_size}
        self.shared_expert = (
            SharedExpert(wide, gate=routing.shared_gate, gating=gating, **shared) if routing.shared_size else None
        )

    def __call__(
        self, x: jax.Array, is_token: jax.Array, keys: jax.Array | None = None
    ) -> tuple[jax.Array, RouterSums]:
        """One layer: [B, T, D] -> [B, T, D], and what its router did.

        Args:
            x: [B, T, D]; its dtype is the dtype of the matmuls, the router and all sums are float32.
            is_token: bool [B, T]; padding goes to no expert but the shared one.
            keys: uint32 [B, T, 2], what adapters of the shared expert drop inputs by.
        """
        shared = None if self.shared_expert is None else self.shared_expert(x, keys)
        num_rows, length = is_token.shape
        x, is_token = fill_up(x, is_token)
        logits = constrain(self.router(x.astype(jnp.float32)), "b t e")
        probabilities, scores, chosen = self._choose(logits)

        num_experts = self.routing.num_experts
        is_chosen = (chosen[..., None] == jnp.arange(num_experts)) & is_token[..., None, None]
        sums = RouterSums(
            probabilities=jnp.where(is_token[..., None], probabilities, 0.0).sum(axis=(0, 1)),
            counts=is_chosen.sum(axis=(0, 1, 2), dtype=jnp.float32),
            z=jnp.where(is_token, jnp.square(jax.nn.logsumexp(logits, axis=-1)), 0.0).sum(),
        )
        chosen = jnp.where(is_token[..., None], chosen, num_experts)
        maps = (self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj)
        weights = ExpertWeights(
            *(each.stored for each in maps),
            *(None if each.bias is None else each.bias[...] for each in maps),
            *(part for each in maps for part in each.scaled_adapter),
        )
        own = (*(each.weight for each in maps), *(each.bias for each in maps))
        is_trained = tuple(isinstance(each, nnx.Param) for each in own)
        y = experts_of_tokens(x, chosen, scores, weights, gating=self.gating, is_trained=is_trained)
        y = y[:num_rows, :length]
        return (y if shared is None else y + shared), sums

    def _choose(self, logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Probabilities [B, T, E] of router logits, and the weights and the numbers [B, T, top_k] of those chosen."""
        routing = self.routing
        if routing.scoring == "softmax":
            scores = probabilities = jax.nn.softmax(logits)
        else:
            scores = jax.nn.sigmoid(logits)
            probabilities = scores / jnp.maximum(scores.sum(axis=-1, keepdims=True), 1e-20)
        if self.correction_bias is None:
            weights, chosen = choose(scores, routing.top_k)
        else:
            weights, chosen = choose_by(scores + self.correction_bias[...], scores, routing.top_k)
        if routing.normalise:
            total = weights.sum(axis=-1, keepdims=True)
            weights = weights / (jnp.maximum(total, routing.least_sum) if routing.least_sum else total)
        return probabilities, weights, chosen
