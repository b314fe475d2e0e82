"""The `config.json` of real models: accepted with the mathematics expected, or refused with the name of a field.

Sizes are as published; keys that say nothing of the mathematics are left in, as they are there on the hub.
"""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.config import ConfigError
from jaxsft.model.families.known import decoder_config

pytest.importorskip("transformers")

ALTERNATING = ["full_attention", "sliding_attention"]
COMMON = dict(initializer_range=0.02, attention_dropout=0.0, torch_dtype="bfloat16", use_cache=True, hidden_act="silu")
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def shape(model_type, vocab, hidden, intermediate, layers, heads, kv_heads, max_position, eps, **more):
    """A config.json, its sizes in the order in which one tells them."""
    return {
        **COMMON,
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_position,
        "rms_norm_eps": eps,
        **more,
    }


def llama(*sizes, **more):
    return shape("llama", *sizes, attention_bias=False, mlp_bias=False, pretraining_tp=1, **more)


def gemma(model_type, *sizes, **more):
    tokens = dict(bos_token_id=2, eos_token_id=1, pad_token_id=0)
    return {**shape(model_type, *sizes, attention_bias=False, head_dim=256, **tokens), **more}


# One line per thought, not per key.
# fmt: off
QWEN25_7B = shape(
    "qwen2", 152064, 3584, 18944, 28, 28, 4, 131072, 1e-6, rope_theta=1e6, tie_word_embeddings=False, use_mrope=False,
    use_sliding_window=False, sliding_window=131072, max_window_layers=28,
)
QWEN3_8B = shape(
    "qwen3", 151936, 4096, 12288, 36, 32, 8, 40960, 1e-6, head_dim=128, rope_theta=1000000, rope_scaling=None,
    attention_bias=False, use_sliding_window=False, sliding_window=None, max_window_layers=36,
    tie_word_embeddings=False,
)
MISTRAL_7B_V01 = shape(
    "mistral", 32000, 4096, 14336, 32, 32, 8, 32768, 1e-5, rope_theta=10000.0, sliding_window=4096,
    tie_word_embeddings=False,
)
MINISTRAL3_3B = shape(
    "ministral3", 131072, 3072, 9216, 26, 32, 8, 262144, 1e-5, head_dim=128, sliding_window=None,
    tie_word_embeddings=True,
    rope_parameters=dict(
        beta_fast=32.0, beta_slow=1.0, factor=16.0, llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0,
        original_max_position_embeddings=16384, rope_theta=1000000.0, rope_type="yarn", type="yarn",
    ),
)
GEMMA_2B = gemma(
    "gemma", 256000, 2048, 16384, 18, 8, 1, 8192, 1e-6, hidden_act="gelu", hidden_activation=None, rope_scaling=None,
    rope_theta=10000.0,
)
GEMMA2_2B = gemma(
    "gemma2", 256000, 2304, 9216, 26, 8, 4, 8192, 1e-6, hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh", attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    query_pre_attn_scalar=256, sliding_window=4096, cache_implementation="hybrid", rope_theta=10000.0,
)
GEMMA3 = dict(
    hidden_activation="gelu_pytorch_tanh", attn_logit_softcapping=None, final_logit_softcapping=None,
    query_pre_attn_scalar=256, sliding_window=512, rope_theta=1000000, rope_local_base_freq=10000, rope_scaling=None,
)
GEMMA3_1B = gemma(
    "gemma3_text", 262144, 1152, 6912, 26, 4, 1, 32768, 1e-6, **GEMMA3, sliding_window_pattern=6,
    cache_implementation="hybrid",
)
del GEMMA3_1B["hidden_act"]
OLMO2_7B = shape(
    "olmo2", 100352, 4096, 11008, 32, 32, 32, 4096, 1e-6, attention_bias=False, rope_theta=500000, rope_scaling=None,
    tie_word_embeddings=False,
)
OLMO3_7B = shape(
    "olmo3", 100278, 4096, 11008, 32, 32, 32, 65536, 1e-6, attention_bias=False, rope_theta=500000, sliding_window=4096,
    tie_word_embeddings=False, layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8,
    rope_scaling=dict(
        attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0, factor=8.0,
        original_max_position_embeddings=8192, rope_type="yarn",
    ),
)
SMOLLM3_3B = shape(
    "smollm3", 128256, 2048, 11008, 36, 16, 4, 65536, 1e-6, attention_bias=False, mlp_bias=False, rope_theta=5000000.0,
    rope_scaling=None, sliding_window=None, use_sliding_window=False, max_window_layers=28, no_rope_layer_interval=4,
    no_rope_layers=[1, 1, 1, 0] * 9, layer_types=["full_attention"] * 36, pretraining_tp=2,
)
GRANITE_8B = shape(
    "granite", 49155, 4096, 12800, 40, 32, 8, 131072, 1e-5, attention_bias=False, mlp_bias=False, rope_theta=10000000.0,
    rope_scaling=None, attention_multiplier=0.0078125, embedding_multiplier=12.0, residual_multiplier=0.22,
    logits_scaling=16.0, tie_word_embeddings=True,
)

REAL = {
    "Llama-2-7B": (
        llama(32000, 4096, 11008, 32, 32, 32, 4096, 1e-5, rope_scaling=None, tie_word_embeddings=False),
        dict(head_dim=128, windows="g", thetas=[1e4], tie_embeddings=False, qk_norm="none", logit_scale=1.0),
    ),
    "Llama-3.2-1B": (
        llama(
            128256, 2048, 8192, 16, 32, 8, 131072, 1e-5,
            head_dim=64, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE, tie_word_embeddings=True,
        ),
        dict(head_dim=64, thetas=[5e5], scalings=["llama3"], tie_embeddings=True, num_kv_heads=8),
    ),
    "SmolLM2-135M": (
        llama(
            49152, 576, 1536, 30, 9, 3, 8192, 1e-5, rope_theta=100000, rope_interleaved=False, is_llama_config=True,
            rope_scaling=None, tie_word_embeddings=True,
        ),
        dict(head_dim=64, thetas=[1e5], scalings=["default"], tie_embeddings=True),
    ),
    "Falcon3-7B": (
        llama(
            131072, 3072, 23040, 28, 12, 4, 32768, 1e-6, head_dim=256, rope_theta=1000042, rope_scaling=None,
            tie_word_embeddings=False,
        ),
        dict(head_dim=256, thetas=[1000042.0], attention_scale=None),
    ),
    "Mistral-7B-v0.1": (MISTRAL_7B_V01, dict(windows="l", window=4096, head_dim=128, qkv_bias=False)),
    "Mistral-7B-v0.3": (
        MISTRAL_7B_V01 | dict(vocab_size=32768, rope_theta=1000000.0, sliding_window=None),
        dict(windows="g", thetas=[1e6], vocab_size=32768),
    ),
    "Mistral-Nemo-2407": (
        shape(
            "mistral", 131072, 5120, 14336, 40, 32, 8, 131072, 1e-5, head_dim=128, rope_theta=1000000.0,
            sliding_window=None, tie_word_embeddings=False,
        ),
        dict(windows="g", head_dim=128, hidden_size=5120),
    ),
    "Mistral-Small-24B-2501": (
        shape(
            "mistral", 131072, 5120, 32768, 40, 32, 8, 32768, 1e-5, head_dim=128, rope_theta=100000000.0,
            sliding_window=None, tie_word_embeddings=False,
        ),
        dict(windows="g", head_dim=128, thetas=[1e8]),
    ),
    "Ministral-8B-2410": (
        shape(
            "mistral", 131072, 4096, 12288, 36, 32, 8, 32768, 1e-5, head_dim=128, rope_theta=100000000.0,
            sliding_window=32768, tie_word_embeddings=False,
        ),
        dict(windows="l", window=32768),
    ),
    "Ministral-3-3B-2512": (
        MINISTRAL3_3B,
        dict(windows="g", head_dim=128, scalings=["yarn"], attention_factors=[1.0], tie_embeddings=True),
    ),
    "Qwen2.5-7B": (
        QWEN25_7B,
        dict(windows="g", qkv_bias=True, attention_bias=False, mlp_bias=False, head_dim=128, tie_embeddings=False),
    ),
    "Qwen2.5-7B as its model card stretches it": (
        QWEN25_7B | dict(rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=32768)),
        dict(scalings=["yarn"], attention_factors=[0.1 * math.log(4) + 1]),
    ),
    "Qwen3-0.6B": (
        QWEN3_8B | dict(
            hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            max_window_layers=28, tie_word_embeddings=True,
        ),
        dict(head_dim=128, qk_norm="head", tie_embeddings=True, qkv_bias=False),
    ),
    "Qwen3-8B": (QWEN3_8B, dict(head_dim=128, qk_norm="head", windows="g", thetas=[1e6], tie_embeddings=False)),
    "gemma-2b": (
        GEMMA_2B,
        dict(head_dim=256, num_kv_heads=1, offset=1.0, embedding_scale=math.sqrt(2048), tie_embeddings=True),
    ),
    "gemma-2-2b": (
        GEMMA2_2B,
        dict(
            windows="lg", window=4096, attention_scale=1 / 16, attention_soft_cap=50.0, logit_soft_cap=30.0, offset=1.0,
            norms=("pre_attention", "post_attention", "pre_mlp", "post_mlp"), embedding_scale=48.0,
        ),
    ),
    "gemma-2-27b": (
        GEMMA2_2B | dict(
            hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, num_attention_heads=32,
            num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144, sliding_window_size=4096,
        ),
        dict(windows="lg", attention_scale=144**-0.5, head_dim=128),
    ),
    "gemma-3-270m": (
        {key: value for key, value in GEMMA3_1B.items() if key != "sliding_window_pattern"} | dict(
            hidden_size=640, intermediate_size=2048, num_hidden_layers=18, _sliding_window_pattern=6,
            use_bidirectional_attention=False, layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
        ),
        dict(windows="lllllg", window=512, thetas=[1e6, 1e4], rope_of="111110", embedding_scale=math.sqrt(640)),
    ),
    "gemma-3-1b": (
        GEMMA3_1B,
        dict(
            windows="lllllg", window=512, thetas=[1e6, 1e4], rope_of="111110", qk_norm="head", attention_scale=1 / 16,
            attention_soft_cap=None, logit_soft_cap=None, offset=1.0,
        ),
    ),
    "the text model of gemma-3-4b": (
        GEMMA3_1B | dict(
            vocab_size=262208, hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=131072, sliding_window=1024,
            rope_scaling=dict(factor=8.0, rope_type="linear"),
        ),
        dict(windows="lllllg", window=1024, thetas=[1e6, 1e4], scalings=["linear", "default"], rope_of="111110"),
    ),
    "OLMo-2-7B": (OLMO2_7B, dict(norms=("post_attention", "post_mlp"), qk_norm="all heads", thetas=[5e5])),
    "Olmo-3-7B": (
        OLMO3_7B,
        dict(
            windows="lllg", window=4096, scalings=["yarn", "default"], thetas=[5e5, 5e5], rope_of="1110",
            attention_factors=[1.2079441541679836, 1.0], norms=("post_attention", "post_mlp"), qk_norm="all heads",
        ),
    ),
    "SmolLM3-3B": (SMOLLM3_3B, dict(windows="g", rope_of="000-", thetas=[5e6], tie_embeddings=True)),
    "granite-3.1-8b": (
        GRANITE_8B,
        dict(
            attention_scale=0.0078125, embedding_scale=12.0, residual_scale=0.22, logit_scale=1 / 16,
            tie_embeddings=True,
        ),
    ),
}
# fmt: on


def pattern(letters):
    """The shortest string that the given one repeats."""
    ends = (end for end in range(1, len(letters) + 1) if (letters[:end] * len(letters))[: len(letters)] == letters)
    return letters[: next(ends)]


def described(config):
    """What a test may ask about a DecoderConfig, by name."""
    fields = {field: getattr(config, field) for field in config.__dataclass_fields__}
    windows = {kind.window for kind in config.layers} - {None}
    assert len(windows) <= 1
    return fields | dict(
        windows=pattern("".join("g" if kind.window is None else "l" for kind in config.layers)),
        window=next(iter(windows), None),
        rope_of=pattern("".join("-" if kind.rope is None else str(kind.rope) for kind in config.layers)),
        thetas=[rope.theta for rope in config.ropes],
        scalings=[rope.scaling for rope in config.ropes],
        attention_factors=[rope.attention_factor for rope in config.ropes],
        offset=config.norm.offset,
    )


@pytest.mark.parametrize("name", REAL)
def test_the_config_of_a_real_model_gives_its_mathematics(name):
    hf_config, expected = REAL[name]
    config = decoder_config(hf_config)
    given = described(config)
    assert {key: given[key] for key in expected} == expected
    assert len(config.layers) == hf_config["num_hidden_layers"]
    assert config.vocab_size == hf_config["vocab_size"]
    assert config.norm.eps == hf_config["rms_norm_eps"]
    assert config.max_position == hf_config["max_position_embeddings"]
    assert config.notes == ()
    assert hash(config) == hash(decoder_config(hf_config)) and config == decoder_config(hf_config)


def test_a_ministral_3_scales_queries_from_the_end_of_its_pretraining_on():
    scale = decoder_config(MINISTRAL3_3B).query_scale
    positions = jnp.array([0, 16383, 16384, 32767, 32768, 262143])
    expected = [1, 1, *(1 + 0.1 * math.log(times) for times in (2, 2, 3, 16))]
    np.testing.assert_allclose(scale(positions), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "hf_config, windows, window",
    [
        (QWEN25_7B | dict(use_sliding_window=True, max_window_layers=21), "g" * 21 + "l" * 7, 131072),
        (QWEN3_8B | dict(use_sliding_window=True, sliding_window=99, max_window_layers=30), "g" * 30 + "l" * 6, 99),
        (QWEN25_7B | dict(use_sliding_window=True), "g", None),
        (MISTRAL_7B_V01 | dict(model_type="ministral", layer_types=ALTERNATING * 16), "gl", 4096),
        (SMOLLM3_3B | dict(use_sliding_window=True, sliding_window=7, layer_types=None), "gggl", 7),
    ],
    ids=["qwen2", "qwen3", "qwen2 with none to have one", "ministral", "smollm3"],
)
def test_windows_of_the_last_layers_or_of_listed_ones_are_read(hf_config, windows, window):
    given = described(decoder_config(hf_config))
    assert (given["windows"], given["window"]) == (windows, window)


ROPES = {
    "linear": dict(factor=2.0),
    "dynamic": dict(factor=2.0),
    "yarn": dict(factor=2.0, original_max_position_embeddings=2048),
    "longrope": dict(short_factor=[1.0] * 64, long_factor=[2.0] * 64, original_max_position_embeddings=2048),
    "llama3": LLAMA3_ROPE,
}


@pytest.mark.parametrize("kind", ROPES)
def test_a_rope_reads_the_same_in_its_old_and_new_spellings(kind):
    base = dict(REAL["Llama-2-7B"][0])
    del base["rope_scaling"]
    parameters = {**ROPES[kind], "rope_type": kind}
    new = decoder_config(base | dict(rope_parameters={**parameters, "rope_theta": 5e4}))
    old = decoder_config(base | dict(rope_theta=50000, rope_scaling=parameters))
    older = decoder_config(base | dict(rope_theta=50000, rope_scaling={**ROPES[kind], "type": kind}))
    assert new == old == older
    assert [(rope.scaling, rope.theta) for rope in new.ropes] == [(kind, 5e4)]


TEXT_AND_IMAGES = dict(model_type="gemma3", text_config=GEMMA3_1B, vision_config=dict(model_type="siglip_vision_model"))


@pytest.mark.parametrize(
    "hf_config, change, messages",
    [
        (REAL["Llama-2-7B"][0], {"attn_logit_softcapping": 30.0}, ["attn_logit_softcapping: 30.0 is not known"]),
        (REAL["Llama-2-7B"][0], {"sliding_window": 4096}, ["sliding_window: 4096"]),
        (REAL["Llama-2-7B"][0], {"hidden_act": "mish"}, ["hidden_act: 'mish'"]),
        (REAL["Llama-2-7B"][0], {"num_key_value_heads": 5}, ["num_key_value_heads: 5 does not divide"]),
        (REAL["Llama-2-7B"][0], {"quantization_config": {"bits": 4}}, ["quantization_config"]),
        (REAL["Llama-2-7B"][0], {"rope_scaling": {"type": "su", "factor": 2.0}}, ["rope_parameters.rope_type: 'su'"]),
        (REAL["Llama-2-7B"][0], {"vocab_size": None, "hidden_size": None}, ["vocab_size: missing", "hidden_size"]),
        (MISTRAL_7B_V01, {"sliding_window_pattern": 4}, ["sliding_window_pattern: 4 is not known"]),
        (
            MISTRAL_7B_V01,
            {"layer_types": ALTERNATING * 16},
            ["layer_types: transformers passes over it", "has sliding_attention in every layer"],
        ),
        (MISTRAL_7B_V01, {"model_type": "ministral", "alibi": True}, ["alibi: True is not known"]),
        (
            MINISTRAL3_3B,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            ["needs llama_4_scaling_beta and original_max_position_embeddings"],
        ),
        (QWEN25_7B, {"use_mrope": True}, ["use_mrope: True is not known"]),
        (QWEN25_7B, {"layer_types": ["sliding_attention"] * 28}, ["sliding_window: missing"]),
        (QWEN3_8B, {"layer_types": ["linear_attention"] * 36}, ["layer_types: 'linear_attention'"]),
        (QWEN3_8B, {"num_experts": 128}, ["num_experts: 128 is not known"]),
        (GEMMA_2B, {"use_bidirectional_attention": True}, ["use_bidirectional_attention: True"]),
        (GEMMA_2B, {"hidden_activation": "relu"}, ["hidden_activation: 'relu'"]),
        (
            GEMMA2_2B,
            {"use_bidirectional_attention": True, "hidden_act": "silu", "sliding_window_size": 2048},
            ["use_bidirectional_attention: True", "hidden_act: 'silu'", "sliding_window_size: 2048"],
        ),
        (GEMMA3_1B, {"use_bidirectional_attention": True}, ["use_bidirectional_attention: True"]),
        (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping: 50.0"]),
        (GEMMA_2B, {"sliding_window": 4096}, ["sliding_window: 4096"]),
        (
            OLMO2_7B,
            {"partial_rotary_factor": 0.5},
            ["partial_rotary_factor: 0.5; model_type olmo2"],
        ),
        (OLMO2_7B, {"clip_qkv": 8.0}, ["clip_qkv: 8.0 is not known"]),
        (OLMO2_7B, {"sliding_window": 4096}, ["sliding_window: 4096"]),
        (OLMO3_7B, {"layer_types": ["full_attention"] * 31 + ["chunked_attention"]}, ["'chunked_attention'"]),
        (SMOLLM3_3B, {"layer_types": ["sliding_attention"] * 36, "sliding_window": 9}, ["use_sliding_window: False"]),
        (SMOLLM3_3B, {"no_rope_layers": [1, 0]}, ["no_rope_layers: 2 entries, but num_hidden_layers is 36"]),
        (GRANITE_8B, {"sliding_window": 4096}, ["sliding_window: 4096"]),
        (GRANITE_8B, {"num_local_experts": 40}, ["num_local_experts: 40 is not known"]),
        (TEXT_AND_IMAGES, {}, ["'gemma3' is not known", "'gemma3_text'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) and len(value) < 5 else "",
)
def test_a_field_that_asks_for_what_is_not_computed_is_refused_by_name(hf_config, change, messages):
    with pytest.raises(ConfigError) as error:
        decoder_config(hf_config | change)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize(
    "name", ["Llama-3.2-1B", "Mistral-7B-v0.1", "Qwen3-8B", "gemma-2-2b", "Olmo-3-7B", "granite-3.1-8b"]
)
def test_dropout_of_attention_is_noted_and_changes_nothing_else(name):
    hf_config, _ = REAL[name]
    config = decoder_config(hf_config | dict(attention_dropout=0.1))
    assert len(config.notes) == 1 and "attention_dropout 0.1" in config.notes[0]
    given, expected = described(config), described(decoder_config(hf_config))
    assert given | dict(notes=()) == expected
