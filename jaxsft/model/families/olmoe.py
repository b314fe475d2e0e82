"""OLMoE 1B-7B: experts in place of the MLP, queries and keys normed over all heads at once."""

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import qwen3_moe
from jaxsft.model.families.mixtral import routing
from jaxsft.model.fields import Fields
from jaxsft.model.layers import gated

WEIGHTS = qwen3_moe.WEIGHTS | {
    "layers.self_attn.q_norm.weight": ("model.layers.{l}.self_attn.q_norm.weight", "(n h)"),
    "layers.self_attn.k_norm.weight": ("model.layers.{l}.self_attn.k_norm.weight", "(k h)"),
}
IN_MEMORY = qwen3_moe.IN_MEMORY
IGNORED = qwen3_moe.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type olmoe."""
    hf.only("clip_qkv")
    attention_bias = bool(hf("attention_bias"))
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(),
        ropes=(hf.rope(),),
        norm=hf.rms_norm(),
        norms=("pre_attention", "pre_mlp"),
        activation=gated(hf.activation()),
        qkv_bias=attention_bias,
        attention_bias=attention_bias,
        qk_norm="all heads",
        routing=routing(hf, normalise=bool(hf("norm_topk_prob"))),
    )
