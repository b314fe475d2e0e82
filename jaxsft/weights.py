"""Weights in safetensors files and on a mesh: each device's shard read by itself, and written back tensor by tensor.

In: files, and the abstract state of a `Decoder` with its shardings. Out: the state with values, each process reading
only the bytes that its devices hold; and files that are equal to the byte when nothing was trained. Which tensor a
weight is, and in which layout, is the family's table (`model/families/`); a layout such as "(n h) d" names the dims of
a tensor by the same letters as the `axes` of the weight.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import struct
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from jaxsft.config import ConfigError

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
"""safetensors' word for a dtype -> numpy's."""

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


# The join of our weights and their tensors.


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of ours, and how it lies in files.

    Worked example: q_proj with axes "l d n h", shape [2, 64, 8, 4] and the family's line
    ("model.layers.{l}.self_attn.q_proj.weight", "(n h) d") is the 2 tensors `names`, each of `file_shape` [32, 64];
    seen as `file_dims` [8, 4, 64] and transposed by `to_ours` (2, 0, 1) it is one layer of ours, [64, 8, 4].
    """

    path: str
    names: tuple[str, ...]
    file_shape: tuple[int, ...]
    file_dims: tuple[int, ...]
    to_ours: tuple[int, ...]
    stacked: bool


def _weights(
    state: nnx.State, family: ModuleType, *, stored_vocab_size: int | None = None
) -> Iterator[tuple[Weight, nnx.Variable]]:
    """The weights of a state, in the order of the family's table; the files may have another vocabulary size."""
    files = {} if stored_vocab_size is None else {"v": stored_vocab_size}
    leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))[0]
    variables = {".".join(str(key.key) for key in path): variable for path, variable in leaves}
    assert variables.keys() <= family.WEIGHTS.keys(), variables.keys() - family.WEIGHTS.keys()
    for path, (name, layout) in family.WEIGHTS.items():
        if path in variables:
            yield _join(path, variables[path], name, layout, files), variables[path]


def _join(path: str, variable: nnx.Variable, name: str, layout: str, files: dict[str, int]) -> Weight:
    axes = variable.get_metadata("axes").split()
    sizes = dict(zip(axes, variable.shape, strict=True)) | files
    stacked = "{l}" in name
    letters = layout.replace("(", " ").replace(")", " ").split()
    dims = axes[1:] if stacked else axes
    assert sorted(letters) == sorted(dims), (path, axes, layout)
    # "(n h) d" -> [["n", "h"], ["d"]]
    groups = [group.split() for part in layout.split("(") for group in _groups(part)]
    return Weight(
        path=path,
        names=tuple(name.format(l=layer) for layer in range(sizes["l"])) if stacked else (name,),
        file_shape=tuple(math.prod(sizes[letter] for letter in group) for group in groups),
        file_dims=tuple(sizes[letter] for letter in letters),
        to_ours=tuple(letters.index(letter) for letter in dims),
        stacked=stacked,
    )


def _groups(part: str) -> list[str]:
    """Of a layout split at "(": the group that ends at ")", if one does, and each letter after it."""
    group, closed, rest = part.rpartition(")")
    return [group] * bool(closed) + rest.split()


# Import.


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


def check_weights(
    folder: pathlib.Path, family: ModuleType, abstract: nnx.State, *, stored_vocab_size: int | None = None
) -> dict[str, StoredTensor]:
    """Reads the headers of the folder's safetensors and compares them with the weights of a model.

    An `lm_head` beside tied embeddings and the rotary frequencies that old exports carry are passed over, as
    transformers does.

    Args:
        abstract: the model's state; only shapes and axes are looked at.
        stored_vocab_size: rows of the vocabulary in the files, where the model has more.

    Returns:
        Where each tensor lies, by name.

    Raises:
        ConfigError: every unreadable file and every missing, extra or misshapen tensor, in one report.
    """
    problems: list[str] = []
    stored = _read_headers(folder, problems)
    # With a file unreadable, its tensors would all be reported missing, which they may not be.
    complete = not problems
    extra = dict(stored)
    for weight, _ in _weights(abstract, family, stored_vocab_size=stored_vocab_size):
        for name in weight.names:
            tensor = extra.pop(name, None)
            if tensor is None:
                if complete:
                    problems.append(f"{folder}: {name} is missing, expected with shape {list(weight.file_shape)}")
            elif tensor.shape != weight.file_shape:
                given, expected = list(tensor.shape), list(weight.file_shape)
                problems.append(f"{tensor.file}: {name} has shape {given}, but config.json asks for {expected}")
    tied = "lm_head" not in abstract
    for name, tensor in extra.items():
        if not (name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")):
            problems.append(f"{tensor.file}: {name} {list(tensor.shape)} is extra, no weight that config.json asks for")
    if problems:
        raise ConfigError(_report("the model's weights do not fit its config.json:", problems))
    return stored


def load_params(
    folder: pathlib.Path,
    family: ModuleType,
    *,
    abstract: nnx.State,
    shardings: nnx.State,
    stored_vocab_size: int | None = None,
    mean_rows: Sequence[int] = (),
) -> nnx.State:
    """Reads the weights of a model, each device's shard by itself, cast to the dtypes of `abstract`.

    Args:
        folder: a folder with safetensors.
        family: the module of the model's family.
        abstract: the state to fill: Variables of jax.ShapeDtypeStruct, with axes.
        shardings: the same tree of shardings (`mesh.shardings`).
        stored_vocab_size: rows of the vocabulary in the files, where the model has more. Those that the files lack
            begin as the mean of those that they have, in the embedding and in the unembedding, on any mesh the same.
        mean_rows: rows of the files that begin as that mean too.

    Returns:
        A state like `abstract`, of jax.Arrays.

    Raises:
        ConfigError: as `check_weights`.
    """
    stored = check_weights(folder, family, abstract, stored_vocab_size=stored_vocab_size)
    weights = {weight.path: weight for weight, _ in _weights(abstract, family, stored_vocab_size=stored_vocab_size)}

    def load(path: Any, variable: nnx.Variable, sharding: nnx.Variable) -> nnx.Variable:
        weight = weights[".".join(str(key.key) for key in path)]
        tensors = [stored[name] for name in weight.names]
        is_vocabulary = variable.get_metadata("axes").startswith("v ")
        shards: dict[Any, np.ndarray] = {}

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            # Devices that hold copies of one shard share one read.
            bounds = tuple(each.indices(size)[:2] for each, size in zip(index, variable.shape, strict=True))
            if bounds not in shards and is_vocabulary:
                shards[bounds] = _read_rows(weight, tensors[0], bounds, mean_rows, np.dtype(variable.dtype))
            elif bounds not in shards:
                shards[bounds] = _read_shard(weight, tensors, index, np.dtype(variable.dtype))
            return shards[bounds]

        return variable.replace(jax.make_array_from_callback(variable.shape, sharding.get_value(), shard))

    return jax.tree_util.tree_map_with_path(
        load, abstract, shardings, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def _read_shard(weight: Weight, tensors: list[StoredTensor], index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """The slice `index` (in our dims, `l` included) of a weight, from the tensors of its layers."""
    if not weight.stacked:
        return np.array(read_slice(weight, tensors[0], index), dtype, order="C")
    layers = [read_slice(weight, tensor, index[1:]) for tensor in tensors[index[0]]]
    shard = np.empty((len(layers), *layers[0].shape), dtype)
    for out, layer in zip(shard, layers, strict=True):
        out[...] = layer
    return shard


def _read_rows(
    weight: Weight,
    tensor: StoredTensor,
    bounds: Sequence[tuple[int, int]],
    mean_rows: Sequence[int],
    dtype: np.dtype,
) -> np.ndarray:
    """A slice of a table [V, D]; rows of `mean_rows`, and those beyond the file's, are the mean of all its rows."""
    (first, last), columns = bounds
    stored = weight.file_shape[0]
    shard = np.empty((last - first, columns[1] - columns[0]), dtype)
    held = read_slice(weight, tensor, (slice(first, min(last, stored)), slice(*columns)))
    shard[: len(held)] = held
    new = [row - first for row in {*mean_rows, *range(max(first, stored), last)} if first <= row < last]
    if new:
        shard[new] = _row_mean(read_slice(weight, tensor, (slice(None), slice(*columns)))).astype(dtype)
    return shard


def _row_mean(table: np.ndarray, *, chunk: int = 128) -> np.ndarray:
    """float64 mean of the rows of a table [V, D], a few rows in memory at a time.

    Whole rows are added to each other and never along one, so that a column's mean is the same to the bit whichever
    columns stand beside it; numpy's sum promises no order.
    """
    total = np.zeros(table.shape[1], np.float64)
    for at in range(0, len(table), chunk):
        rows = table[at : at + chunk].astype(np.float64)
        while len(rows) > 1:
            half = len(rows) // 2
            rows[:half] += rows[half : 2 * half]
            rows = np.delete(rows, slice(half, 2 * half), axis=0) if len(rows) % 2 else rows[:half]
        total += rows[0]
    return total / len(table)


def vocabulary_tables(folder: pathlib.Path, family: ModuleType, abstract: nnx.State) -> dict[str, np.ndarray]:
    """The embedding and, if it is another tensor, the unembedding, by tensor name: memory maps [V, D], not yet read.

    Raises:
        ConfigError: unreadable files.
    """
    problems: list[str] = []
    stored = _read_headers(folder, problems)
    if problems:
        raise ConfigError(_report("the model's weights:", problems))
    tables: dict[str, np.ndarray] = {}
    for weight, variable in _weights(abstract, family):
        (name, *_) = weight.names
        if variable.get_metadata("axes") == "v d":
            tensor = stored[name]
            tables[name] = np.memmap(tensor.file, tensor.dtype, mode="r", offset=tensor.offset, shape=tensor.shape)
    return tables


def read_slice(weight: Weight, tensor: StoredTensor, index: tuple[slice, ...]) -> np.ndarray:
    """A view of a slice (in our dims, without `l`) of one tensor; only the pages under it are ever read."""
    view = np.memmap(tensor.file, tensor.dtype, mode="r", offset=tensor.offset, shape=weight.file_dims)
    return view.transpose(weight.to_ours)[index]


def _read_headers(folder: pathlib.Path, problems: list[str]) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors; what cannot be read is added to `problems`."""
    if (folder / SINGLE_FILE).exists():
        return _read_header(folder / SINGLE_FILE, problems)
    if not (folder / INDEX_FILE).exists():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = f" ({', '.join(pickles[:3])}: pickled weights are not read)" if pickles else ""
        problems.append(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
        return {}
    places = load_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        problems.append(f"{folder / INDEX_FILE}: weight_map is not a mapping of tensor names to files")
        return {}
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(places.values())):
        if pathlib.PurePath(file_name).name != file_name:
            problems.append(f"{folder / INDEX_FILE}: names {file_name!r}, which is not a file of this folder")
            continue
        found = _read_header(folder / file_name, problems)
        expected = {name for name, place in places.items() if place == file_name}
        if found and (absent := sorted(expected - found.keys())):
            problems.append(f"{folder / file_name}: lacks {', '.join(absent)}, which {INDEX_FILE} places there")
        tensors.update(found)
    return tensors


def _read_header(path: pathlib.Path, problems: list[str]) -> dict[str, StoredTensor]:
    """The tensors of one file: 8 bytes of header length, the header in JSON, then the bytes of the tensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start.startswith(b"version "):
                raise ValueError("a Git LFS pointer, not the file itself (run `git lfs pull`)")
            if size < 8 or length > size - 8:
                raise ValueError("truncated, or not a safetensors file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name} has dtype {entry['dtype']}; read are {', '.join(DTYPES)}")
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if 8 + length + end > size:
                raise ValueError(f"truncated: {size} bytes, but {name} ends at byte {8 + length + end}")
            if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"corrupt header: {name} {list(shape)} has {end - begin} bytes")
            tensors[name] = StoredTensor(path, dtype, shape, 8 + length + begin)
        return tensors
    except FileNotFoundError:
        problems.append(f"{path}: no such file")
    except (OSError, ValueError) as error:
        problems.append(f"{path}: {error}")
    except (KeyError, TypeError, AttributeError):
        problems.append(f"{path}: corrupt header")
    return {}


def _report(title: str, problems: list[str], shown: int = 30) -> str:
    more = [f"... and {len(problems) - shown} more"] if len(problems) > shown else []
    return "\n  ".join([title, *problems[:shown], *more])


# Export.


def write_weights(
    folder: pathlib.Path,
    params: nnx.State,
    family: ModuleType,
    dtype: np.dtype,
    *,
    max_shard_bytes: int,
    writes: bool,
) -> None:
    """Writes the safetensors files, and an index if there is more than one, as transformers' save_pretrained would."""
    sources = {
        name: (weight, variable, layer)
        for weight, variable in _weights(params, family)
        for layer, name in enumerate(weight.names)
    }
    sizes = {name: math.prod(sources[name][0].file_shape) * dtype.itemsize for name in sorted(sources)}
    shards = _shards(sizes, max_shard_bytes)
    places = {}
    for number, names in enumerate(shards, start=1):
        file_name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places.update(dict.fromkeys(names, file_name))
        with (folder / file_name).open("wb") if writes else contextlib.nullcontext() as file:
            if file:
                file.write(_header({name: sources[name][0].file_shape for name in names}, dtype))
            for name in names:
                value = _gather(*sources[name], dtype)
                if file:
                    file.write(value.reshape(-1).view(np.uint8).data)
    if writes and len(shards) > 1:
        parameters = sum(sizes.values()) // dtype.itemsize
        metadata = {"total_parameters": parameters, "total_size": sum(sizes.values())}
        dump_json(folder / INDEX_FILE, {"metadata": metadata, "weight_map": places})


def _shards(sizes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names in files, filled in order; a tensor larger than `max_shard_bytes` has a file to itself.

    The order of the files is that of huggingface_hub's split_torch_state_dict_into_shards.
    """
    shards: list[list[str]] = []
    current: list[str] = []
    for name, size in sizes.items():
        if size > max_shard_bytes:
            shards.append([name])
            continue
        if sum(sizes[each] for each in current) + size > max_shard_bytes:
            shards.append(current)
            current = []
        current.append(name)
    return shards + [current] * bool(current)


def _header(shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
    """The first bytes of a safetensors file, exactly as the safetensors library writes them."""
    word = next(word for word, each in DTYPES.items() if each == dtype)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": word, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _gather(weight: Weight, variable: nnx.Variable, layer: int, dtype: np.dtype) -> np.ndarray:
    """One whole tensor in its file layout, on every process."""
    value = variable.get_value()
    if weight.stacked:
        value = jax.lax.dynamic_index_in_dim(value, layer, keepdims=False)
    value = value.astype(dtype)
    whole = np.asarray(value if value.is_fully_addressable else multihost_utils.process_allgather(value, tiled=True))
    return np.ascontiguousarray(whole.transpose(np.argsort(weight.to_ours)))


# JSON files.


def load_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def dump_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
