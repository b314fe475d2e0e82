"""GPT-NeoX-20B, Pythia, RedPajama-INCITE, Polyglot: parallel residual, biases, rope on a part of each head."""

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.fields import Fields
from jaxsft.model.layers import ACTIVATIONS, NormKind

WEIGHTS = {
    "embed_tokens.weight": ("gpt_neox.embed_in.weight", "v d"),
    "layers.pre_attention_norm.weight": ("gpt_neox.layers.{l}.input_layernorm.weight", "d"),
    "layers.pre_attention_norm.bias": ("gpt_neox.layers.{l}.input_layernorm.bias", "d"),
    "layers.self_attn.q_proj.weight": ("gpt_neox.layers.{l}.attention.query_key_value.weight", "(n 1*+1+1 h) d"),
    "layers.self_attn.q_proj.bias": ("gpt_neox.layers.{l}.attention.query_key_value.bias", "(n 1*+1+1 h)"),
    "layers.self_attn.k_proj.weight": ("gpt_neox.layers.{l}.attention.query_key_value.weight", "(k 1+1*+1 h) d"),
    "layers.self_attn.k_proj.bias": ("gpt_neox.layers.{l}.attention.query_key_value.bias", "(k 1+1*+1 h)"),
    "layers.self_attn.v_proj.weight": ("gpt_neox.layers.{l}.attention.query_key_value.weight", "(k 1+1+1* h) d"),
    "layers.self_attn.v_proj.bias": ("gpt_neox.layers.{l}.attention.query_key_value.bias", "(k 1+1+1* h)"),
    "layers.self_attn.o_proj.weight": ("gpt_neox.layers.{l}.attention.dense.weight", "d (n h)"),
    "layers.self_attn.o_proj.bias": ("gpt_neox.layers.{l}.attention.dense.bias", "d"),
    "layers.pre_mlp_norm.weight": ("gpt_neox.layers.{l}.post_attention_layernorm.weight", "d"),
    "layers.pre_mlp_norm.bias": ("gpt_neox.layers.{l}.post_attention_layernorm.bias", "d"),
    "layers.mlp.up_proj.weight": ("gpt_neox.layers.{l}.mlp.dense_h_to_4h.weight", "f d"),
    "layers.mlp.up_proj.bias": ("gpt_neox.layers.{l}.mlp.dense_h_to_4h.bias", "f"),
    "layers.mlp.down_proj.weight": ("gpt_neox.layers.{l}.mlp.dense_4h_to_h.weight", "d f"),
    "layers.mlp.down_proj.bias": ("gpt_neox.layers.{l}.mlp.dense_4h_to_h.bias", "d"),
    "norm.weight": ("gpt_neox.final_layer_norm.weight", "d"),
    "norm.bias": ("gpt_neox.final_layer_norm.bias", "d"),
    "lm_head.weight": ("embed_out.weight", "v d"),
}
IN_MEMORY = {"lm_head.weight": ("lm_head.weight", "v d")}
"""Weights that transformers 5 names otherwise in memory than in files, which is what PEFT means."""

IGNORED = ("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq")
"""Masks and frequencies that old exports carry."""


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type gpt_neox."""
    hf.only("num_key_value_heads", hf("num_attention_heads"))
    attention_bias = bool(hf("attention_bias"))
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(),
        ropes=(hf.rope(partial=True),),
        norm=NormKind(hf("layer_norm_eps"), kind="layer", bias=True),
        norms=("pre_attention", "pre_mlp"),
        parallel=bool(hf("use_parallel_residual")),
        activation=ACTIVATIONS[hf.activation()],
        gated=False,
        qkv_bias=attention_bias,
        attention_bias=attention_bias,
        mlp_bias=True,
    )
