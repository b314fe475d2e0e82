"""SmolLM3 3B: Llama whose every fourth layer is not told positions."""

import dataclasses

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields

WEIGHTS = llama.WEIGHTS
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type smollm3."""
    config = llama.decoder_config(hf)
    hf("no_rope_layer_interval"), hf("max_window_layers")  # already in no_rope_layers and layer_types
    if not hf("use_sliding_window") and any(kind.window for kind in config.layers):
        # transformers then masks or does not, depending on its attention kernel.
        hf.problem("use_sliding_window: False, but layer_types has sliding_attention")
    has_rope = hf("no_rope_layers")  # 1 where there is a rope, against its name
    if len(has_rope) < len(config.layers):
        hf.problem(f"no_rope_layers: {len(has_rope)} entries, but num_hidden_layers is {len(config.layers)}")
    layers = (kind._replace(rope=0 if each else None) for kind, each in zip(config.layers, has_rope, strict=False))
    return dataclasses.replace(config, layers=tuple(layers))
