"""Adapters of a model as a folder that PEFT opens: adapter_config.json, adapter_model.safetensors, the tokenizer.

In: the weights of a model with adapters. Out: a folder that appears whole or not at all, sealed like any export. Each
tensor is put together from one layer's A or B, gathered and written before the next. All are float32.
"""

import collections
import contextlib
import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxsft.config import LoraConfig
from jaxsft.disk.seal import Entry as SealEntry
from jaxsft.folders.export import (
    check_target,
    save_tokenizer,
    target_of,
    write_card,
    write_generation_config,
    write_whole_folder,
)
from jaxsft.folders.peft.places import (
    PREFIX,
    Member,
    Place,
    a_in_file,
    b_in_file,
    file_names,
    magnitude_in_file,
    places_of,
    put,
    rank_factors,
    short_names,
    take,
)
from jaxsft.folders.peft.read import DELTA
from jaxsft.folders.peft.settings import CONFIG_FILE, WEIGHTS_FILE
from jaxsft.folders.tokenizer_files import settle_tokenizer
from jaxsft.folders.weights.beside import file_beside
from jaxsft.folders.weights.gathering import of_layer, rows_of
from jaxsft.folders.weights.layout import base_prefix, variables_of
from jaxsft.folders.weights.save import Tensor, dump_json, header_of
from jaxsft.folders.weights.stored import Stored, read_whole
from jaxsft.model.decoder import Decoder
from jaxsft.model.lora import Shape, shapes_of


class AdaptedModel(NamedTuple):
    """All that an adapter's folder is made of but its tokenizer."""

    decoder: Decoder
    """Abstract or not."""
    family: ModuleType
    lora: LoraConfig
    weights: nnx.State
    """All of them, Variables with axes."""
    vocab_size: int
    stored: Stored
    """Of the base model."""
    base: str
    """The base model's hub id or absolute path."""
    revision: str | None
    token_ids: tuple[int, ...]
    """Rows of the embedding that the base has not, or has otherwise."""
    is_tied: bool
    """The base has one table as embedding and output projection."""


class Entry(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    """float32; to be called on every process."""


def export_adapter(
    folder: pathlib.Path,
    model: AdaptedModel,
    *,
    hf_config: dict[str, Any],
    tokenizer: Any,
    stop_ids: Sequence[int],
    source_folders: Sequence[pathlib.Path],
    tokenizer_folder: pathlib.Path,
    card: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Writes the folder; every process must call this.

    Args:
        folder: takes the place of an earlier export.
        model: the model with its adapters.
        hf_config: config.json of the base.
        tokenizer: of the model.
        stop_ids: every id that ends an answer.
        source_folders: where the model came from: the base first, then an adapter that was trained on.
        tokenizer_folder: where the tokenizer came from.
        card: text of README.md, on process 0; None: it has none.
        say: is told where files went that stood in an earlier export and are not known to be ours.

    Raises:
        ConfigError: `folder` holds something else than an export, or a source.
        ExportError: it could not be written.
    """
    folder = target_of(folder)
    check_target(folder, source_folders)
    entries, settings = adapter_entries(model)
    num_bytes = 4 * sum(math.prod(entry.shape) for entry in entries)

    def write_others(aside: pathlib.Path) -> None:
        save_tokenizer(aside, tokenizer)
        write_generation_config(aside, hf_config, source_folders[0], tokenizer=tokenizer, stop_ids=stop_ids)
        settle_tokenizer(aside, tokenizer, tokenizer_folder)
        (aside / CONFIG_FILE).write_bytes(dump_json(settings))
        write_card(aside, card)

    def write(aside: pathlib.Path) -> dict[str, SealEntry | None]:
        return {WEIGHTS_FILE: _write(aside / WEIGHTS_FILE, entries)}

    write_whole_folder(folder, say, num_bytes=num_bytes, weights=write, others=write_others)


def write_tensors(path: pathlib.Path, model: AdaptedModel) -> None:
    """Writes adapter_model.safetensors alone, in a run of one process."""
    _write(path, adapter_entries(model)[0])


def fused_maps(decoder: Decoder, family: ModuleType, lora: LoraConfig, *, vocab_size: int) -> list[str]:
    """Tensors of the base in which several maps with adapters lie: PEFT trains them as one."""
    places = places_of(decoder, family, vocab_size=vocab_size)
    shapes = shapes_of(decoder, lora, family)
    return [each.place.name for each in adapted_places(places.values(), shapes) if len(each.place.members) > 1]


def _write(path: pathlib.Path, entries: Sequence[Entry]) -> SealEntry | None:
    """Process 0 writes what all gather; None on the others."""
    header = header_of({entry.name: Tensor("F32", entry.shape, ()) for entry in entries}, {"format": "pt"})
    with file_beside(path) if jax.process_index() == 0 else contextlib.nullcontext() as out:
        if out:
            out.write(np.frombuffer(header, np.uint8))
        for entry in entries:
            values = entry.make()
            assert values.shape == entry.shape and values.dtype == np.float32, entry.name
            if out:
                out.write(np.ascontiguousarray(values))
    return out.entry if out else None


class Adapted(NamedTuple):
    """A place, and which of its maps have adapters, of which rank and scale."""

    place: Place
    members: tuple[Member, ...]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]

    @property
    def rank(self) -> int:
        return sum(self.ranks)

    def alpha(self, *, rslora: bool) -> float:
        """Of the place, such that PEFT's scale is that of its first map."""
        more = self.rank / self.ranks[0]
        return self.alphas[0] * (math.sqrt(more) if rslora else more)

    def ratios(self, *, rslora: bool) -> list[np.float32]:
        """The scales of its maps over that of the first."""
        scales = [alpha / (math.sqrt(r) if rslora else r) for alpha, r in zip(self.alphas, self.ranks, strict=True)]
        return [np.float32(scale / scales[0]) for scale in scales]


def adapted_places(places: Iterable[Place], shapes: Mapping[str, Shape]) -> list[Adapted]:
    """Those places on whose maps there are adapters."""
    found = []
    for place in places:
        with_rank = []
        for member in place.members:
            if (shape := shapes.get(member.path)) is not None:
                layer = member.at[:1]
                with_rank.append((member, int(shape.ranks[layer]), float(shape.alphas[layer])))
        with_rank = [each for each in with_rank if each[1]]
        if with_rank:
            found.append(Adapted(place, *zip(*with_rank, strict=True)))
    return found


def adapter_entries(model: AdaptedModel) -> tuple[list[Entry], dict[str, Any]]:
    """The tensors of adapter_model.safetensors in order, and adapter_config.json."""
    lora, rslora = model.lora, model.lora.rslora
    shapes = shapes_of(model.decoder, lora, model.family)
    places = places_of(model.decoder, model.family, vocab_size=model.vocab_size)
    adapted = adapted_places(places.values(), shapes)
    names = file_names(each.place for each in adapted)
    variables = variables_of(model.weights)
    entries = []
    for each in adapted:
        files, of_rank = names[each.place.name], each.place.shapes(each.rank)
        a, b, magnitude = of_rank.values()
        entries.append(Entry(files.a, a, functools.partial(_stack_a, each, variables)))
        entries.append(Entry(files.b, b, functools.partial(_blocks_of_b, each, variables, rslora=rslora)))
        if lora.dora:
            make = functools.partial(_magnitude, each, variables, model.stored, model.family)
            entries.append(Entry(files.magnitude, magnitude, make))
    tables = [place for place in places.values() if place.members[0].path in ("embed_tokens", "lm_head")]
    tables = [place for place in tables if model.token_ids and not (place.is_head and model.is_tied)]
    for place in tables:
        table = variables[f"{place.members[0].path}.weight"]
        shape = (len(model.token_ids), table.shape[1])
        make = functools.partial(rows_of, table.get_value(), model.token_ids)
        entries.append(Entry(f"{PREFIX}{place.name}.{DELTA}", shape, make))
    settings = adapter_settings(model, places, adapted)
    if tables:
        settings["trainable_token_indices"] = {place.name.split(".")[-1]: list(model.token_ids) for place in tables}
    return sorted(entries), settings


def adapter_settings(model: AdaptedModel, places: Mapping[str, Place], adapted: Sequence[Adapted]) -> dict[str, Any]:
    """What PEFT must be told."""
    short = short_names(places)
    ranks = {each.place.name: each.rank for each in adapted}
    alphas = {each.place.name: _plain(each.alpha(rslora=model.lora.rslora)) for each in adapted}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    groups: dict[str, list[str]] = {}
    for name, place in places.items():
        groups.setdefault(place.group, []).append(name)

    def targets(*, parameters: bool) -> list[str]:
        found: list[str] = []
        for group, of_group in groups.items():
            chosen = [name for name in of_group if name in ranks]
            if chosen and (places[chosen[0]].kind == "parameter") == parameters:
                found += [short[group]] if len(chosen) == len(of_group) and group in short else chosen
        return found

    def patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for group, of_group in groups.items():
            of_names = {name: values[name] for name in of_group if name in values}
            if group in short and len(set(of_names.values())) == 1:
                of_names = {short[group]: next(iter(of_names.values()))}
            found |= {re.escape(name): value for name, value in of_names.items() if value != default}
        return found

    parameters = targets(parameters=True)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": model.base,
        "revision": model.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": model.lora.dropout,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": targets(parameters=False),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": patterns(ranks, rank),
        "alpha_pattern": patterns(alphas, alpha),
        "use_rslora": model.lora.rslora,
        "use_dora": model.lora.dora,
        "fan_in_fan_out": any(each.place.kind == "conv" for each in adapted),
        "modules_to_save": None,
    } | ({"target_parameters": parameters} if parameters else {})


def _plain(value: float) -> float:
    """Without the last bits of its rounding, in which the alphas of layers might differ; whole numbers as such."""
    value = float(f"{value:.14g}")
    return int(value) if value == int(value) else value


def _most_common(values: Iterable[Any]) -> Any:
    counted = collections.Counter(values).most_common(1)
    return counted[0][0] if counted else 1


# The values of a tensor.


def _stack_a(each: Adapted, variables: Mapping[str, nnx.Variable]) -> np.ndarray:
    tensor = np.zeros(next(iter(each.place.shapes(each.rank).values())), np.float32)
    for member, rank in zip(each.members, rank_factors(each.ranks), strict=True):
        weight = a_in_file(member, rank)
        put(weight, tensor, _cut(_of_layer(variables[f"{member.path}.adapter.a"], member), weight.shape))
    return tensor


def _blocks_of_b(each: Adapted, variables: Mapping[str, nnx.Variable], *, rslora: bool) -> np.ndarray:
    tensor = np.zeros(list(each.place.shapes(each.rank).values())[1], np.float32)
    for member, rank, ratio in zip(each.members, rank_factors(each.ranks), each.ratios(rslora=rslora), strict=True):
        weight = b_in_file(member, rank)
        values = _cut(_of_layer(variables[f"{member.path}.adapter.b"], member), weight.shape)
        put(weight, tensor, values if ratio == 1 else values * ratio)
    return tensor


def _magnitude(each: Adapted, variables: Mapping[str, nnx.Variable], stored: Stored, family: ModuleType) -> np.ndarray:
    """Of maps in a module that have no adapter it is the norm of their weights, which then stay as they are."""
    tensor = np.zeros(each.place.num_outputs, np.float32)
    for member in each.place.members:
        adapted = member in each.members
        values = _of_layer(variables[f"{member.path}.adapter.magnitude"], member) if adapted else None
        put(magnitude_in_file(member), tensor, _norms(member, stored, family) if values is None else values)
    return tensor


def _norms(member: Member, stored: Stored, family: ModuleType) -> np.ndarray:
    """float32 [outputs]: of the base's own weights."""
    weight = member.weight
    name = weight.name(member.at)
    found = stored.tensors.get(name) or stored.tensors[name.removeprefix(base_prefix(family))]
    ours = take(weight, read_whole(found).astype(np.float32))
    letters = weight.axes[weight.split :]
    return np.sqrt(np.square(ours).sum(axis=tuple(at for at, each in enumerate(letters) if each in member.inputs)))


def _cut(values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Without what fills up ranks of layers, and rows behind the vocabulary."""
    return values[tuple(slice(0, size) for size in shape)]


def _of_layer(variable: nnx.Variable, member: Member) -> np.ndarray:
    return of_layer(variable.get_value(), member.at[:1])
