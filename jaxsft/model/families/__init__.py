"""Model families: one module each, with `decoder_config(hf)` and the table `WEIGHTS`."""

from types import ModuleType
from typing import Any

from jaxsft.config import ConfigError
from jaxsft.model.families import llama

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": llama,
}
"""model_type of a config.json -> the module of its family."""


def family(hf: dict[str, Any]) -> ModuleType:
    """The module of the family that a `config.json` names.

    Raises:
        ConfigError: the model_type is missing or not known.
    """
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConfigError(f"the model's config.json: model_type {model_type!r} is not known; known are {known}")
    return FAMILIES[model_type]
