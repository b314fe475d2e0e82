"""VaultGemma 1B: Gemma 2 without the norms after attention and MLP."""

import dataclasses

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import gemma2
from jaxsft.model.fields import Fields

WEIGHTS = gemma2.WEIGHTS
IGNORED = gemma2.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type vaultgemma."""
    return dataclasses.replace(gemma2.decoder_config(hf), norms=("pre_attention", "pre_mlp"))
