"""EXAONE 4.0: norms only of what attention and MLP add, query/key norms, no rope where a layer has no window."""

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields
from jaxsft.model.layers import gated

WEIGHTS = llama.WEIGHTS | {
    "layers.self_attn.q_norm.weight": ("model.layers.{l}.self_attn.q_norm.weight", "h"),
    "layers.self_attn.k_norm.weight": ("model.layers.{l}.self_attn.k_norm.weight", "h"),
    "layers.post_attention_norm.weight": ("model.layers.{l}.post_attention_layernorm.weight", "d"),
    "layers.post_mlp_norm.weight": ("model.layers.{l}.post_feedforward_layernorm.weight", "d"),
}
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type exaone4."""
    hf("sliding_window_pattern")  # layer_types says it
    return DecoderConfig(
        **hf.sizes(),
        # The small model has no window, and rope in all layers.
        layers=hf.layers(ropes={"sliding_attention": 0, "full_attention": None if hf("sliding_window") else 0}),
        ropes=(hf.rope(),),
        norm=hf.rms_norm(),
        norms=("post_attention", "post_mlp"),
        activation=gated(hf.activation()),
        qk_norm="head",
    )
