"""Which maps of a decoder get adapters, and which weights are trained.

In: a decoder, the `lora` section, and the family, whose table says how weights are called in files. Out: the same
decoder with adapters on its maps, all its own weights frozen. What an adapter computes is in `adapter.py`.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsft.config import ConfigError, LoraConfig
from jaxsft.model.adapter import Adapter, Constant, LoraParam
from jaxsft.model.decoder import Decoder
from jaxsft.model.embedding import Embedding
from jaxsft.model.experts import MixtureMLP, PerExpert
from jaxsft.model.freezing import fits, freeze, regex_problems
from jaxsft.model.layers import Linear
from jaxsft.model.quantized import QuantizedWeight, norms_of

Kind = Literal["attention", "convolution", "mlp", "router", "table"]

PRESETS: dict[str, tuple[Kind, ...]] = {
    "attention": ("attention",),
    "mlp": ("mlp",),
    "all_linear": ("attention", "convolution", "mlp"),
}
"""Word of `lora.targets` -> what it stands for."""


class Map(NamedTuple):
    """A map of the decoder that can have an adapter: of all layers at once, or a table."""

    path: str
    """Such as "layers.self_attn.q_proj"."""
    kind: Kind
    module: Linear | PerExpert | Embedding
    inputs: str
    outputs: str
    leading: str
    """Letters before those of the map: "l", "l e", or none."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Of its weight, quantised or not."""
        weight: Any = self.module.weight
        letters = weight.layout.ours if isinstance(weight, QuantizedWeight) else weight.get_metadata("axes")
        return tuple(letters.split())

    @property
    def sizes(self) -> dict[str, int]:
        """Letter of a dim of its weight to its size; maps of one model may differ in the width of their MLPs."""
        weight: Any = self.module.weight
        if isinstance(weight, QuantizedWeight):
            shape = (*weight.codes.shape[: len(self.leading.split())], *weight.layout.shape)
        else:
            shape = weight.shape
        return dict(zip(self.axes, shape, strict=True))


class Shape(NamedTuple):
    """Of the adapter of one map."""

    ranks: np.ndarray
    """int [L] of the layers that have the map, or [] of a table; 0 for a layer without an adapter."""
    alphas: np.ndarray
    """float, likewise."""

    def scales(self, lora: LoraConfig) -> np.ndarray:
        """float32: alpha / rank, with rslora alpha / sqrt(rank); 0 where there is no adapter."""
        ranks = np.maximum(self.ranks, 1)
        scales = self.alphas / (np.sqrt(ranks) if lora.rslora else ranks)
        return np.where(self.ranks > 0, scales, 0).astype(np.float32)


def maps_of(decoder: Decoder) -> Iterator[Map]:
    """All maps that can have an adapter, in the order of the decoder's weights."""
    yield Map("embed_tokens", "table", decoder.embed_tokens, "v", "d", "")
    attention, convolution, mlp = decoder.layers.self_attn, decoder.layers.conv, decoder.layers.mlp
    for name, inputs, outputs in (("q", "d", "n h"), ("k", "d", "k h"), ("v", "d", "k h"), ("o", "n h", "d")):
        yield Map(
            f"layers.self_attn.{name}_proj",
            "attention",
            getattr(attention, f"{name}_proj"),
            inputs,
            outputs,
            "l",
        )
    if convolution is not None:
        for name, inputs, outputs in (("b", "d", "m"), ("c", "d", "m"), ("x", "d", "m"), ("out", "m", "d")):
            module = getattr(convolution, f"{name}_proj")
            yield Map(f"layers.conv.{name}_proj", "convolution", module, inputs, outputs, "l")
    if isinstance(mlp, MixtureMLP):
        yield Map("layers.mlp.router", "router", mlp.router, "d", "e", "l")
        parts: list[tuple[str, str, Any]] = [("layers.mlp.experts", "l e", mlp.experts)]
        if mlp.shared_expert is not None:
            parts.append(("layers.mlp.shared_expert", "l", mlp.shared_expert))
    else:
        parts = [("layers.mlp", "l", mlp)]
    for prefix, leading, inner in parts:
        for name, inputs, outputs in (("gate", "d", "f"), ("up", "d", "f"), ("down", "f", "d")):
            if (module := getattr(inner, f"{name}_proj")) is not None:
                yield Map(f"{prefix}.{name}_proj", "mlp", module, inputs, outputs, leading)
    if decoder.lm_head is not None:
        yield Map("lm_head", "table", decoder.lm_head, "d", "v", "")


def names_of(place: Map, number: int | None, weights: Mapping[str, tuple[str, str]]) -> list[str]:
    """What a map is called: by us, such as "layers.3.self_attn.q_proj", and in files."""
    template = weights[f"{place.path}.weight"][0].removesuffix(".weight")
    theirs = re.sub(r"\.{e}", "", template).replace("{l}", str(number))
    ours = place.path if number is None else place.path.replace("layers.", f"layers.{number}.", 1)
    return list(dict.fromkeys([ours, theirs]))


def shapes_of(decoder: Decoder, lora: LoraConfig, family: ModuleType) -> dict[str, Shape]:
    """The adapters that a config asks for, by the paths of their maps.

    Args:
        decoder: abstract or not; only its structure is looked at.
        lora: the section.
        family: the module of its family, by whose table maps have names.

    Raises:
        ConfigError: everything in the section that fits no map, and what this model's maps cannot have.
    """
    weights: Mapping[str, tuple[str, str]] = family.WEIGHTS
    used: set[tuple[str, str]] = set()
    keys = ("targets", "exclude", "rank_pattern", "alpha_pattern")
    if problems := [problem for key in keys for problem in regex_problems(f"lora.{key}", getattr(lora, key))]:
        raise ConfigError("\n".join(problems))

    def chosen(key: str, words: Sequence[str], place: Map, names: list[str]) -> bool:
        hits = [word for word in words if place.kind in PRESETS.get(word, ()) or fits(word, names)]
        used.update((key, word) for word in hits)
        return bool(hits)

    def patterned(key: str, patterns: Mapping[str, Any], names: list[str], default: Any) -> Any:
        hits = [word for word in patterns if any(re.fullmatch(rf"(.*\.)?({word})", name) for name in names)]
        used.update((key, word) for word in hits)
        return patterns[hits[0]] if hits else default

    shapes: dict[str, Shape] = {}
    alpha = lora.alpha if lora.alpha is not None else 2.0 * lora.rank
    for place in maps_of(decoder):
        ranks, alphas = [], []
        for number in decoder.config.layers_of(place.path) if place.leading else [None]:
            names = names_of(place, number, weights)
            is_target = chosen("targets", lora.targets, place, names)
            is_target = is_target and not chosen("exclude", lora.exclude, place, names)
            ranks.append(patterned("rank_pattern", lora.rank_pattern, names, lora.rank) if is_target else 0)
            alphas.append(patterned("alpha_pattern", lora.alpha_pattern, names, alpha) if is_target else 0.0)
        if any(ranks):
            of_layers = (np.array(ranks), np.array(alphas, np.float64))
            shapes[place.path] = Shape(*(each if place.leading else each[0] for each in of_layers))
    for key in keys:
        problems += [
            f"lora.{key}: {word!r} fits nothing in this model" for word in getattr(lora, key) if (key, word) not in used
        ]
    if not shapes and not problems:
        problems.append("lora.targets: no map is left that gets an adapter")
    if "lm_head" in lora.targets and decoder.lm_head is None:
        problems.append("lora.targets: lm_head is one with the embedding here; model.tie_embeddings: false parts them")
    problems += _limits(decoder, lora, shapes, family)
    if problems:
        there = sorted({name for place in maps_of(decoder) for name in _short_names(place, weights)})
        listed = "\n  ".join(problems)
        raise ConfigError(f"lora does not fit this model:\n  {listed}\nits maps: {', '.join(there)}")
    return shapes


def is_parameter(place: Map, family: ModuleType) -> bool:
    """Whether PEFT must be given a map as a parameter, on which it can have neither dropout nor DoRA."""
    return place.kind == "router" or place.leading == "l e" or place.path in getattr(family, "AS_PARAMETERS", ())


def without_dropout(decoder: Decoder, paths: Collection[str], family: ModuleType) -> list[str]:
    """Those of some maps that can have neither dropout nor DoRA, in the order of the decoder's weights."""
    return [
        place.path
        for place in maps_of(decoder)
        if place.path in paths and (place.kind == "table" or is_parameter(place, family))
    ]


def _limits(decoder: Decoder, lora: LoraConfig, shapes: Mapping[str, Shape], family: ModuleType) -> list[str]:
    """What some kinds of maps cannot have."""
    problems = []
    wrong = without_dropout(decoder, shapes, family)
    for name, why in (
        ("dropout", "a table's rows and a router's tokens are not dropped"),
        ("dora", "magnitudes are those of linear maps in layers"),
    ):
        if getattr(lora, name) and wrong:
            problems.append(
                f"lora.{name}: not possible on {', '.join(wrong)} ({why}, and experts, and what PEFT takes for some, "
                "have neither)"
            )
    return problems


def _short_names(place: Map, weights: Mapping[str, tuple[str, str]]) -> list[str]:
    return [name.split(".")[-1] for name in names_of(place, 0 if place.leading else None, weights)]  # of any layer


def add_adapters(decoder: Decoder, lora: LoraConfig, family: ModuleType, *, key: jax.Array) -> None:
    """Gives the maps of a decoder their adapters, in the dtype of their weights, and freezes all else.

    Args:
        decoder: all of whose weights are trained so far.
        lora: the section.
        family: the module of its family.
        key: of what A is drawn by; each map has a key of its own.

    Raises:
        ConfigError: see `shapes_of`.
    """
    shapes = shapes_of(decoder, lora, family)
    for number, place in enumerate(maps_of(decoder)):
        if (shape := shapes.get(place.path)) is None:
            continue
        adapter = Adapter(
            place.inputs,
            place.outputs,
            place.sizes,
            ranks=shape.ranks,
            scales=shape.scales(lora),
            dropout=lora.dropout,
            dora=lora.dora,
            number=number,
            leading=place.leading,
            key=jax.random.fold_in(key, number),
            dtype=place.module.weight.dtype,
        )
        place.module.adapter = nnx.data(adapter)
    if lora.dropout:
        decoder.layers.number = nnx.data(Constant(jnp.arange(len(decoder.config.layers)), axes="l"))
    freeze(decoder, lambda path: True)


def with_magnitudes(weights: Any) -> Any:
    """A whole state whose magnitudes (DoRA) are the norms of its weights, as before the first step."""
    flat: dict[Any, Any] = dict(nnx.to_flat_state(weights))
    for path, magnitude in flat.items():
        if path[-1] == "magnitude":
            place = (*path[:-2], "weight")
            if place in flat:
                of_outputs = magnitude.get_metadata("axes").split()
                axes = flat[place].get_metadata("axes").split()
                over = tuple(at for at, letter in enumerate(axes) if letter not in of_outputs)
                norms = jnp.sqrt(jnp.sum(jnp.square(flat[place].get_value().astype(jnp.float32)), axis=over))
            else:
                norms = norms_of({name[-1]: part for name, part in flat.items() if name[:-1] == place})
            flat[path] = magnitude.replace(norms)
    return nnx.from_flat_state(flat)


def of_files(state: Any) -> Any:
    """Those Variables of a state that are weights of a model's files: neither adapters nor constants."""
    _, weights = nnx.split_state(state, (LoraParam, Constant), ...)
    return weights


def not_of_files(state: Any) -> Any:
    """The others."""
    others, _ = nnx.split_state(state, (LoraParam, Constant), ...)
    return others
