"""gpt-oss-20b, -120b: experts with biases and a clamped swiglu, attention sinks, windows in every other layer."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.families.mixtral import routing
from jaxsft.model.fields import Fields

WEIGHTS = llama.WEIGHTS | {
    "layers.self_attn.sinks": ("model.layers.{l}.self_attn.sinks", "n"),
    "layers.mlp.router.weight": ("model.layers.{l}.mlp.router.weight", "e d"),
    "layers.mlp.router.bias": ("model.layers.{l}.mlp.router.bias", "e"),
    "layers.mlp.experts.gate_proj.weight": ("model.layers.{l}.mlp.experts.gate_up_proj", "e d (f 1*+1)"),
    "layers.mlp.experts.gate_proj.bias": ("model.layers.{l}.mlp.experts.gate_up_proj_bias", "e (f 1*+1)"),
    "layers.mlp.experts.up_proj.weight": ("model.layers.{l}.mlp.experts.gate_up_proj", "e d (f 1+1*)"),
    "layers.mlp.experts.up_proj.bias": ("model.layers.{l}.mlp.experts.gate_up_proj_bias", "e (f 1+1*)"),
    "layers.mlp.experts.down_proj.weight": ("model.layers.{l}.mlp.experts.down_proj", "e f d"),
    "layers.mlp.experts.down_proj.bias": ("model.layers.{l}.mlp.experts.down_proj_bias", "e d"),
}
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type gpt_oss."""
    hf.only("hidden_act", "silu")
    hf.only("experts_per_token", hf("num_experts_per_tok"))
    hf("initial_context_length")  # the rope's original_max_position_embeddings
    attention_bias = bool(hf("attention_bias"))
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(),
        ropes=(hf.rope(partial=True),),
        norm=hf.rms_norm(),
        norms=("pre_attention", "pre_mlp"),
        activation=clamped_swiglu(hf("swiglu_alpha"), hf("swiglu_limit")),
        qkv_bias=attention_bias,
        attention_bias=attention_bias,
        mlp_bias=True,
        sinks=True,
        routing=routing(hf, normalise=True, router_bias=True),
    )


@functools.cache
def clamped_swiglu(alpha: float, limit: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`gate * sigmoid(alpha * gate) * (up + 1)`, gate and up clamped before; the same function each time."""

    def product(gate: jax.Array, up: jax.Array) -> jax.Array:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)

    return product
