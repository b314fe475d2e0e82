"""Gemma 2 (2B, 9B, 27B): norms before and after attention and MLP, a window in every other layer, soft caps."""

import math

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields
from jaxsft.model.layers import gated

WEIGHTS = llama.WEIGHTS | {
    "layers.post_attention_norm.weight": ("model.layers.{l}.post_attention_layernorm.weight", "d"),
    "layers.pre_mlp_norm.weight": ("model.layers.{l}.pre_feedforward_layernorm.weight", "d"),
    "layers.post_mlp_norm.weight": ("model.layers.{l}.post_feedforward_layernorm.weight", "d"),
}
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type gemma2."""
    hf.only("use_bidirectional_attention")
    # Second spellings of some files on the hub.
    hf.only("hidden_act", hf("hidden_activation"))
    hf.only("sliding_window_size", hf("sliding_window"))
    attention_bias = bool(hf("attention_bias"))
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(),
        ropes=(hf.rope(),),
        norm=hf.rms_norm(offset=1.0),
        norms=("pre_attention", "post_attention", "pre_mlp", "post_mlp"),
        activation=gated(hf.activation("hidden_activation")),
        qkv_bias=attention_bias,
        attention_bias=attention_bias,
        attention_scale=hf("query_pre_attn_scalar") ** -0.5,
        attention_soft_cap=hf("attn_logit_softcapping"),
        embedding_scale=math.sqrt(hf("hidden_size")),
        logit_soft_cap=hf("final_logit_softcapping"),
    )
