"""A PEFT folder, read: which adapters it has, as a `lora` section would ask for them, and their values.

In: a folder, and the decoder of its base model without adapters. Out: an `Adapter`, or one error that lists every
tensor that is missing, extra or misshapen, or holds what is no number. The config decides what there should be, by the
rules of PEFT, and the file must have exactly that.
"""

import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import numpy as np

from jaxsft.config import ConfigError, LoraConfig
from jaxsft.folders.peft.assemble import Part, assembled, parts_of, with_dropout
from jaxsft.folders.peft.places import PREFIX, Place, file_names, places_of
from jaxsft.folders.peft.settings import CONFIG_FILE, WEIGHTS_FILE, Settings, read_settings
from jaxsft.folders.weights.check import report
from jaxsft.folders.weights.copying import is_finite
from jaxsft.folders.weights.stored import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    Stored,
    StoredTensor,
    as_matrix,
    open_file,
    read_whole,
)
from jaxsft.model.decoder import Decoder

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
    parts: list[Part] = []
    for place in targeted:
        files = names[place.name]
        parts += parts_of(place, settings, tensors[files.a], tensors[files.b], tensors.get(files.magnitude))
    lora, values = assembled(parts, settings, decoder)
    lora, notes = with_dropout(lora, settings, parts, decoder, family)
    if rows:
        notes += (f"{len(opened.token_ids)} rows of tokens are those of the adapter; they are kept, and not trained",)
    return Adapter(lora, values, rows, notes)


def _places_in(opened: AdapterFolder, decoder: Decoder, family: ModuleType, vocab_size: int) -> dict[str, Place]:
    """What there is to adapt, called as the file calls it: mixtures had other modules before transformers 5."""
    both = [places_of(decoder, family, vocab_size=vocab_size, as_in_files=each) for each in (False, True)]

    def num_known(places: dict[str, Place]) -> int:
        names = file_names(place for place in places.values() if opened.settings.targets(place))
        return sum(name in opened.stored.tensors for files in names.values() for name in files)

    return max(both, key=num_known)


def _read(tensor: StoredTensor) -> np.ndarray:
    """float32, whole."""
    return read_whole(tensor).astype(np.float32)


def _token_rows(
    opened: AdapterFolder,
    places: dict[str, Place],
    *,
    tied: bool,
    expect: Callable[[str, tuple[int, ...], str], None],
    tensors: dict[str, np.ndarray],
    problems: list[str],
) -> dict[str, Rows]:
    """The rows of tables that the adapter brings along; what is wrong about them is added to `problems`."""
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
        if len(set(ids)) < len(ids):
            problems.append(f"{where}: {key}: an id stands there twice")
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
    num_rows, num_columns = as_matrix(one.shape)
    step, columns = max(1, (1 << 22) // max(1, num_columns)), slice(0, num_columns)
    blocks = (slice(at, min(at + step, num_rows)) for at in range(0, num_rows, step))
    return all(
        np.array_equal(one.read(rows, columns).astype(np.float32), other.read(rows, columns).astype(np.float32))
        for rows in blocks
    )
