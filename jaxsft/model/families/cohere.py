"""Command-R, Command-R+, Aya: layer norms without bias, attention and MLP in parallel behind one, scaled logits."""

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields
from jaxsft.model.layers import NormKind, gated

WEIGHTS = llama.WEIGHTS | {
    "layers.self_attn.q_norm.weight": ("model.layers.{l}.self_attn.q_norm.weight", "n h"),
    "layers.self_attn.k_norm.weight": ("model.layers.{l}.self_attn.k_norm.weight", "k h"),
}
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type cohere."""
    hf("model_max_length")  # the tokenizer's
    attention_bias = bool(hf("attention_bias"))
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(),
        ropes=(hf.rope(interleaved=True),),
        norm=NormKind(hf("layer_norm_eps"), kind="layer"),
        norms=("pre_attention",),
        parallel=True,
        activation=gated(hf.activation()),
        qkv_bias=attention_bias,
        attention_bias=attention_bias,
        qk_norm="each head" if hf("use_qk_norm") else "none",
        logit_scale=hf("logit_scale"),
    )
