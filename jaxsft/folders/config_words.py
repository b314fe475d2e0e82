"""A model's `config.json` in the words of transformers 4 beside those of transformers 5.

transformers 5 writes `rope_parameters` and `dtype`, and names one count anew. transformers 4 passes over words that it
does not know and computes with its defaults, without a word. In: a config.json in either spelling. Out: one that both
read to the same model, and sentences about what has no older word. What is in the older words only is left as it is:
transformers 5 reads them.

What transformers 4 reads: the configuration_*.py and modeling_rope_utils.py of 4.57.1.
"""

import copy
import logging
import math
from typing import Any, NamedTuple

Config = dict[str, Any]

KNOWS_ONE_ROPE = "transformers 4 has the same rope in every layer of model_type {model_type}"


class Older(NamedTuple):
    """What the older words say."""

    words: Config
    problems: tuple[str, ...] = ()
    """What they cannot say; transformers 4 would compute something else, or refuse it."""


def with_older_words(hf_config: Config) -> tuple[Config, tuple[str, ...]]:
    """The config with the words of transformers 4 beside, and what these cannot say.

    Worked example: {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}, "dtype": "bfloat16"}
    gets "rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0} and "torch_dtype": "bfloat16".
    """
    words: Config = {}
    problems: tuple[str, ...] = ()
    if hf_config.get("dtype") is not None:
        words["torch_dtype"] = hf_config["dtype"]
    newer = NAMED_ANEW.get(hf_config.get("model_type", ""), {})
    words |= {older: hf_config[name] for name, older in newer.items() if hf_config.get(name) is not None}
    says_none = not {"rope_parameters", "rope_theta"} & hf_config.keys()
    if hf_config.get("rope_parameters") or says_none and hf_config.get("model_type") in THETA_UNSAID:
        rope, problems = _older_rope(hf_config)
        words |= rope
    return {**hf_config, **words}, problems


THETA_UNSAID = ("cohere", "olmo3")
"""Model types whose rope_theta the two versions do not agree on where nothing is said."""
NAMED_ANEW = {"qwen3_moe": {"num_local_experts": "num_experts"}}
"""model_type -> word of transformers 5 -> that of transformers 4."""


def describe_older_words(before: Config, after: Config, problems: tuple[str, ...]) -> list[str]:
    """What the user should know; nothing where nothing but a dtype is said twice."""
    new = [key for key in after if key != "torch_dtype" and (key not in before or before[key] != after[key])]
    notes = []
    if new:
        notes.append(
            f"config.json of the export also has {', '.join(new)}, the words of transformers 4 for what transformers 5 "
            "calls by other names; without them, version 4 would compute with its defaults"
        )
    return notes + [f"transformers 4 will not compute this model as it is: {problem}" for problem in problems]


# Rope.


def _older_rope(hf_config: Config) -> Older:
    """`rope_parameters` as transformers 5 completes them, in the older words."""
    config = _read(hf_config)
    parameters = getattr(config, "rope_parameters", None)
    model_type = hf_config["model_type"]
    if not parameters:
        return Older({})
    nested = {key: value for key, value in parameters.items() if isinstance(value, dict) and "rope_theta" in value}
    if model_type in ROPES_BY_LAYER and nested.keys() == {"sliding_attention", "full_attention"}:
        return ROPES_BY_LAYER[model_type](nested["full_attention"], nested["sliding_attention"], config)
    if nested:
        return Older({}, (f"rope_parameters: {KNOWS_ONE_ROPE.format(model_type=model_type)}",))
    return _one_rope(parameters, config)


def _read(hf_config: Config) -> Any:
    """The config as transformers reads it."""
    import transformers

    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return transformers.CONFIG_MAPPING[hf_config["model_type"]].from_dict(copy.deepcopy(hf_config))
    finally:
        logger.setLevel(level)


def _one_rope(parameters: Config, config: Any) -> Older:
    """One rope for all layers."""
    rope = {key: value for key, value in parameters.items() if value is not None}
    theta, share = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    names = ("rotary_emb_base", "rotary_pct") if config.model_type == "gpt_neox" else ("rope_theta", SHARE)
    words = {names[0]: theta}
    if share is not None and (share != 1.0 or config.model_type in HAS_SHARE):
        words[names[1]] = share
    scaling, problems, beside = _scaling(kind, rope, config)
    if kind == "default" and "rope_scaling" not in HAS_SCALING_UNSAID.get(config.model_type, ()):
        return Older(words, problems)
    return Older({**words, "rope_scaling": scaling, **beside}, problems)


SHARE = "partial_rotary_factor"
HAS_SHARE = ("glm", "glm4", "stablelm", "gpt_neox")
"""Model types of which transformers 4 turns a part of each head where nothing is said."""
HAS_SCALING_UNSAID = {"gpt_oss": ("rope_scaling",)}
"""Model types that transformers 4 stretches where nothing is said."""


def _scaling(kind: str, rope: Config, config: Any) -> tuple[Config | None, tuple[str, ...], Config]:
    """`rope_scaling`, what it cannot say, and words that stand beside it."""
    if kind == "default":
        return None, (), {}
    original: Any = rope.get("original_max_position_embeddings")
    beside: Config = {}
    problems: list[str] = []
    if kind in ("linear", "dynamic") and "alpha" not in rope:
        rope = {"factor": float(rope["factor"])}
    if kind == "yarn" and "factor" not in rope:
        rope["factor"] = config.max_position_embeddings / original
    if kind == "longrope":
        # transformers 4 looks for it beside the dict, and takes the factor from it, whatever the dict says.
        beside["original_max_position_embeddings"] = original
        factor = config.max_position_embeddings / original
        given = float(rope.get("factor", factor))
        if given != factor and "attention_factor" not in rope:
            rope["attention_factor"] = math.sqrt(1 + math.log(given) / math.log(original)) if given > 1 else 1.0
        if config.model_type == "phi3" and given == factor and "attention_factor" not in rope:
            # It refuses any other keys than these three.
            return {"type": kind, **{key: rope[key] for key in ("short_factor", "long_factor")}}, (), beside
    if config.model_type == "phi3":
        problems.append("rope_parameters: of phi3 it knows no attention_factor, and refuses to open the model")
    if config.model_type == "olmo2":
        if kind in ("linear", "dynamic") and rope["factor"] > 1:
            return {"type": kind, **rope}, (), {}
        problems.append(f"rope_parameters: of olmo2 it knows no rope_type {kind!r}, and refuses to open the model")
    return {"rope_type": kind, **rope}, tuple(problems), beside


def _gemma3(full: Config, sliding: Config, config: Any) -> Older:
    older = _one_rope(full, config)
    problems = list(older.problems)
    if sliding.get("rope_type", "default") != "default":
        problems.append("rope_parameters.sliding_attention: of gemma3 it does not stretch the rope of these layers")
    return Older({**older.words, "rope_local_base_freq": sliding["rope_theta"]}, tuple(problems))


def _olmo3(full: Config, sliding: Config, config: Any) -> Older:
    """There, only layers without a window are stretched, and all have one theta."""
    older = _one_rope(full, config)
    problems = list(older.problems)
    if sliding.get("rope_type", "default") != "default" or sliding["rope_theta"] != full["rope_theta"]:
        problems.append(
            "rope_parameters.sliding_attention: of olmo3 these layers have the rope_theta of the others there, and are "
            "not stretched"
        )
    return Older(older.words, tuple(problems))


ROPES_BY_LAYER = {"gemma3_text": _gemma3, "olmo3": _olmo3}
"""Model types that have two ropes -> how the older words say them."""
