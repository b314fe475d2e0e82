"""The metadata of a GGUF model, read key by key, and what all architectures have in common: sizes, rope, special ids.

In: a `GGUFFile`. Out: parts of a config.json, and a note of every key that is missing, not read or not computed. Keys:
https://github.com/ggml-org/llama.cpp/tree/master/conversion
"""

import math
from typing import Any

import numpy as np

from jaxsft.folders.gguf.file import GGUFFile
from jaxsft.model.bounds import NUMBERS, problem_of

Config = dict[str, Any]

MOST_WHOLE, MOST_FLOAT = 2**31 - 1, 1e30
MOST_DIM = 2**14
"""Dims of a head, and so numbers in a tensor of rope factors."""

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that say what config.json says in rope_parameters."""


class Keys:
    """The metadata of a file, and which of its architecture's keys have been read."""

    def __init__(self, file: GGUFFile):
        self.metadata = file.metadata
        self.tensors = file.tensors
        self.prefix = f"{file.metadata['general.architecture']}."
        self.problems: list[str] = []
        self.unread = {key for key in file.metadata if key.startswith(self.prefix)}

    def get(self, key: str, default: Any = None) -> Any:
        self.unread.discard(self.prefix + key)
        value = self.metadata.get(self.prefix + key, default)
        if isinstance(value, float) and not abs(value) <= MOST_FLOAT:
            self.problems.append(f"{self.prefix}{key}: {value}, no number to compute with")
            return default
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            value = value[0]  # said for each layer, the same for all
        # What was 1e-05 in a config.json is 9.999999747378752e-06 as a float32.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def number(self, key: str, kind: type = int, *, default: Any = None, most: float | None = None) -> Any:
        """A number of at most `most`; it must be there if there is no default."""
        most = most or (MOST_WHOLE if kind is int else MOST_FLOAT)
        value = self.get(key, default)
        is_number = type(value) in (int, kind)
        # A NaN is between no bounds.
        if not is_number or not (0 if kind is int else -most) <= value <= most:
            given = "missing" if value is None else f"{str(value)[:60]!r}, but one number up to {most:,} is expected"
            self.problems.append(f"{self.prefix}{key}: {given}")
            return kind(1)
        return kind(value)

    def expect(self, key: str, *values: Any) -> None:
        """Refuses other values; the key may be missing."""
        if (value := self.get(key)) is not None and value not in values:
            self.problems.append(f"{self.prefix}{key}: {str(value)[:60]!r}, but only {values[0]!r} is computed")

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def has(self, name: str) -> bool:
        """Whether the first layer, or the file, has a tensor."""
        return name in self.tensors or f"blk.0.{name}" in self.tensors

    def floats(self, name: str) -> list[float]:
        """The values of a small tensor."""
        tensor = self.tensors.get(name)
        if tensor is None:
            self.problems.append(f"{name}: missing")
            return [1.0]
        if len(tensor.shape) != 1 or tensor.shape[0] > MOST_DIM:
            self.problems.append(f"{name}: {list(tensor.shape)}, expected one dim of at most {MOST_DIM}")
            return [1.0]
        return [float(str(value)) for value in tensor.read(slice(0, 1), slice(0, tensor.shape[-1]))[0]]


SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}


def read_sizes(keys: Keys) -> Config:
    """What all architectures have in common; a size that cannot be meant is noted, and 1."""
    config: Config = {
        "vocab_size": keys.tensors["token_embd.weight"].shape[0],
        "hidden_size": keys.number("embedding_length"),
        "num_hidden_layers": keys.number("block_count"),
        "num_attention_heads": keys.number("attention.head_count"),
        "intermediate_size": keys.number("feed_forward_length"),
        "max_position_embeddings": keys.number("context_length"),
        "tie_word_embeddings": "output.weight" not in keys.tensors,
    }
    for key, name in SIZES.items():
        if text := problem_of(f"{keys.prefix}{name}", config[key], NUMBERS[key]):
            keys.problems.append(text)
            config[key] = 1
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = keys.number("attention.head_count_kv", default=heads)
    config["head_dim"] = max(
        1, keys.number("attention.key_length", default=config["hidden_size"] // heads, most=MOST_DIM)
    )
    keys.expect("attention.value_length", config["head_dim"])
    keys.expect("vocab_size", config["vocab_size"])
    keys.expect("attention.causal", True)
    config["rope_parameters"] = _rope(keys, config)
    return config


def _rope(keys: Keys, config: Config) -> Config:
    head_dim = config["head_dim"]
    rope: Config = {"rope_theta": keys.number("rope.freq_base", float, default=10000.0), "rope_type": "default"}
    turned = keys.number("rope.dimension_count", default=head_dim, most=MOST_DIM)
    if turned != head_dim:
        rope["partial_rotary_factor"] = turned / head_dim
    kind = keys.get("rope.scaling.type", "none")
    scalings = {kind} & {"linear", "yarn"}
    if "rope_freqs.weight" in keys.tensors:
        scalings.add("llama3")
    if {"rope_factors_long.weight", "rope_factors_short.weight"} & keys.tensors.keys():
        scalings.add("longrope")
    if len(scalings) > 1 or kind not in scalings | {"none"}:
        tensors = ", ".join(keys.tensors.keys() & {*ROPE_TENSORS}) or "no tensor of factors"
        keys.problems.append(f"{keys.prefix}rope.scaling.type: {kind!r} with {tensors}; no scaling that is known")
        return rope
    for scaling in scalings:
        rope |= {"rope_type": scaling, **ROPE_SCALINGS[scaling](keys, config, rope["rope_theta"])}
    if not scalings:
        keys.expect("rope.scaling.factor", 1.0)
    return rope


def _linear_rope(keys: Keys, config: Config, theta: float) -> Config:
    return {"factor": keys.number("rope.scaling.factor", float)}


def _yarn_rope(keys: Keys, config: Config, theta: float) -> Config:
    keys.expect("rope.scaling.yarn_ext_factor", 1.0)
    factor = keys.number("rope.scaling.factor", float)
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    given = keys.get("rope.scaling.yarn_attn_factor", usual)
    if not isinstance(given, float) or not math.isclose(given, usual, rel_tol=1e-5):
        keys.problems.append(f"{keys.prefix}rope.scaling.yarn_attn_factor: {given!r}, but only {usual:.6g} is computed")
    return {
        "factor": factor,
        "original_max_position_embeddings": keys.number("rope.scaling.original_context_length"),
        "beta_fast": keys.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.get("rope.scaling.yarn_beta_slow", 1.0),
    } | ({"attention_factor": given} if "rope.scaling.yarn_attn_factor" in keys else {})


def _long_rope(keys: Keys, config: Config, theta: float) -> Config:
    original = keys.number("rope.scaling.original_context_length")
    scale = max(1.0, config["max_position_embeddings"] / max(original, 1))
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if original > 1 else 1.0
    given = keys.number("rope.scaling.attn_factor", float, default=usual)
    return {
        "long_factor": keys.floats("rope_factors_long.weight"),
        "short_factor": keys.floats("rope_factors_short.weight"),
        "original_max_position_embeddings": original,
    } | ({} if math.isclose(given, usual, rel_tol=1e-5) else {"attention_factor": given})


def _llama3_rope(keys: Keys, config: Config, theta: float) -> Config:
    """The scaling of Llama 3.1 and later, of which a file has only what becomes of each frequency."""
    stored = np.array(keys.floats("rope_freqs.weight"))
    dim = keys.number("rope.dimension_count", default=config["head_dim"], most=MOST_DIM)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, dim, 2) / dim)
    low, high, factor = 1.0, 4.0, float(stored.max())
    for original in (8192, 4096, 2048, 16384, 32768, 65536, 131072):
        smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
        divisors = 1 / ((1 - smooth) / factor + smooth)
        if len(stored) == len(divisors) and np.allclose(stored, divisors, rtol=1e-4):
            scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            return {**scaling, "original_max_position_embeddings": original}
    keys.problems.append("rope_freqs.weight: not the frequencies of any scaling that is known")
    return {}


ROPE_SCALINGS = {"linear": _linear_rope, "yarn": _yarn_rope, "llama3": _llama3_rope, "longrope": _long_rope}
"""rope_type of config.json -> what else it needs there."""


def read_special_ids(metadata: dict[str, Any], vocab_size: int) -> Config:
    """Ids of tokens; all that end an answer as eos_token_id."""
    given = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding")}
    ids = {name: id for name, id in given.items() if type(id) is int and 0 <= id < vocab_size}
    eos = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    named = {"bos_token_id": ids.get("bos"), "pad_token_id": ids.get("padding"), "eos_token_id": eos or None}
    return {key: value for key, value in named.items() if value is not None} | (
        {"eos_token_id": eos[0]} if len(eos) == 1 else {}
    )
