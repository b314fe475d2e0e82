"""OLMo 2 (1B, 7B, 13B, 32B): Llama with norms after attention and MLP in place of before, and of queries and keys over
all heads."""

import dataclasses

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields

NO_WEIGHTS = ("layers.pre_attention_norm.weight", "layers.pre_mlp_norm.weight")
WEIGHTS = {path: tensor for path, tensor in llama.WEIGHTS.items() if path not in NO_WEIGHTS} | {
    "layers.self_attn.q_norm.weight": ("model.layers.{l}.self_attn.q_norm.weight", "(n h)"),
    "layers.self_attn.k_norm.weight": ("model.layers.{l}.self_attn.k_norm.weight", "(k h)"),
    "layers.post_attention_norm.weight": ("model.layers.{l}.post_attention_layernorm.weight", "d"),
    "layers.post_mlp_norm.weight": ("model.layers.{l}.post_feedforward_layernorm.weight", "d"),
}
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type olmo2."""
    return dataclasses.replace(llama.decoder_config(hf), norms=("post_attention", "post_mlp"), qk_norm="all heads")
