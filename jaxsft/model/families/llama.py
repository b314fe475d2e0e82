"""Llama 2, 3, 3.x and all that shares its shape: SmolLM2, TinyLlama, Falcon 3, Yi, DeepSeek's distilled Llamas, ...;
and Mistral 7B, Nemo, Small and Ministral 8B, with an attention window in all, some or no layers."""

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.fields import Fields
from jaxsft.model.layers import gated

WEIGHTS = {
    "embed_tokens.weight": ("model.embed_tokens.weight", "v d"),
    "layers.pre_attention_norm.weight": ("model.layers.{l}.input_layernorm.weight", "d"),
    "layers.self_attn.q_proj.weight": ("model.layers.{l}.self_attn.q_proj.weight", "(n h) d"),
    "layers.self_attn.q_proj.bias": ("model.layers.{l}.self_attn.q_proj.bias", "(n h)"),
    "layers.self_attn.k_proj.weight": ("model.layers.{l}.self_attn.k_proj.weight", "(k h) d"),
    "layers.self_attn.k_proj.bias": ("model.layers.{l}.self_attn.k_proj.bias", "(k h)"),
    "layers.self_attn.v_proj.weight": ("model.layers.{l}.self_attn.v_proj.weight", "(k h) d"),
    "layers.self_attn.v_proj.bias": ("model.layers.{l}.self_attn.v_proj.bias", "(k h)"),
    "layers.self_attn.o_proj.weight": ("model.layers.{l}.self_attn.o_proj.weight", "d (n h)"),
    "layers.self_attn.o_proj.bias": ("model.layers.{l}.self_attn.o_proj.bias", "d"),
    "layers.pre_mlp_norm.weight": ("model.layers.{l}.post_attention_layernorm.weight", "d"),
    "layers.mlp.gate_proj.weight": ("model.layers.{l}.mlp.gate_proj.weight", "f d"),
    "layers.mlp.gate_proj.bias": ("model.layers.{l}.mlp.gate_proj.bias", "f"),
    "layers.mlp.up_proj.weight": ("model.layers.{l}.mlp.up_proj.weight", "f d"),
    "layers.mlp.up_proj.bias": ("model.layers.{l}.mlp.up_proj.bias", "f"),
    "layers.mlp.down_proj.weight": ("model.layers.{l}.mlp.down_proj.weight", "d f"),
    "layers.mlp.down_proj.bias": ("model.layers.{l}.mlp.down_proj.bias", "d"),
    "norm.weight": ("model.norm.weight", "d"),
    "lm_head.weight": ("lm_head.weight", "v d"),
}
"""Path of a weight in our state -> its tensor name ({l}: the layer) and layout in safetensors. A weight that a config
does not ask for (a bias, a tied lm_head) is in neither."""

IGNORED = ("*.rotary_emb.inv_freq",)
"""Tensors of old exports that transformers passes over too."""


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type llama, mistral or ministral."""
    hf.only("activation", "swiglu", "silu")  # Falcon 3 says it twice
    attention_bias = bool(hf.own("attention_bias"))
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(),
        ropes=(hf.rope(),),
        norm=hf.rms_norm(),
        norms=("pre_attention", "pre_mlp"),
        activation=gated(hf.activation()),
        qkv_bias=attention_bias,
        attention_bias=attention_bias,
        mlp_bias=bool(hf.own("mlp_bias")),
    )
