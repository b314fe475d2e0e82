"""Mixtral 8x7B, 8x22B: Mistral with experts in place of the MLP."""

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.experts import Routing
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields
from jaxsft.model.layers import gated

WEIGHTS = llama.WEIGHTS | {
    "layers.mlp.router.weight": ("model.layers.{l}.block_sparse_moe.gate.weight", "e d"),
    "layers.mlp.experts.gate_proj.weight": ("model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight", "f d"),
    "layers.mlp.experts.up_proj.weight": ("model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight", "f d"),
    "layers.mlp.experts.down_proj.weight": ("model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight", "d f"),
}
IN_MEMORY = {
    "layers.mlp.router.weight": ("model.layers.{l}.mlp.gate.weight", "e d"),
    "layers.mlp.experts.gate_proj.weight": ("model.layers.{l}.mlp.experts.gate_up_proj", "e (f*+f) d"),
    "layers.mlp.experts.up_proj.weight": ("model.layers.{l}.mlp.experts.gate_up_proj", "e (f+f*) d"),
    "layers.mlp.experts.down_proj.weight": ("model.layers.{l}.mlp.experts.down_proj", "e d f"),
}
"""Weights that transformers 5 names or holds otherwise in memory than in files, which is what PEFT means."""
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type mixtral."""
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(),
        ropes=(hf.rope(),),
        norm=hf.rms_norm(),
        norms=("pre_attention", "pre_mlp"),
        activation=gated(hf.activation()),
        routing=routing(hf, normalise=True),
    )


def routing(hf: Fields, *, normalise: bool, router_bias: bool = False) -> Routing:
    """How tokens find their experts; the config's number of experts has one of two names."""
    num_experts, top_k = hf("num_local_experts") or hf("num_experts") or 0, hf("num_experts_per_tok")
    if not 1 <= top_k <= num_experts:
        hf.problem(f"num_experts_per_tok: {top_k}; expected 1 to {num_experts}, the number of experts")
    return Routing(num_experts, top_k, normalise=normalise, router_bias=router_bias)
