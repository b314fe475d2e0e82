"""StableLM 2 and 3B: Llama with layer norms and rope on a part of each head; some are parallel, or norm each head."""

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields
from jaxsft.model.layers import NormKind, gated

WEIGHTS = llama.WEIGHTS | {
    "layers.pre_attention_norm.bias": ("model.layers.{l}.input_layernorm.bias", "d"),
    "layers.self_attn.q_norm.weight": ("model.layers.{l}.self_attn.q_layernorm.norms.{n}.weight", "h"),
    "layers.self_attn.k_norm.weight": ("model.layers.{l}.self_attn.k_layernorm.norms.{k}.weight", "h"),
    "layers.pre_mlp_norm.bias": ("model.layers.{l}.post_attention_layernorm.bias", "d"),
    "norm.bias": ("model.norm.bias", "d"),
}
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type stablelm."""
    hf.only("rotary_scaling_factor", 1)
    hf("use_norm_bias")  # StableLM 2 12B's own; its norms have biases, whatever it says
    eps, parallel = hf("layer_norm_eps"), bool(hf("use_parallel_residual"))
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(),
        ropes=(hf.rope(partial=True),),
        norm=NormKind(eps, kind="layer", bias=True),
        norms=("pre_attention",) if parallel else ("pre_attention", "pre_mlp"),
        parallel=parallel,
        activation=gated(hf.activation()),
        qkv_bias=bool(hf("use_qkv_bias")),
        qk_norm="each head" if hf("qk_layernorm") else "none",
        qk_norm_kind=NormKind(eps, kind="layer"),
    )
