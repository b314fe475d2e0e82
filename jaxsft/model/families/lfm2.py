"""LFM2 and LFM2.5: short convolutions between gates in most layers, attention with query/key norms in the others."""

import dataclasses

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.fields import Fields
from jaxsft.model.layers import NormKind, gated

WEIGHTS = {
    "embed_tokens.weight": ("model.embed_tokens.weight", "v d"),
    "layers.pre_attention_norm.weight": ("model.layers.{l}.operator_norm.weight", "d"),
    "layers.self_attn.q_proj.weight": ("model.layers.{l}.self_attn.q_proj.weight", "(n h) d"),
    "layers.self_attn.k_proj.weight": ("model.layers.{l}.self_attn.k_proj.weight", "(k h) d"),
    "layers.self_attn.v_proj.weight": ("model.layers.{l}.self_attn.v_proj.weight", "(k h) d"),
    "layers.self_attn.o_proj.weight": ("model.layers.{l}.self_attn.out_proj.weight", "d (n h)"),
    "layers.self_attn.q_norm.weight": ("model.layers.{l}.self_attn.q_layernorm.weight", "h"),
    "layers.self_attn.k_norm.weight": ("model.layers.{l}.self_attn.k_layernorm.weight", "h"),
    "layers.conv.b_proj.weight": ("model.layers.{l}.conv.in_proj.weight", "(m*+m+m) d"),
    "layers.conv.b_proj.bias": ("model.layers.{l}.conv.in_proj.bias", "(m*+m+m)"),
    "layers.conv.c_proj.weight": ("model.layers.{l}.conv.in_proj.weight", "(m+m*+m) d"),
    "layers.conv.c_proj.bias": ("model.layers.{l}.conv.in_proj.bias", "(m+m*+m)"),
    "layers.conv.x_proj.weight": ("model.layers.{l}.conv.in_proj.weight", "(m+m+m*) d"),
    "layers.conv.x_proj.bias": ("model.layers.{l}.conv.in_proj.bias", "(m+m+m*)"),
    "layers.conv.weight": ("model.layers.{l}.conv.conv.weight", "m 1 w"),
    "layers.conv.bias": ("model.layers.{l}.conv.conv.bias", "m"),
    "layers.conv.out_proj.weight": ("model.layers.{l}.conv.out_proj.weight", "d m"),
    "layers.conv.out_proj.bias": ("model.layers.{l}.conv.out_proj.bias", "d"),
    "layers.pre_mlp_norm.weight": ("model.layers.{l}.ffn_norm.weight", "d"),
    "layers.mlp.gate_proj.weight": ("model.layers.{l}.feed_forward.w1.weight", "f d"),
    "layers.mlp.up_proj.weight": ("model.layers.{l}.feed_forward.w3.weight", "f d"),
    "layers.mlp.down_proj.weight": ("model.layers.{l}.feed_forward.w2.weight", "d f"),
    "norm.weight": ("model.embedding_norm.weight", "d"),
    "lm_head.weight": ("lm_head.weight", "v d"),
}
IGNORED = ()


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type lfm2."""
    hf("full_attn_idxs")  # layer_types says it
    # What Liquid's own code calls so: said twice, or about random weights.
    for key, same in {
        "block_dim": "hidden_size",
        "conv_dim": "hidden_size",
        "conv_dim_out": "hidden_size",
        "num_heads": "num_attention_heads",
        "block_norm_eps": "norm_eps",
    }.items():
        hf.only(key, hf(same))
    hf.only("block_use_swiglu", True)
    hf.only("use_pos_enc", True)
    for key in ("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init"):
        hf(key)
    layers = hf.layers(mixers={"conv": "conv"})
    if not any(kind.mixer == "self_attn" for kind in layers):
        hf.problem("layer_types: all are conv; at least one full_attention is needed")
    config = DecoderConfig(
        **hf.sizes(),
        layers=layers,
        ropes=(hf.rope(),),
        norm=NormKind(hf.number("norm_eps")),
        norms=("pre_attention", "pre_mlp"),
        activation=gated("silu"),
        qk_norm="head",
        conv_width=hf.number("conv_L_cache"),
        conv_bias=bool(hf("conv_bias")),
    )
    return dataclasses.replace(config, intermediate_size=_mlp_width(hf, config.intermediate_size))


def _mlp_width(hf: Fields, width: int) -> int:
    """As given; adjusted, two thirds of it times a factor, rounded up to a multiple."""
    is_adjusted, factor, multiple = (
        hf(f"block_{name}") for name in ("auto_adjust_ff_dim", "ffn_dim_multiplier", "multiple_of")
    )
    if not is_adjusted:
        return width
    width = int(2 * width / 3)
    return width if factor is None else -(-int(factor * width) // multiple) * multiple
