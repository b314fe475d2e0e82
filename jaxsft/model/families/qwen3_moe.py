"""Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder: Qwen3 with experts in place of the MLP, in every layer."""

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama, mixtral
from jaxsft.model.families.mixtral import routing
from jaxsft.model.fields import Fields
from jaxsft.model.layers import gated

WEIGHTS = llama.WEIGHTS | {
    "layers.self_attn.q_norm.weight": ("model.layers.{l}.self_attn.q_norm.weight", "h"),
    "layers.self_attn.k_norm.weight": ("model.layers.{l}.self_attn.k_norm.weight", "h"),
    "layers.mlp.router.weight": ("model.layers.{l}.mlp.gate.weight", "e d"),
    "layers.mlp.experts.gate_proj.weight": ("model.layers.{l}.mlp.experts.{e}.gate_proj.weight", "f d"),
    "layers.mlp.experts.up_proj.weight": ("model.layers.{l}.mlp.experts.{e}.up_proj.weight", "f d"),
    "layers.mlp.experts.down_proj.weight": ("model.layers.{l}.mlp.experts.{e}.down_proj.weight", "d f"),
}
IN_MEMORY = mixtral.IN_MEMORY
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type qwen3_moe."""
    # Layers with a plain MLP, of intermediate_size.
    hf.only("mlp_only_layers")
    hf.only("decoder_sparse_step", 1)
    # Null unless use_sliding_window, and then of all layers, whatever max_window_layers says.
    if not hf("use_sliding_window"):
        hf("max_window_layers")
    attention_bias = bool(hf("attention_bias"))
    hf.only("use_qk_norm", True)
    return DecoderConfig(
        **hf.sizes() | dict(intermediate_size=hf("moe_intermediate_size")),
        layers=hf.layers(),
        ropes=(hf.rope(),),
        norm=hf.rms_norm(),
        norms=("pre_attention", "pre_mlp"),
        activation=gated(hf.activation()),
        qkv_bias=attention_bias,
        attention_bias=attention_bias,
        qk_norm="head",
        routing=routing(hf, normalise=bool(hf("norm_topk_prob"))),
    )
