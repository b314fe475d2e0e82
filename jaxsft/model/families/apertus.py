"""Apertus 8B and 70B: Llama with norms of queries and keys, no gate in the MLP, and an activation that is trained."""

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields
from jaxsft.model.layers import xielu

WEIGHTS = llama.WEIGHTS | {
    "layers.pre_attention_norm.weight": ("model.layers.{l}.attention_layernorm.weight", "d"),
    "layers.self_attn.q_norm.weight": ("model.layers.{l}.self_attn.q_norm.weight", "h"),
    "layers.self_attn.k_norm.weight": ("model.layers.{l}.self_attn.k_norm.weight", "h"),
    "layers.pre_mlp_norm.weight": ("model.layers.{l}.feedforward_layernorm.weight", "d"),
    "layers.mlp.act_fn.alpha_p": ("model.layers.{l}.mlp.act_fn.alpha_p", "z"),
    "layers.mlp.act_fn.alpha_n": ("model.layers.{l}.mlp.act_fn.alpha_n", "z"),
    "layers.mlp.act_fn.beta": ("model.layers.{l}.mlp.act_fn.beta", ""),
    "layers.mlp.act_fn.eps": ("model.layers.{l}.mlp.act_fn.eps", ""),
}
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type apertus."""
    hf.only("hidden_act", "xielu")
    hf.only("mlp_bias")
    hf.only("qk_norm", True)
    hf.only("post_norm")
    attention_bias = bool(hf("attention_bias"))
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(),
        ropes=(hf.rope(),),
        norm=hf.rms_norm(),
        norms=("pre_attention", "pre_mlp"),
        activation=xielu,
        gated=False,
        qkv_bias=attention_bias,
        attention_bias=attention_bias,
        qk_norm="head",
    )
