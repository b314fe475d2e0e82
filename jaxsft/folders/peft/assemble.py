"""Adapters of modules, as PEFT has them, into those of our maps, stacked over layers.

In: the tensors of each module. Out: the `lora` section that asks for just these adapters, and their values.
"""

import collections
import math
import re
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from jaxsft.config import LoraConfig
from jaxsft.folders.peft.places import Place, a_in_file, b_in_file, magnitude_in_file, rank_factors, take
from jaxsft.folders.peft.settings import Settings
from jaxsft.model.decoder import Decoder
from jaxsft.model.lora import Map, maps_of, without_dropout


class Part(NamedTuple):
    """The adapter of one map of one layer, or of one expert in it."""

    path: str
    at: tuple[int, ...]
    a: np.ndarray
    """[inputs, r], of experts in one tensor [e, inputs, r]."""
    b: np.ndarray
    """[r, outputs], of experts in one tensor [e, r, outputs]."""
    alpha: float
    """Such that the scale is alpha / r, or alpha / sqrt(r)."""
    magnitude: np.ndarray | None

    @property
    def rank(self) -> int:
        return self.a.shape[-1]


def parts_of(
    place: Place, settings: Settings, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray | None
) -> Iterable[Part]:
    """The adapters of the maps in a place.

    Several maps share one A. Where each column of B concerns one of them alone, as in files of ours, every map takes
    the rows and columns that are its own; otherwise each has a copy of A.

    Args:
        place: what has the adapter.
        settings: of its folder.
        a, b, magnitude: its tensors, float32.
    """
    rank, scale = settings.rank(place.name), settings.scale(place.name)
    (whole,) = rank_factors([rank])
    each = []
    for member in place.members:
        of_a, of_b = take(a_in_file(member, whole), a), take(b_in_file(member, whole), b)
        axis = 1 if member.experts else 0  # of b's rank
        used = np.any(of_b != 0, axis=tuple(at for at in range(of_b.ndim) if at != axis))
        each.append((member, of_a, of_b, axis, used))
    is_own = len(each) > 1 and np.all(sum(used.astype(int) for *_, used in each) == 1)
    if settings.use_dora and not all(used.any() for *_, used in each):
        is_own = False  # maps without an adapter have no magnitude
    for member, of_a, of_b, axis, used in each:
        if is_own and not used.any():
            continue
        if is_own:
            of_a, of_b = of_a[..., used], np.compress(used, of_b, axis=axis)
        own = of_a.shape[-1]
        # Without the last bits of its rounding, in which layers might differ.
        alpha = float(f"{scale * (math.sqrt(own) if settings.use_rslora else own):.14g}")
        of_outputs = None if magnitude is None else take(magnitude_in_file(member), magnitude)
        yield Part(member.path, member.at, of_a, of_b, alpha, of_outputs)


def assembled(parts: Sequence[Part], settings: Settings, decoder: Decoder) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The `lora` section that asks for these adapters, and their values, stacked over layers and experts."""
    maps = {place.path: place for place in maps_of(decoder)}
    by_path: dict[str, list[Part]] = {}
    for part in parts:
        by_path.setdefault(part.path, []).append(part)
    targets: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    values: dict[str, np.ndarray] = {}
    for path, of_map in by_path.items():
        place = maps[path]
        width = max(part.rank for part in of_map)
        letters = place.leading.split()
        layers = decoder.config.layers_of(path) if place.leading else ()

        def empty(axes: str, place: Map = place, letters: list[str] = letters, width: int = width) -> np.ndarray:
            all_sizes = {**place.sizes, "r": width}
            return np.zeros([all_sizes[letter] for letter in (*letters, *axes.split())], np.float32)

        a, b = empty(f"{place.inputs} r"), empty(f"r {place.outputs}")
        magnitude = empty(place.outputs) if settings.use_dora else None
        by_layer: dict[tuple[int, ...], list[Part]] = {}
        for part in of_map:
            by_layer.setdefault(part.at[:1], []).append(part)
        for layer, of_layer in by_layer.items():
            rank, alpha = max((part.rank, part.alpha) for part in of_layer)
            scale = alpha / (math.sqrt(rank) if settings.use_rslora else rank)
            for part in of_layer:
                own = part.alpha / (math.sqrt(part.rank) if settings.use_rslora else part.rank)
                _fill(a[part.at], part.a)
                _fill(b[part.at], part.b if own == scale else part.b * np.float32(own / scale))
                if magnitude is not None and part.magnitude is not None:
                    _fill(magnitude[part.at], part.magnitude)
            name = path if not layer else path.replace("layers.", f"layers.{layers[layer[0]]}.", 1)
            ranks[name], alphas[name] = rank, alpha
        is_everywhere = len(by_layer) == (len(layers) if place.leading else 1)
        # Two maps of a layer may have the same last word: those of a shared expert, and those of the others.
        like_it = [other for other in maps if other.split(".")[-1] == path.split(".")[-1]]
        word = path.split(".")[-1] if len(like_it) == 1 else ".".join(path.split(".")[-2:])
        words = [word] if is_everywhere else [name for name in ranks if _path_of(name) == path]
        targets += words
        values |= {f"{path}.adapter.a": a, f"{path}.adapter.b": b}
        if magnitude is not None:
            values[f"{path}.adapter.magnitude"] = magnitude
    rank, alpha = _most_common(ranks.values(), settings.r), _most_common(alphas.values(), settings.lora_alpha)
    lora = LoraConfig(
        rank=rank,
        alpha=alpha,
        targets=targets,
        rank_pattern=_patterns(ranks, rank),
        alpha_pattern=_patterns(alphas, alpha),
        rslora=settings.use_rslora,
        dora=settings.use_dora,
    )
    return lora, values


def _fill(out: np.ndarray, values: np.ndarray) -> None:
    """Into the beginning of each dim; what is behind it (other ranks, rows beyond the vocabulary) stays 0."""
    out[tuple(slice(0, size) for size in values.shape)] = values


def _path_of(name: str) -> str:
    return re.sub(r"^layers\.\d+\.", "layers.", name)


def _most_common(values: Iterable[Any], default: Any) -> Any:
    counted = collections.Counter(values).most_common(1)
    return counted[0][0] if counted else default


def _patterns(given: dict[str, Any], default: Any) -> dict[str, Any]:
    """Regular expressions for what differs from the default: one for a map where all its layers agree."""
    by_path: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        by_path.setdefault(_path_of(name), {})[name] = value
    patterns: dict[str, Any] = {}
    for path, of_layers in by_path.items():
        if len(set(of_layers.values())) == 1:
            of_layers = {path.split(".")[-1]: next(iter(of_layers.values()))}
        patterns |= {re.escape(name): value for name, value in of_layers.items() if value != default}
    return patterns


def with_dropout(
    lora: LoraConfig, settings: Settings, parts: Sequence[Part], decoder: Decoder, family: ModuleType
) -> tuple[LoraConfig, tuple[str, ...]]:
    """With the file's dropout, where all its maps can have one."""
    if not settings.lora_dropout:
        return lora, ()
    if without := without_dropout(decoder, {part.path for part in parts}, family):
        note = (
            f"the adapter's lora_dropout {settings.lora_dropout} is not applied in training, as it also has adapters "
            f"on {', '.join(without)}, which have no dropout here"
        )
        return lora, (note,)
    return lora.model_copy(update={"dropout": settings.lora_dropout}), ()
