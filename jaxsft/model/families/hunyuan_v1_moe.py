"""Hunyuan-A13B: Hunyuan with experts in place of the MLP, one of them for all tokens."""

import dataclasses

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.experts import Routing
from jaxsft.model.families import hunyuan_v1_dense, qwen3_moe
from jaxsft.model.fields import Fields

WEIGHTS = (
    qwen3_moe.WEIGHTS
    | hunyuan_v1_dense.NORMS
    | {
        "layers.mlp.router.weight": ("model.layers.{l}.mlp.gate.wg.weight", "e d"),
        "layers.mlp.shared_expert.gate_proj.weight": ("model.layers.{l}.mlp.shared_mlp.gate_proj.weight", "f d"),
        "layers.mlp.shared_expert.up_proj.weight": ("model.layers.{l}.mlp.shared_mlp.up_proj.weight", "f d"),
        "layers.mlp.shared_expert.down_proj.weight": ("model.layers.{l}.mlp.shared_mlp.down_proj.weight", "d f"),
    }
)
IN_MEMORY = qwen3_moe.IN_MEMORY | {"layers.mlp.router.weight": WEIGHTS["layers.mlp.router.weight"]}
AS_PARAMETERS = tuple(f"layers.mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down"))
"""Linear modules that PEFT must be given as parameters: of this model type it takes a module of such a name for that of
the experts, wherever it is (PEFT 0.21)."""
IGNORED = hunyuan_v1_dense.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type hunyuan_v1_moe."""
    config = hunyuan_v1_dense.decoder_config(hf)
    num_experts, width = _one_of_all_layers(hf, "num_experts"), config.intermediate_size
    top_k = _one_of_all_layers(hf, "moe_topk")
    if not 1 <= top_k <= num_experts:
        hf.problem(f"moe_topk: {top_k}; expected 1 to {num_experts}, the number of experts")
    # transformers computes with what it says of all layers alone, and refuses files that mean other numbers.
    for key, only in dict(moe_intermediate_size=width, num_shared_expert=1, moe_layer_num_skipped=0).items():
        given = only if hf(key) is None else hf(key)
        if any(each != only for each in (given if isinstance(given, list) else [given])):
            hf.problem(f"{key}: {given}; only {only} is computed")
    for key, value in dict(use_mixed_mlp_moe=True, norm_topk_prob=True, moe_drop_tokens=False).items():
        if hf(key, value) != value:
            hf.problem(f"{key}: {hf(key)!r}; only {value!r} is computed")
    hf("moe_random_routing_dropped_token"), hf("capacity_factor"), hf("group_limited_greedy")
    routing = Routing(num_experts, top_k, normalise=True, router_bias=False, shared_size=width)
    return dataclasses.replace(config, routing=routing)


def _one_of_all_layers(hf: Fields, key: str) -> int:
    """A number that may be a list of one for each layer, all of which must be the same."""
    value = hf(key)
    numbers = set(value) if isinstance(value, list) else {value}
    if len(numbers) != 1 or not all(type(each) is int for each in numbers):
        hf.problem(f"{key}: {value!r}; expected a whole number, the same for all layers")
        return 1
    return int(numbers.pop())
