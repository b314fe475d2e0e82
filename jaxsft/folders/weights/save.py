"""Weights from a mesh into safetensors: the tensors, dtypes and files that they came from, or those of transformers.

In: the state of a `Decoder`, and the `Stored` that it was read from, if it was. Out: files that are equal to the byte
where nothing was trained. Files are shared out among the processes by their numbers. Each tensor is put together from
the weights that lie in it and written while the next is gathered, so that only a few are ever in host memory.
"""

import contextlib
import itertools
import json
import math
import pathlib
import struct
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxsft.config import ConfigError
from jaxsft.disk.seal import Entry
from jaxsft.folders.weights.beside import FileBeside, file_beside
from jaxsft.folders.weights.copying import copy
from jaxsft.folders.weights.layout import Weight, is_quantized, join
from jaxsft.folders.weights.stored import DTYPES, INDEX_FILE, SINGLE_FILE, SafeTensor, Stored, StoredTensor
from jaxsft.folders.weights.together import Part, put_together, refuse_overflow
from jaxsft.model.adapter import Frozen

COPY_BYTES = 1 << 24


class Made(NamedTuple):
    """Other values of a tensor than those of the state that is written."""

    make: Callable[[bool], np.ndarray | None]
    """Called on every process with whether it is the one that writes, which is given them, in the file's shape."""
    is_stored: bool
    """They are those that the model was read from."""


class Tensor(NamedTuple):
    """A tensor to be written."""

    word: str
    """Its dtype, as safetensors calls it."""
    shape: tuple[int, ...]
    source: tuple[Part, ...] | SafeTensor
    """What it is put together from; a tensor that is no weight of the model is copied."""
    made: Made | None = None
    """Its values, where they are not those of `source`."""

    @property
    def num_bytes(self) -> int:
        if isinstance(self.source, SafeTensor):
            return self.source.num_bytes
        return math.prod(self.shape) * DTYPES[self.word].itemsize


class File(NamedTuple):
    """A file to be written."""

    name: str
    tensors: dict[str, Tensor]
    """By name, in the order of the file."""
    header: bytes


def write_weights(
    folder: pathlib.Path,
    params: nnx.State,
    family: ModuleType,
    *,
    vocab_size: int,
    dtype: np.dtype | None,
    stored: Stored | None = None,
    max_shard_bytes: int,
    merge: Mapping[str, Made] | None = None,
    has_new_rows: bool = False,
) -> dict[str, Entry | None]:
    """Writes the safetensors files, and an index if there is more than one.

    Every process must call this: of N, process k writes files k, k + N, ..., and helps the others to gather theirs.

    Args:
        folder: where to.
        params: the state of the model, Variables with axes.
        family: the module of its family.
        vocab_size: rows of the vocabulary that are written.
        dtype: of all tensors; left out: as `stored`.
        stored: what the model was read from: names, dtypes, and what lies in which file are the same again. Left out,
            or not of safetensors: files such as transformers' save_pretrained writes.
        max_shard_bytes: largest file, where `stored` does not say what lies where.
        merge: by the names of all tensors of the model, their values in place of those of `params`.
        has_new_rows: the tables of `params` have rows that `stored` has otherwise, also where they are not trained.

    Returns:
        the files by name, as a seal has them; None where another process has written it.

    Raises:
        OSError, ConfigError: a file of this process could not be written; it has helped the others with theirs.
    """
    known = stored.tensors if stored else {}

    def original(weight: Weight, variable: nnx.Variable, name: str) -> StoredTensor | None:
        # What is not trained lies in memory in the dtype of the matmuls, or quantised.
        is_as_stored = isinstance(variable, Frozen) and not (has_new_rows and "v" in weight.axes)
        return known.get(name) if is_as_stored or is_quantized(variable) else None

    tensors = _tensors(params, family, vocab_size=vocab_size, dtype=dtype, known=known, original=original)
    if stored is not None and stored.files:
        _add_passed_over(tensors, family, stored)
    if merge is not None:
        tensors = {name: _merged(tensor, name, merge, stored) for name, tensor in tensors.items()}
    if stored is not None and stored.files:
        files = _files_as_stored(tensors, stored)
    else:
        files = _files_of_transformers({name: tensors[name] for name in sorted(tensors)}, max_shard_bytes)
    written: dict[str, Entry | None] = dict.fromkeys(file.name for file in files)
    this, count = jax.process_index(), jax.process_count()
    failed: OSError | ConfigError | None = None
    for at in range(0, len(files), count):
        together = files[at : at + count]
        mine = together[this] if this < len(together) else None
        try:
            with file_beside(folder / mine.name) if mine else contextlib.nullcontext() as out:
                if mine and out:
                    out.write(np.frombuffer(mine.header, np.uint8))
                # All gather the first tensor of each file, then the second, so that all disks have something to do.
                for each in itertools.zip_longest(*(file.tensors.values() for file in together)):
                    for process, tensor in enumerate(each):
                        if tensor is None:
                            continue
                        try:
                            _write(out if process == this and failed is None else None, tensor)
                        except (OSError, ConfigError) as error:
                            if count == 1:
                                raise
                            failed = failed or error
            if mine and out:
                written[mine.name] = out.entry
        except OSError as error:  # The file was not written, and is closed.
            if count == 1:
                raise
            failed = failed or error
    if failed is not None:
        raise failed
    if this == 0 and (index := _index(files, tensors, stored)):
        (folder / INDEX_FILE).write_bytes(index)
    return written


def _tensors(
    params: nnx.State,
    family: ModuleType,
    *,
    vocab_size: int,
    dtype: np.dtype | None,
    known: Mapping[str, StoredTensor],
    original: Callable[[Weight, nnx.Variable, str], StoredTensor | None],
) -> dict[str, Tensor]:
    """Every tensor of the model by name."""
    parts: dict[str, list[Part]] = {}
    for weight, variable in join(params, family, vocab_size=vocab_size, stored=known).values():
        for index in weight.indices():
            name = weight.name(index)
            parts.setdefault(name, []).append(Part(weight, variable, index, original(weight, variable, name)))
    # The only tensor that the files may lack is an output projection that was tied to the embedding.
    tables = [known[name] for name, (part, *_) in parts.items() if part.weight.axes == ("v", "d") and name in known]
    tensors = {}
    for name, each in parts.items():
        into = dtype or (known[name] if name in known else tables[0]).dtype
        assert into is not None, name
        word = next(word for word, each in DTYPES.items() if each == into)
        tensors[name] = Tensor(word, each[0].weight.file_shape, tuple(each))
    return tensors


def _add_passed_over(tensors: dict[str, Tensor], family: ModuleType, stored: Stored) -> None:
    """Adds stored tensors that are no weights of ours: an output projection tied to the embedding, buffers of torch."""
    head = family.WEIGHTS["lm_head.weight"][0]
    embedding = next(
        tensor
        for tensor in tensors.values()
        if not isinstance(tensor.source, SafeTensor) and tensor.source[0].weight.path == "embed_tokens.weight"
    )
    for name, tensor in stored.tensors.items():
        if name not in tensors and isinstance(tensor, SafeTensor):
            tensors[name] = embedding if name == head else Tensor(tensor.word, tensor.shape, tensor)


# What lies in which file.


def _files_as_stored(tensors: dict[str, Tensor], stored: Stored) -> list[File]:
    """The files that the model came in; a tensor that it did not have goes into the last."""
    held = {name for file in stored.files for name in file.names}
    new = tuple(name for name in tensors if name not in held)
    files = []
    for at, was in enumerate(stored.files):
        names = was.names + (new if at == len(stored.files) - 1 else ())
        inside = {name: tensors[name] for name in names}
        is_same = names == was.names and all(_is_like(inside[name], stored, name) for name in names)
        files.append(File(was.name, inside, was.header if is_same else header_of(inside, was.metadata)))
    return files


def _is_like(tensor: Tensor, stored: Stored, name: str) -> bool:
    was = stored.tensors[name]
    return isinstance(was, SafeTensor) and (was.word, was.shape) == (tensor.word, tensor.shape)


def _files_of_transformers(tensors: dict[str, Tensor], max_shard_bytes: int) -> list[File]:
    """Names in files, filled in order; a tensor larger than `max_shard_bytes` has a file to itself.

    The order of the files is that of huggingface_hub's split_torch_state_dict_into_shards.
    """
    shards: list[list[str]] = []
    current: list[str] = []
    for name, tensor in tensors.items():
        if tensor.num_bytes > max_shard_bytes:
            shards.append([name])
            continue
        if sum(tensors[each].num_bytes for each in current) + tensor.num_bytes > max_shard_bytes:
            shards.append(current)
            current = []
        current.append(name)
    shards += [current] * bool(current)
    files = []
    for number, names in enumerate(shards, start=1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        inside = {each: tensors[each] for each in names}
        files.append(File(name, inside, header_of(inside, {"format": "pt"})))
    return files


def header_of(tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> bytes:
    """The first bytes of a safetensors file, exactly as the safetensors library writes them."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.num_bytes
        entries[name] = {"dtype": tensor.word, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _index(files: Sequence[File], tensors: dict[str, Tensor], stored: Stored | None) -> bytes | None:
    """The index file; nothing where there is one file and there was no index before."""
    was = stored.index_file if stored else None
    if was is None and len(files) == 1:
        return None
    places = {name: file.name for file in files for name in file.tensors}
    total_size = sum(tensor.num_bytes for tensor in tensors.values())
    num_parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    if stored is None or was is None:
        metadata = {"total_parameters": num_parameters, "total_size": total_size}
        return dump_json({"metadata": metadata, "weight_map": dict(sorted(places.items()))})
    if all(name in stored.tensors and _is_like(tensors[name], stored, name) for name in places):
        return was
    index = json.loads(was)
    known = index.get("metadata")
    metadata = {**(known if isinstance(known, dict) else {}), "total_size": total_size}
    if isinstance(metadata.get("total_parameters"), int):
        before = sum(math.prod(tensor.shape) for tensor in stored.tensors.values())
        metadata["total_parameters"] += num_parameters - before
    weight_map = {name: places[name] for name in [*index["weight_map"], *places] if name in places}
    return dump_json({**index, "metadata": metadata, "weight_map": weight_map})


def dump_json(value: dict[str, Any], *, indent: int = 2) -> bytes:
    """A JSON file as transformers lays it out; keys in their order."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()


# The bytes of a tensor.


def _merged(tensor: Tensor, name: str, merge: Mapping[str, Made], stored: Stored | None) -> Tensor:
    """A tensor whose values are others; one that stays as it is stored is copied."""
    if isinstance(tensor.source, SafeTensor):
        return tensor
    # An output projection that is stored beside the embedding that it is tied to has no name of its own there.
    own = name if name in merge else tensor.source[0].weight.name(tensor.source[0].at)
    known = stored.tensors.get(own) if stored is not None and merge[own].is_stored else None
    if isinstance(known, SafeTensor) and (known.word, known.shape) == (tensor.word, tensor.shape):
        return tensor._replace(source=known)
    return tensor._replace(made=merge[own])


def _write(out: FileBeside | None, tensor: Tensor) -> None:
    """Writes a tensor; without a file, it helps other processes to do so."""
    if isinstance(tensor.source, SafeTensor):
        if out:
            for at in range(0, tensor.num_bytes, COPY_BYTES):
                out.write(tensor.source.read_bytes(at, min(COPY_BYTES, tensor.num_bytes - at)))
        return
    if tensor.made is None:
        whole = put_together(tensor.source, DTYPES[tensor.word], keeps=out is not None)
    else:
        whole = _cast(tensor.made.make(out is not None), tensor)
    if out:
        assert whole is not None
        out.write(whole)


def _cast(values: np.ndarray | None, tensor: Tensor) -> np.ndarray | None:
    if values is None:
        return None
    assert values.shape == tensor.shape and not isinstance(tensor.source, SafeTensor)
    whole = np.empty(values.shape, DTYPES[tensor.word])
    copy(whole, values, max(1, values.ndim - 1))
    refuse_overflow(whole, values, tensor.source[0].weight.path)
    return whole
