"""GLM-4-9B in its first release (glm-4-9b-chat-hf): Llama with a fused MLP; rope in pairs of neighbours, on a part."""

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields
from jaxsft.model.layers import gated

WEIGHTS = llama.WEIGHTS | {
    "layers.mlp.gate_proj.weight": ("model.layers.{l}.mlp.gate_up_proj.weight", "(f*+f) d"),
    "layers.mlp.up_proj.weight": ("model.layers.{l}.mlp.gate_up_proj.weight", "(f+f*) d"),
}
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type glm."""
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(),
        ropes=(hf.rope(interleaved=True, partial=True),),
        norm=hf.rms_norm(),
        norms=("pre_attention", "pre_mlp"),
        activation=gated(hf.activation()),
        qkv_bias=bool(hf("attention_bias")),
    )
