"""What the numbers of a `config.json` may be: kind and bounds of each, checked before anything is computed with one.

In: a `config.json` as it was read. Out: a sentence for each number that cannot be meant. A billion layers would be
built for hours, and a head of -1 dims be an error of some library; every family has this check by reading `Fields`.
The bounds are far from all models that there are; `check_size` looks at the whole.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxsft.model.architecture import DecoderConfig


class Number(NamedTuple):
    """A number between two bounds, both of which it may be."""

    least: float
    most: float
    is_whole: bool = False


POSITION = Number(1, 2**31 - 1, is_whole=True)
COUNT = Number(0, 2**31 - 1, is_whole=True)
LAYERS = Number(1, 1024, is_whole=True)
HEADS = Number(1, 2**14, is_whole=True)
WIDTH = Number(1, 2**18, is_whole=True)
MLP_WIDTH = Number(1, 2**21, is_whole=True)
VOCABULARY = Number(1, 2**24, is_whole=True)
EXPERTS = Number(0, 2**14, is_whole=True)
"""0 is how some dense models say that they have none."""
EPSILON = Number(0, 1)
SHARE = Number(0, 1)
FACTOR = Number(1e-6, 1e6)
SCALE = Number(1e-9, 1e9)
SIGNED = Number(-1e6, 1e6)
THETA = Number(2, 1e18)
NUMBERS: dict[str, Number] = {
    **dict.fromkeys(("vocab_size",), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "block_dim", "conv_dim", "conv_dim_out"), WIDTH),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "moe_intermediate_size", "block_ff_dim", "block_multiple_of"), MLP_WIDTH
    ),
    **dict.fromkeys(("shared_expert_intermediate_size",), MLP_WIDTH),
    **dict.fromkeys(("moe_topk", "num_shared_expert", "moe_layer_num_skipped"), EXPERTS),
    **dict.fromkeys(("attention_head_dim", "rotary_dim"), HEADS),
    **dict.fromkeys(("shared_intermediate_size",), MLP_WIDTH._replace(least=0)),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "num_heads"), HEADS),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok", "experts_per_token"), EXPERTS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "initial_context_length"), POSITION),
    **dict.fromkeys(("original_max_position_embeddings",), POSITION._replace(least=2)),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "max_window_layers", "layer_switch"), COUNT),
    **dict.fromkeys(("no_rope_layer_interval", "decoder_sparse_step"), COUNT),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), EPSILON),
    **dict.fromkeys(("norm_eps", "block_norm_eps"), EPSILON),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "embedding_dropout"), SHARE),
    **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "residual_dropout"), SHARE),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), Number(1e-6, 1)),
    **dict.fromkeys(("initializer_range",), Number(0, 1e3)),
    **dict.fromkeys(("attention_multiplier", "embedding_multiplier", "residual_multiplier"), SIGNED),
    **dict.fromkeys(("logits_scaling", "logit_scale", "query_pre_attn_scalar"), SCALE),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), FACTOR),
    **dict.fromkeys(("swiglu_alpha", "swiglu_limit", "block_ffn_dim_multiplier"), FACTOR),
    **dict.fromkeys(("block_mlp_init_scale", "block_out_init_scale"), FACTOR),
    **dict.fromkeys(("conv_L_cache",), Number(1, 2**10, is_whole=True)),
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "rope_local_base_freq", "global_rope_theta"), THETA),
}
"""Field -> what it may be, where it is not null."""

OF_EACH_LAYER = {"hunyuan_v1_moe": ("moe_intermediate_size", "moe_topk", "num_shared_expert")}
"""model_type -> fields that may be a list, with such a number for each layer."""

ROPE_NUMBERS: dict[str, Number] = {
    **dict.fromkeys(("rope_theta",), THETA),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), FACTOR),
    **dict.fromkeys(("attention_factor", "alpha"), FACTOR),
    **dict.fromkeys(("mscale", "mscale_all_dim", "llama_4_scaling_beta"), Number(0, 1e6)),
    **dict.fromkeys(("original_max_position_embeddings",), POSITION._replace(least=2)),
    **dict.fromkeys(("max_position_embeddings",), POSITION),
    **dict.fromkeys(("partial_rotary_factor",), Number(1e-6, 1)),
}
"""The same within `rope_parameters` or `rope_scaling`, or in its part for a layer type."""
FACTORS = ("short_factor", "long_factor")
"""Lists of numbers there."""

FLAGS = frozenset(
    [
        *("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window", "norm_topk_prob", "use_qk_norm"),
        *("qk_layernorm", "use_parallel_residual", "use_qkv_bias", "scale_attn_weights", "use_embedding_sharing"),
        *("conv_bias", "block_auto_adjust_ff_dim", "tie_embedding"),
    ]
)
"""Fields that are true or false."""

MOST_PARAMETERS = 2**43
"""8.8 trillion, several times more than any model that was published."""
MOST_EXPERTS = 2**18
"""Experts of all layers together."""


def problems_of(raw: dict[str, Any]) -> list[str]:
    """A sentence for each number of a `config.json` that cannot be meant."""
    lists = OF_EACH_LAYER.get(str(raw.get("model_type")), ())
    problems = []
    for key, kind in NUMBERS.items():
        value = raw.get(key)
        text = _problem_of_list(key, value, kind) if key in lists and value else problem_of(key, value, kind)
        problems += [text] if text else []
    pattern = raw.get("sliding_window_pattern")
    if not isinstance(pattern, str) and (text := problem_of("sliding_window_pattern", pattern, COUNT)):
        problems.append(text)  # EXAONE has letters there
    problems += [
        f"{key}: {shown(raw[key])}; expected true or false"
        for key in sorted(FLAGS & raw.keys())
        if raw[key] is not None and raw[key] not in (True, False)
    ]
    for key in ("rope_parameters", "rope_scaling"):
        problems += _rope_problems(key, raw.get(key))
    return problems


def layer_problems(value: Any, where: str = "") -> list[str]:
    """A sentence for each number of layers, anywhere in a `config.json` of whatever model, that nobody can mean."""
    problems = []
    for key, each in value.items() if isinstance(value, dict) else ():
        if key in ("num_hidden_layers", "n_layer", "num_layers") and isinstance(each, int | float):
            problems += [text for text in [problem_of(where + key, each, LAYERS)] if text]
        problems += layer_problems(each, f"{where}{key}.")
    return problems


def problem_of(key: str, value: Any, kind: Number) -> str | None:
    """What is wrong with a number that was given, if anything; null counts as not given."""
    is_right_type = type(value) is int or (not kind.is_whole and isinstance(value, float))
    # A NaN is between no bounds.
    if value is None or is_right_type and kind.least <= value <= kind.most:
        return None
    what = "a whole number" if kind.is_whole else "a number"
    return f"{key}: {shown(value)}; expected {what} from {kind.least:,} to {kind.most:,}"


def _problem_of_list(key: str, value: Any, kind: Number) -> str | None:
    """What is wrong with a number, or with the first of a list that is none."""
    if not isinstance(value, list):
        return problem_of(key, value, kind)
    if len(value) > LAYERS.most:
        return f"{key}: a list of {len(value):,} numbers; expected at most {LAYERS.most:,}, one for each layer"
    return next((text for at, each in enumerate(value) if (text := problem_of(f"{key}[{at}]", each, kind))), None)


def _rope_problems(where: str, value: Any) -> Iterator[str]:
    if value is None:
        return
    if not isinstance(value, dict):
        yield f"{where}: {shown(value)}; expected an object, or null"
        return
    parts = {where: value} | {f"{where}.{key}": each for key, each in value.items() if isinstance(each, dict)}
    for place, part in parts.items():
        for key, each in part.items():
            if key in ROPE_NUMBERS:
                # Some files have 8192.0 there.
                whole = int(each) if isinstance(each, float) and each.is_integer() and abs(each) < 2**53 else each
                if text := problem_of(f"{place}.{key}", whole, ROPE_NUMBERS[key]):
                    yield text
            elif key in FACTORS and each is not None:
                yield from _factor_problems(f"{place}.{key}", each)


def _factor_problems(where: str, factors: Any) -> Iterator[str]:
    if not isinstance(factors, list) or len(factors) > HEADS.most:
        yield f"{where}: {shown(factors)}; expected a list of numbers"
        return
    for number, factor in enumerate(factors):
        if text := problem_of(f"{where}[{number}]", math.nan if factor is None else factor, FACTOR):
            yield text
            return


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def size_problems(config: DecoderConfig) -> list[str]:
    """A sentence for what is too large about a model whose every size is possible."""
    sizes = config.sizes
    num_experts = max(sizes["e"], 1)
    shared = 3 * sizes["d"] * (config.routing.shared_size if config.routing else 0)
    heads = 2 * sizes["d"] * sizes["h"] * (sizes["n"] + sizes["k"])
    mlp = (3 if config.gated else 2) * sizes["d"] * sizes["f"] * num_experts
    tables = sizes["v"] * sizes["d"] * (1 if config.tie_embeddings else 2)
    tables += sizes["p"] * sizes["d"] * config.learned_positions
    total = sizes["l"] * (heads + mlp + shared) + tables
    problems = []
    if total > MOST_PARAMETERS:
        problems.append(f"its sizes make a model of {total:,} parameters; expected at most {MOST_PARAMETERS:,}")
    if sizes["l"] * num_experts > MOST_EXPERTS:
        problems.append(f"{sizes['l']} layers of {num_experts} experts each; expected at most {MOST_EXPERTS:,} in all")
    return problems
