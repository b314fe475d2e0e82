"""OLMo 3 (7B, 32B): OLMo 2 with a window in three of four layers; only the fourth has a stretched rope."""

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import olmo2
from jaxsft.model.fields import Fields
from jaxsft.model.layers import gated

WEIGHTS = olmo2.WEIGHTS
IGNORED = olmo2.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type olmo3."""
    attention_bias = bool(hf("attention_bias"))
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(ropes={"full_attention": 0, "sliding_attention": 1}),
        ropes=(hf.rope("full_attention"), hf.rope("sliding_attention")),
        norm=hf.rms_norm(),
        norms=("post_attention", "post_mlp"),
        activation=gated(hf.activation()),
        qkv_bias=attention_bias,
        attention_bias=attention_bias,
        qk_norm="all heads",
    )
