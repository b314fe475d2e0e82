"""Gemma 3 text models (270M, 1B): Gemma 2 with norms of queries and keys in place of a soft cap on their scores, five
layers with a window to one without, and a rope for each of the two kinds."""

import math

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import gemma2, qwen3
from jaxsft.model.fields import Fields
from jaxsft.model.layers import gated

WEIGHTS = qwen3.WEIGHTS | gemma2.WEIGHTS
IGNORED = gemma2.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type gemma3_text."""
    hf.only("use_bidirectional_attention")
    hf.only("attn_logit_softcapping")  # the config class has it, but transformers does not compute it
    hf("sliding_window_pattern")  # already in layer_types
    attention_bias = bool(hf("attention_bias"))
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(ropes={"full_attention": 0, "sliding_attention": 1}),
        ropes=(hf.rope("full_attention"), hf.rope("sliding_attention")),
        norm=hf.rms_norm(offset=1.0),
        norms=("pre_attention", "post_attention", "pre_mlp", "post_mlp"),
        activation=gated(hf.activation("hidden_activation")),
        qkv_bias=attention_bias,
        attention_bias=attention_bias,
        qk_norm="head",
        attention_scale=hf("query_pre_attn_scalar") ** -0.5,
        embedding_scale=math.sqrt(hf("hidden_size")),
        logit_soft_cap=hf("final_logit_softcapping"),
    )
