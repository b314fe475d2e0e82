"""What the metadata of a GGUF file says, in the words of a config.json: one function for each architecture.

In: a `GGUFFile`. Out: the config of a model type of transformers, and every key that is missing, not known or not
computed. What a file leaves unsaid, because llama.cpp knows it by the architecture's name:
https://github.com/ggml-org/llama.cpp/tree/master/src/models
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from jaxsft.config import ConfigError
from jaxsft.folders.gguf.file import GGUFFile
from jaxsft.folders.gguf.metadata import Config, Keys, read_sizes, read_special_ids


class Meaning(NamedTuple):
    """What a file's metadata says."""

    architecture: "Architecture"
    config: Config
    """What config.json would say."""
    head_dim: int
    num_layers: int
    problems: list[str]
    """Keys that are missing, not known or not computed."""


def read_config(file: GGUFFile) -> Meaning:
    """The config of a GGUF model.

    Raises:
        ConfigError: the architecture is not known, or the file is not a language model.
    """
    name = str(file.metadata.get("general.architecture"))
    kind = file.metadata.get("general.type", "model")
    if name not in ARCHITECTURES or kind != "model":
        given = f"of architecture {name!r}" if kind == "model" else f"of type {kind!r}"
        raise ConfigError(f"{file.path}: a GGUF {given} is not read; read are {', '.join(ARCHITECTURES)}")
    if "token_embd.weight" not in file.tensors:
        raise ConfigError(f"{file.path}: no tensor token_embd.weight: not a whole language model")
    architecture = ARCHITECTURES[name]
    keys = Keys(file)
    sizes = read_sizes(keys)
    if architecture.pairs_adjacent and "partial_rotary_factor" in sizes["rope_parameters"]:
        keys.problems.append(f"{keys.prefix}rope.dimension_count: rope that turns only a part of each head is not read")
    own = architecture.config(keys, sizes)
    head_dim = sizes.pop("head_dim")
    if own["model_type"] in HEAD_DIM or head_dim * sizes["num_attention_heads"] != sizes["hidden_size"]:
        own["head_dim"] = head_dim
    words = {key: key for key in sizes} | architecture.words
    renamed = {word: sizes[key] for key, word in words.items() if word is not None}
    # The keys of the architecture come first, and win where both give a value.
    config = own | renamed | own | read_special_ids(file.metadata, sizes["vocab_size"])
    unknown = [f"{key}: {str(file.metadata[key])[:60]!r} is not known here" for key in sorted(keys.unread)]
    return Meaning(architecture, config, head_dim, sizes["num_hidden_layers"], keys.problems + unknown)


# Architectures: what a file's keys say in the words of config.json. The sizes that all have in common are in `_sizes`.


def _llama(keys: Keys, config: Config) -> Config:
    if keys.get("expert_count", 0):
        experts = _experts(keys, "num_local_experts", normalised=True)
        return {**_model("mixtral", "MixtralForCausalLM"), **_rms(keys), **experts, "sliding_window": None}
    keys.expect("expert_used_count", 0)
    return {**_model("llama", "LlamaForCausalLM"), **_rms(keys), **_biases(keys), "mlp_bias": keys.has("ffn_up.bias")}


def _qwen2(keys: Keys, config: Config) -> Config:
    return {**_model("qwen2", "Qwen2ForCausalLM"), **_rms(keys), "use_sliding_window": False}


def _qwen3(keys: Keys, config: Config) -> Config:
    return {**_model("qwen3", "Qwen3ForCausalLM"), **_rms(keys), **_biases(keys), "use_sliding_window": False}


def _qwen3moe(keys: Keys, config: Config) -> Config:
    return {
        **_model("qwen3_moe", "Qwen3MoeForCausalLM"),
        **_rms(keys),
        **_biases(keys),
        "use_sliding_window": False,
        "moe_intermediate_size": keys.number("expert_feed_forward_length"),
        **_experts(keys, "num_experts", normalised=True),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _olmoe(keys: Keys, config: Config) -> Config:
    return {
        **_model("olmoe", "OlmoeForCausalLM"),
        **_rms(keys),
        **_biases(keys),
        **_experts(keys, "num_experts", normalised=False),
        "norm_topk_prob": False,
    }


def _gemma(keys: Keys, config: Config) -> Config:
    return {**_model("gemma", "GemmaForCausalLM"), **_rms(keys), **_biases(keys), "hidden_act": "gelu_pytorch_tanh"}


def _gemma2(keys: Keys, config: Config) -> Config:
    return {
        **_model("gemma2", "Gemma2ForCausalLM"),
        **_rms(keys),
        **_biases(keys),
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": keys.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.get("final_logit_softcapping", 30.0),
        "sliding_window": keys.get("attention.sliding_window", 4096),
        "layer_types": _layer_types(keys, config, 2),
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=46),
    }


def _gemma3(keys: Keys, config: Config) -> Config:
    # llama.cpp's own numbers where a file has none: five layers with a window to one without; 10000 is their base.
    keys.expect("attn_logit_softcapping", 0.0)
    local = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10000.0)}
    return {
        **_model("gemma3_text", "Gemma3ForCausalLM"),
        **_rms(keys),
        **_biases(keys),
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "sliding_window": keys.number("attention.sliding_window"),
        "layer_types": _layer_types(keys, config, 6),
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=62),
        "rope_parameters": {"sliding_attention": local, "full_attention": config["rope_parameters"]},
    }


def _phi3(keys: Keys, config: Config) -> Config:
    # 0 is "none"; files older than this key relied on llama.cpp to know the window by the number of layers.
    return {
        **_model("phi3", "Phi3ForCausalLM"),
        **_rms(keys),
        "sliding_window": keys.number("attention.sliding_window") or None,
        "original_max_position_embeddings": keys.number("rope.scaling.original_context_length"),
    }


def _gpt2(keys: Keys, config: Config) -> Config:
    keys.expect("attention.head_count_kv", config["num_attention_heads"])
    return {
        **_model("gpt2", "GPT2LMHeadModel"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon", float),
        "activation_function": "gelu_new",
    }


def _stablelm(keys: Keys, config: Config) -> Config:
    parallel = not keys.has("ffn_norm.weight")
    keys.expect("use_parallel_residual", parallel)
    return {
        **_model("stablelm", "StableLmForCausalLM"),
        "layer_norm_eps": keys.number("attention.layer_norm_epsilon", float),
        "use_parallel_residual": parallel,
        "use_qkv_bias": keys.has("attn_q.bias"),
        "qk_layernorm": keys.has("attn_q_norm.weight"),
    }


def _granite(keys: Keys, config: Config) -> Config:
    keys.expect("expert_count", 0)
    keys.expect("expert_used_count", 0)
    return {
        **_model("granite", "GraniteForCausalLM"),
        **_rms(keys),
        **_biases(keys),
        "mlp_bias": keys.has("ffn_up.bias"),
        "attention_multiplier": keys.number("attention.scale", float),
        "embedding_multiplier": keys.number("embedding_scale", float),
        "residual_multiplier": keys.number("residual_scale", float),
        "logits_scaling": keys.number("logit_scale", float),
    }


def _smollm3(keys: Keys, config: Config) -> Config:
    return {
        **_model("smollm3", "SmolLM3ForCausalLM"),
        **_rms(keys),
        **_biases(keys),
        "mlp_bias": keys.has("ffn_up.bias"),
        "use_sliding_window": False,
        # Not in the file: every fourth layer, as llama.cpp knows.
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])],
    }


def _olmo2(keys: Keys, config: Config) -> Config:
    common = {**_rms(keys), **_biases(keys)}
    window = keys.get("attention.sliding_window")
    if not window:
        return {**_model("olmo2", "Olmo2ForCausalLM"), **common}
    # Layers with a window have the rope that is not stretched.
    local = {
        "rope_type": "default",
        "rope_theta": keys.get("rope.freq_base_swa", config["rope_parameters"]["rope_theta"]),
    }
    return {
        **_model("olmo3", "Olmo3ForCausalLM"),
        **common,
        "sliding_window": window,
        "layer_types": _layer_types(keys, config, 4),
        "rope_parameters": {"sliding_attention": local, "full_attention": config["rope_parameters"]},
    }


def _exaone4(keys: Keys, config: Config) -> Config:
    window = keys.get("attention.sliding_window") or None
    return {
        **_model("exaone4", "Exaone4ForCausalLM"),
        **_rms(keys),
        "sliding_window": window,
        "layer_types": _layer_types(keys, config, 4 if window else 1),
    }


def _glm4(keys: Keys, config: Config) -> Config:
    return {**_model("glm4", "Glm4ForCausalLM"), **_rms(keys), **_biases(keys)}


def _cohere2(keys: Keys, config: Config) -> Config:
    keys.expect("rope.freq_base_swa", config["rope_parameters"]["rope_theta"])
    return {
        **_model("cohere2", "Cohere2ForCausalLM"),
        **_biases(keys),
        "layer_norm_eps": keys.number("attention.layer_norm_epsilon", float),
        "logit_scale": keys.number("logit_scale", float),
        "sliding_window": keys.number("attention.sliding_window"),
        "layer_types": _layer_types(keys, config, 4),
    }


def _gpt_oss(keys: Keys, config: Config) -> Config:
    keys.expect("rope.freq_base_swa", config["rope_parameters"]["rope_theta"])
    return {
        **_model("gpt_oss", "GptOssForCausalLM"),
        **_rms(keys),
        **_biases(keys),
        "intermediate_size": keys.number("expert_feed_forward_length"),
        "num_local_experts": keys.number("expert_count"),
        "num_experts_per_tok": keys.number("expert_used_count"),
        "sliding_window": keys.number("attention.sliding_window"),
        "layer_types": _layer_types(keys, config, 2),
        "swiglu_limit": 7.0,
        # The one thing that llama.cpp rounds and this model does not.
        "rope_parameters": config["rope_parameters"] | {"truncate": False},
    }


def _command_r(keys: Keys, config: Config) -> Config:
    return {
        **_model("cohere", "CohereForCausalLM"),
        **_biases(keys),
        "layer_norm_eps": keys.number("attention.layer_norm_epsilon", float),
        "logit_scale": keys.number("logit_scale", float),
        "use_qk_norm": keys.has("attn_q_norm.weight"),
    }


def _rms(keys: Keys) -> Config:
    return {"rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", float)}


def _biases(keys: Keys) -> Config:
    return {"attention_bias": keys.has("attn_q.bias")}


def _experts(keys: Keys, count: str, *, normalised: bool) -> Config:
    """How many there are and are chosen; llama.cpp knows that by softmax, and whether their weights then sum to 1."""
    keys.expect("expert_gating_func", 1)
    keys.expect("expert_weights_norm", normalised)
    return {count: keys.number("expert_count"), "num_experts_per_tok": keys.number("expert_used_count")}


def _layer_types(keys: Keys, config: Config, usual_period: int) -> list[str]:
    """Which layers have a window: the file says it for each, or that the last of each period has none, or nothing."""
    given = keys.get("attention.sliding_window_pattern", usual_period)
    num_layers = config["num_hidden_layers"]
    if isinstance(given, bool):
        given = [given] * num_layers
    if isinstance(given, int):
        given = [given > 0 and layer % given != 0 for layer in range(1, num_layers + 1)]
    if not isinstance(given, list) or len(given) != num_layers:
        keys.problems.append(f"{keys.prefix}attention.sliding_window_pattern: {str(given)[:60]!r}")
        given = [True] * num_layers
    return ["sliding_attention" if windowed else "full_attention" for windowed in given]


def _query_scalar(config: Config, *, layers_of_27b: int) -> int:
    """Gemma's query_pre_attn_scalar is not in the file; llama.cpp knows the one model of another by its layers."""
    if config["num_hidden_layers"] == layers_of_27b:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How llama.cpp stores a model."""

    config: Callable[[Keys, Config], Config]
    """What this architecture's keys say in config.json, beside the sizes that it is given."""
    pairs_adjacent: bool = False
    """q and k have the two numbers that rope turns together side by side, not half a head apart."""
    norm_shift: float = 0.0
    """Added to the weights of norms in GGUF."""
    transposed: bool = False
    """Projections lie in Hugging Face's files as [in, out]."""
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    """Weights whose names are not the usual ones (`model.NAMES`)."""
    words: dict[str, str | None] = dataclasses.field(default_factory=dict)
    """Sizes that this config.json has under another name, or not at all."""


GPT2_WORDS = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "num_key_value_heads": None,
    "rope_parameters": None,
}

ARCHITECTURES = {
    "llama": Architecture(_llama, pairs_adjacent=True),
    "qwen2": Architecture(_qwen2),
    "qwen3": Architecture(_qwen3),
    "qwen3moe": Architecture(_qwen3moe),
    "gemma": Architecture(_gemma, norm_shift=1.0),
    "gemma2": Architecture(_gemma2, norm_shift=1.0),
    "gemma3": Architecture(_gemma3, norm_shift=1.0),
    "phi3": Architecture(_phi3),
    "gpt2": Architecture(_gpt2, transposed=True, words=GPT2_WORDS),
    "stablelm": Architecture(_stablelm),
    "granite": Architecture(_granite, pairs_adjacent=True),
    "smollm3": Architecture(_smollm3, pairs_adjacent=True),
    "olmo2": Architecture(_olmo2),
    "olmoe": Architecture(_olmoe),
    "exaone4": Architecture(_exaone4),
    "glm4": Architecture(_glm4),
    "command-r": Architecture(_command_r),
    "cohere2": Architecture(_cohere2),
    "gpt-oss": Architecture(_gpt_oss, names={"layers.pre_mlp_norm": "post_attention_norm"}),
}
"""general.architecture -> what it is. Mistral and Mixtral are stored as llama."""

HEAD_DIM = ("llama", "gemma", "gemma2", "gemma3_text", "qwen3", "qwen3_moe")
"""Model types whose config.json has a head_dim even where it is hidden_size / num_attention_heads."""


def _model(model_type: str, class_name: str) -> Config:
    return {"model_type": model_type, "architectures": [class_name]}
