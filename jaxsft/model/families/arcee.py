"""Arcee's AFM: Llama whose MLP has no gate, and the square of a relu."""

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields
from jaxsft.model.layers import ACTIVATIONS

WEIGHTS = llama.WEIGHTS
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type arcee."""
    attention_bias = bool(hf("attention_bias"))
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(),
        ropes=(hf.rope(),),
        norm=hf.rms_norm(),
        norms=("pre_attention", "pre_mlp"),
        activation=ACTIVATIONS[hf.activation()],
        gated=False,
        qkv_bias=attention_bias,
        attention_bias=attention_bias,
        mlp_bias=bool(hf("mlp_bias")),
    )
