"""StarCoder2 (3B, 7B, 15B): layer norms, an MLP without a gate, biases, and a window in all layers or in none."""

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import stablelm
from jaxsft.model.fields import Fields
from jaxsft.model.layers import ACTIVATIONS, NormKind

WEIGHTS = stablelm.WEIGHTS | {
    "layers.mlp.up_proj.weight": ("model.layers.{l}.mlp.c_fc.weight", "f d"),
    "layers.mlp.up_proj.bias": ("model.layers.{l}.mlp.c_fc.bias", "f"),
    "layers.mlp.down_proj.weight": ("model.layers.{l}.mlp.c_proj.weight", "d f"),
    "layers.mlp.down_proj.bias": ("model.layers.{l}.mlp.c_proj.bias", "d"),
}
IGNORED = stablelm.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type starcoder2."""
    hf.only("norm_type", "layer_norm")
    hf.only("mlp_type", "default")
    hf.only("layer_norm_epsilon", hf("norm_epsilon"))
    if not hf("scale_attn_weights", True):
        hf.problem("scale_attn_weights: False; only True is computed")
    # transformers computes hidden_act, whatever the first says; and softmax is in float32.
    hf("activation_function"), hf("attention_softmax_in_fp32"), hf("scale_attention_softmax_in_fp32")
    bias = bool(hf("use_bias"))
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(),
        ropes=(hf.rope(),),
        norm=NormKind(hf.number("norm_epsilon"), kind="layer", bias=True),
        norms=("pre_attention", "pre_mlp"),
        activation=ACTIVATIONS[hf.activation()],
        gated=False,
        qkv_bias=bias,
        attention_bias=bias,
        mlp_bias=bias,
    )
