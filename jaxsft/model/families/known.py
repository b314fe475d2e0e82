"""The families that are known, by the `model_type` of a `config.json`."""

from types import ModuleType
from typing import Any

from jaxsft.config import ConfigError
from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.bounds import shown, size_problems
from jaxsft.model.families import (
    apertus,
    arcee,
    cohere,
    cohere2,
    ernie4_5,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    glm,
    glm4,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    granitemoe,
    granitemoeshared,
    hunyuan_v1_dense,
    hunyuan_v1_moe,
    lfm2,
    llama,
    minimax_m2,
    ministral3,
    mixtral,
    nanochat,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
    vaultgemma,
)
from jaxsft.model.fields import Fields, refusal

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": llama,
    "ministral": llama,
    "ministral3": ministral3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "smollm3": smollm3,
    "granite": granite,
    "phi3": phi3,
    "cohere": cohere,
    "cohere2": cohere2,
    "gpt_neox": gpt_neox,
    "gpt2": gpt2,
    "stablelm": stablelm,
    "exaone4": exaone4,
    "glm": glm,
    "glm4": glm4,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "gpt_oss": gpt_oss,
    "apertus": apertus,
    "arcee": arcee,
    "seed_oss": seed_oss,
    "ernie4_5": ernie4_5,
    "hunyuan_v1_dense": hunyuan_v1_dense,
    "starcoder2": starcoder2,
    "nanochat": nanochat,
    "vaultgemma": vaultgemma,
    "qwen2_moe": qwen2_moe,
    "hunyuan_v1_moe": hunyuan_v1_moe,
    "granitemoe": granitemoe,
    "granitemoeshared": granitemoeshared,
    "minimax_m2": minimax_m2,
    "lfm2": lfm2,
}
"""model_type of a config.json -> the module of its family."""


def family(hf_config: dict[str, Any]) -> ModuleType:
    """The module of the family that a `config.json` names.

    Raises:
        ConfigError: the model_type is missing or not known.
    """
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        text = hf_config.get("text_config")
        part = text.get("model_type") if isinstance(text, dict) else None
        is_known = isinstance(part, str) and part in FAMILIES
        hint = f" (a model of text and more; its text part alone, model_type {part!r}, is known)" * is_known
        known = ", ".join(FAMILIES)
        raise ConfigError(
            f"the model's config.json: model_type {shown(model_type)} is not known{hint}; known are {known}"
        )
    return FAMILIES[model_type]


def decoder_config(hf_config: dict[str, Any]) -> DecoderConfig:
    """The mathematics that a `config.json` describes.

    Raises:
        ConfigError: the model_type is not known; or fields that are missing, do not fit each other, or ask for what is
            not computed here, all together.
    """
    module = family(hf_config)
    fields = Fields(hf_config)
    try:
        config = module.decoder_config(fields)
        problems = size_problems(config)
    except (ArithmeticError, TypeError, ValueError, AttributeError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        # A zero to divide by, a list where a number is expected.
        raise refusal([f"a value makes no sense: {error}"]) from None
    for problem in problems:
        fields.problem(problem)
    fields.finish()
    return config
