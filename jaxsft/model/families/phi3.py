"""Phi-3, Phi-3.5, Phi-4, Phi-4-mini: Llama with fused projections, longrope, and rope on a part of each head."""

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields
from jaxsft.model.layers import gated

WEIGHTS = llama.WEIGHTS | {
    "layers.self_attn.q_proj.weight": ("model.layers.{l}.self_attn.qkv_proj.weight", "(n*+k+k h) d"),
    "layers.self_attn.k_proj.weight": ("model.layers.{l}.self_attn.qkv_proj.weight", "(n+k*+k h) d"),
    "layers.self_attn.v_proj.weight": ("model.layers.{l}.self_attn.qkv_proj.weight", "(n+k+k* h) d"),
    "layers.mlp.gate_proj.weight": ("model.layers.{l}.mlp.gate_up_proj.weight", "(f*+f) d"),
    "layers.mlp.up_proj.weight": ("model.layers.{l}.mlp.gate_up_proj.weight", "(f+f*) d"),
}
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type phi3."""
    # These stand in `rope_parameters` too, which is what is computed with.
    hf("original_max_position_embeddings"), hf("partial_rotary_factor")
    # Fields that Phi-4-mini's own code reads; 1 switches them off.
    hf.only("full_attn_mod", 1)
    hf.only("interpolate_factor", 1)
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(),
        ropes=(hf.rope(partial=True),),
        norm=hf.rms_norm(),
        norms=("pre_attention", "pre_mlp"),
        activation=gated(hf.activation()),
    )
