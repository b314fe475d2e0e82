"""Qwen1.5-MoE, Qwen2-57B-A14B: Qwen2 with experts in place of the MLP, one of them for all tokens, with a gate."""

import dataclasses

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama, qwen3_moe
from jaxsft.model.families.mixtral import routing
from jaxsft.model.fields import Fields
from jaxsft.model.layers import gated

WEIGHTS = qwen3_moe.WEIGHTS | {
    "layers.mlp.shared_expert.gate_proj.weight": ("model.layers.{l}.mlp.shared_expert.gate_proj.weight", "f d"),
    "layers.mlp.shared_expert.up_proj.weight": ("model.layers.{l}.mlp.shared_expert.up_proj.weight", "f d"),
    "layers.mlp.shared_expert.down_proj.weight": ("model.layers.{l}.mlp.shared_expert.down_proj.weight", "d f"),
    "layers.mlp.shared_expert.gate": ("model.layers.{l}.mlp.shared_expert_gate.weight", "z d"),
}
IN_MEMORY = qwen3_moe.IN_MEMORY
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type qwen2_moe."""
    # Layers with a plain MLP, of intermediate_size.
    hf.only("mlp_only_layers")
    hf.only("decoder_sparse_step", 1)
    # Already in sliding_window and layer_types.
    hf("use_sliding_window"), hf("max_window_layers")
    return DecoderConfig(
        **hf.sizes() | dict(intermediate_size=hf("moe_intermediate_size")),
        layers=hf.layers(),
        ropes=(hf.rope(),),
        norm=hf.rms_norm(),
        norms=("pre_attention", "pre_mlp"),
        activation=gated(hf.activation()),
        qkv_bias=bool(hf("qkv_bias")),
        routing=dataclasses.replace(
            routing(hf, normalise=bool(hf("norm_topk_prob"))),
            shared_size=hf.number("shared_expert_intermediate_size"),
            shared_gate=True,
        ),
    )
