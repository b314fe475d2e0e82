"""GLM-4-0414, GLM-Z1: GLM-4 with norms of what attention and MLP add, too."""

import dataclasses

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import glm
from jaxsft.model.fields import Fields

WEIGHTS = glm.WEIGHTS | {
    "layers.post_attention_norm.weight": ("model.layers.{l}.post_self_attn_layernorm.weight", "d"),
    "layers.post_mlp_norm.weight": ("model.layers.{l}.post_mlp_layernorm.weight", "d"),
}
IGNORED = glm.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type glm4."""
    return dataclasses.replace(glm.decoder_config(hf), norms=("pre_attention", "post_attention", "pre_mlp", "post_mlp"))
