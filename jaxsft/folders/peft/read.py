"""A PEFT folder, read: which adapters it has, as a `lora` section would ask for them, and their values.

In: a folder, and the decoder of its base model without adapters. Out: an `Adapter`, or one error that lists every
tensor that is missing, extra or misshapen, or holds what is no number. The config decides what there should be, by the
rules of PEFT, and the file must have exactly that.

A module that holds several maps of ours (`qkv_proj`) has one A for all of them. Where each column of its B concerns one
map alone, as in files of ours, every map takes the rows and columns that are its own; otherwise each has a copy of A.
"""

import collections
import math
import pathlib
import re
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np

from jaxsft.config import ConfigError, LoraConfig
from jaxsft.folders.peft.places import (
    PREFIX,
    Place,
    a_in_file,
    b_in_file,
    file_names,
    magnitude_in_file,
    places_of,
    rank_factors,
    take,
)
from jaxsft.folders.peft.settings import CONFIG_FILE, WEIGHTS_FILE, Settings, read_settings
from jaxsft.folders.weights.check import report
from jaxsft.folders.weights.copying import is_finite
from jaxsft.folders.weights.stored import DTYPES, INDEX_FILE, SINGLE_FILE, Stored, StoredTensor, open_file
from jaxsft.model.decoder import Decoder
from jaxsft.model.lora import maps_of

DELTA = "token_adapter.trainable_tokens_delta"


class AdapterFolder(NamedTuple):
    """A folder whose adapter_config.json is understood; of its tensors only the names are known."""

    folder: pathlib.Path
    settings: Settings
    stored: Stored

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids of tokens whose rows lie in the folder."""
        given = self.settings.trainable_token_indices or []
        return tuple(sorted({id for ids in (given.values() if isinstance(given, dict) else [given]) for id in ids}))


class Rows(NamedTuple):
    """Rows of a table that the adapter brings along."""

    ids: tuple[int, ...]
    values: np.ndarray
    """float32 [len(ids), D]."""


class Adapter(NamedTuple):
    """What a PEFT folder holds, in our words."""

    lora: LoraConfig
    values: dict[str, np.ndarray]
    """By path, such as "layers.self_attn.q_proj.adapter.a": float32 with our dims."""
    rows: dict[str, Rows]
    """By the path of a table."""
    notes: tuple[str, ...]
    """Sentences for the user."""


def is_adapter(folder: pathlib.Path) -> bool:
    """Whether a folder holds an adapter, and not a whole model with an adapter_config.json left beside it."""
    return (folder / CONFIG_FILE).exists() and not any((folder / each).exists() for each in (SINGLE_FILE, INDEX_FILE))


def open_adapter(folder: pathlib.Path) -> AdapterFolder:
    """Reads adapter_config.json and the names of the tensors.

    Raises:
        ConfigError: the config asks for what is not computed here, or the file cannot be read.
    """
    settings = read_settings(folder)
    path = folder / WEIGHTS_FILE
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise ConfigError(
            f"{folder}: adapter_model.bin: pickled weights are not read, as opening them may run any program; PEFT's "
            f"save_pretrained writes {WEIGHTS_FILE}"
        )
    stored = open_file(path)
    if stored.problems:
        raise ConfigError(report("the adapter cannot be read:", list(stored.problems)))
    return AdapterFolder(folder, settings, stored)


def read_adapter(
    opened: AdapterFolder, decoder: Decoder, family: ModuleType, *, vocab_size: int, base: Stored | None, tied: bool
) -> Adapter:
    """The adapters of a folder for a model.

    Args:
        opened: the folder.
        decoder: the base model without adapters; abstract or not.
        family: the module of its family.
        vocab_size: rows of the base's vocabulary in its files.
        base: what the base is stored as; a table of it that PEFT has saved as well must be the same.
        tied: embedding and output projection are one in the base.

    Raises:
        ConfigError: everything that does not fit, in one report.
    """
    settings, path = opened.settings, opened.stored.path
    where = opened.folder / CONFIG_FILE
    problems: list[str] = []
    extra = dict(opened.stored.tensors)
    places = _places_in(opened, decoder, family, vocab_size)
    targeted = [place for place in places.values() if settings.targets(place)]
    if not targeted and not opened.token_ids:
        known = ", ".join(sorted({place.name.split(".")[-1] for place in places.values()}))
        problems.append(f"{where}: its targets name nothing in this model, which has {known}")
    names = file_names(targeted)
    tensors: dict[str, np.ndarray] = {}

    def expect(name: str, shape: tuple[int, ...], why: str) -> None:
        tensor = extra.pop(name, None)
        if tensor is None:
            problems.append(f"{path}: {name} is missing, expected with shape {list(shape)} ({why})")
        elif tensor.shape != shape:
            problems.append(f"{path}: {name} has shape {list(tensor.shape)}, expected {list(shape)} ({why})")
        elif tensor.dtype is None:
            problems.append(f"{path}: {name} has a dtype that is not read; read are {', '.join(DTYPES)}")
        else:
            tensors[name] = _read(tensor)
            if not is_finite(tensors[name]):
                at = np.argwhere(~np.isfinite(tensors[name]))[0]
                value = tensors[name][tuple(at)]
                problems.append(f"{path}: {name} holds {value} at {at.tolist()}, from which nothing can be computed")

    for place in targeted:
        rank = settings.rank(place.name)
        if settings.use_dora and (place.kind in ("embedding", "parameter") or place.is_head):
            problems.append(f"{where}: use_dora: no magnitudes are computed for {place.name}")
            continue
        shapes = list(place.shapes(rank).values())[: 3 if settings.use_dora else 2]
        for name, shape in zip(names[place.name], shapes, strict=False):
            expect(name, shape, f"{CONFIG_FILE} gives {place.name} the rank {rank}")
    rows = _token_rows(opened, places, tied=tied, expect=expect, tensors=tensors, problems=problems)
    problems += _saved_tables(opened, places, extra, base)
    problems += [
        f"{path}: {name} {list(tensor.shape)} is extra, nothing that {CONFIG_FILE} asks for in this model"
        for name, tensor in extra.items()
    ]
    if problems:
        raise ConfigError(report(f"{opened.folder}: this adapter does not fit its base model:", problems))
    parts = [
        part for place in targeted for part in _parts(place, settings, *(tensors.get(n) for n in names[place.name]))
    ]
    lora, values = _assembled(parts, settings, decoder)
    lora, notes = _with_dropout(lora, settings, parts)
    return Adapter(lora, values, rows, notes)


def _places_in(opened: AdapterFolder, decoder: Decoder, family: ModuleType, vocab_size: int) -> dict[str, Place]:
    """What there is to adapt, called as the file calls it: mixtures had other modules before transformers 5."""
    both = [places_of(decoder, family, vocab_size=vocab_size, per_expert=each) for each in (False, True)]

    def num_known(places: dict[str, Place]) -> int:
        names = file_names(place for place in places.values() if opened.settings.targets(place))
        return sum(name in opened.stored.tensors for files in names.values() for name in files)

    return max(both, key=num_known)


def _read(tensor: StoredTensor) -> np.ndarray:
    """float32, whole."""
    read = tensor.read(slice(0, math.prod(tensor.shape[:-1])), slice(0, tensor.shape[-1]))
    return read.astype(np.float32).reshape(tensor.shape)


def _token_rows(opened, places, *, tied, expect, tensors, problems) -> dict[str, Rows]:
    given = opened.settings.trainable_token_indices
    tables = [place for place in places.values() if place.members[0].path in ("embed_tokens", "lm_head")]
    if not given:
        return {}
    by_name = given if isinstance(given, dict) else {tables[0].name: given}
    rows = {}
    for key, ids in by_name.items():
        where = f"{opened.folder / CONFIG_FILE}: trainable_token_indices"
        table = next((each for each in tables if f".{each.name}".endswith(f".{key}")), None)
        if table is None and tied and len(by_name) > 1 and key != tables[0].name:
            continue  # the projection is the embedding, and its rows are those of the embedding
        if table is None:
            problems.append(f"{where}: {key[:60]!r} is no table of this model")
            continue
        if len(set(ids)) < len(ids) or min(ids, default=0) < 0:
            problems.append(f"{where}: {key}: ids must be different, and 0 or more")
            continue
        if opened.settings.targets(table):
            problems.append(f"{where}: {key} has an adapter as well, which is not read")
        if table.is_head and tied and tables[0].name in by_name:
            continue
        name = f"{PREFIX}{table.name}.{DELTA}"
        width = table.members[0].weight.shape[1]
        expect(name, (len(ids), width), f"{CONFIG_FILE} names {len(ids)} trained tokens")
        if name in tensors:
            rows[f"{table.members[0].path}.weight"] = Rows(tuple(ids), tensors[name])
    if tied and len(tables) > 1 and "embed_tokens.weight" in rows:  # parted by model.tie_embeddings: false
        rows.setdefault("lm_head.weight", rows["embed_tokens.weight"])
    return rows


def _saved_tables(
    opened: AdapterFolder, places: dict[str, Place], extra: dict[str, StoredTensor], base: Stored | None
) -> list[str]:
    """Takes tables of the base that PEFT has saved as well out of `extra`; tells which are not as in the base."""
    problems = []
    for place in places.values():
        if place.members[0].path not in ("embed_tokens", "lm_head"):
            continue
        for name in (f"{PREFIX}{place.name}.base_layer.weight", f"{PREFIX}{place.name}.weight"):
            if (saved := extra.pop(name, None)) is None:
                continue
            table = base.tensors.get(f"{place.name}.weight") if base is not None else None
            if saved.dtype is None or table is None or not _are_equal(saved, table):
                problems.append(
                    f"{opened.stored.path}: {name} {list(saved.shape)} is not the base's table: one that was trained "
                    "whole or resized, which is not read; merge the adapter with PEFT"
                )
    return problems


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape:
        return False
    step, columns = max(1, (1 << 22) // one.shape[-1]), slice(0, one.shape[-1])
    blocks = (slice(at, min(at + step, one.shape[0])) for at in range(0, one.shape[0], step))
    return all(
        np.array_equal(one.read(rows, columns).astype(np.float32), other.read(rows, columns).astype(np.float32))
        for rows in blocks
    )


class _Part(NamedTuple):
    """The adapter of one map of one layer, or of one expert in it."""

    path: str
    index: tuple[int, ...]
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


def _parts(
    place: Place, settings: Settings, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray | None
) -> Iterable[_Part]:
    """The adapters of the maps in a place."""
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
        alpha = scale * (math.sqrt(own) if settings.use_rslora else own)
        of_outputs = None if magnitude is None else take(magnitude_in_file(member), magnitude)
        yield _Part(member.path, member.index, of_a, of_b, alpha, of_outputs)


def _assembled(
    parts: Sequence[_Part], settings: Settings, decoder: Decoder
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The `lora` section that asks for these adapters, and their values, stacked over layers and experts."""
    maps = {place.path: place for place in maps_of(decoder)}
    sizes, num_layers = decoder.config.sizes, len(decoder.config.layers)
    by_path: dict[str, list[_Part]] = {}
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

        def empty(axes: str, letters: list[str] = letters, width: int = width) -> np.ndarray:
            all_sizes = {**sizes, "l": num_layers, "r": width}
            return np.zeros([all_sizes[letter] for letter in (*letters, *axes.split())], np.float32)

        a, b = empty(f"{place.inputs} r"), empty(f"r {place.outputs}")
        magnitude = empty(place.outputs) if settings.use_dora else None
        by_layer: dict[tuple[int, ...], list[_Part]] = {}
        for part in of_map:
            by_layer.setdefault(part.index[:1], []).append(part)
        for layer, of_layer in by_layer.items():
            rank, alpha = max((part.rank, part.alpha) for part in of_layer)
            scale = alpha / (math.sqrt(rank) if settings.use_rslora else rank)
            for part in of_layer:
                own = part.alpha / (math.sqrt(part.rank) if settings.use_rslora else part.rank)
                _fill(a[part.index], part.a)
                _fill(b[part.index], part.b if own == scale else part.b * np.float32(own / scale))
                if magnitude is not None and part.magnitude is not None:
                    _fill(magnitude[part.index], part.magnitude)
            name = path if not layer else path.replace("layers.", f"layers.{layer[0]}.", 1)
            ranks[name], alphas[name] = rank, alpha
        is_everywhere = len(by_layer) == (num_layers if place.leading else 1)
        words = [path.split(".")[-1]] if is_everywhere else [name for name in ranks if _path_of(name) == path]
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


def _most_common(values: Iterable, default):  # type: ignore[no-untyped-def]
    counted = collections.Counter(values).most_common(1)
    return counted[0][0] if counted else default


def _patterns(given: dict[str, float], default: float) -> dict:
    """Regular expressions for what differs from the default: one for a map where all its layers agree."""
    by_path: dict[str, dict[str, float]] = {}
    for name, value in given.items():
        by_path.setdefault(_path_of(name), {})[name] = value
    patterns = {}
    for path, of_layers in by_path.items():
        if len(set(of_layers.values())) == 1:
            of_layers = {path.split(".")[-1]: next(iter(of_layers.values()))}
        patterns |= {re.escape(name): value for name, value in of_layers.items() if value != default}
    return patterns


def _with_dropout(lora: LoraConfig, settings: Settings, parts: Sequence[_Part]) -> tuple[LoraConfig, tuple[str, ...]]:
    """With the file's dropout, where all its maps can have one."""
    if not settings.lora_dropout:
        return lora, ()
    without = sorted({p.path for p in parts if "experts" in p.path or p.path in ("embed_tokens", "lm_head")})
    without += sorted({part.path for part in parts if part.path.endswith("router")})
    if without:
        note = (
            f"the adapter's lora_dropout {settings.lora_dropout} is not applied in training, as it also has adapters "
            f"on {', '.join(without)}, which have no dropout here"
        )
        return lora, (note,)
    return lora.model_copy(update={"dropout": settings.lora_dropout}), ()
