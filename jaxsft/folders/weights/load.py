"""Weights from files onto a mesh: each device's part of each tensor is read, cast and put where it belongs.

In: a `Stored` (`stored.py`) that fits the model (`check.py`), and the abstract state of a `Decoder` with its shardings.
Out: the state with values, each process reading only the bytes that its devices hold. A tensor is read in blocks that
are cast and transposed while they are in the processor's cache, straight into the arrays that the devices get, so that
a process holds little more than these.
"""

import concurrent.futures
import itertools
import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from jaxsft.config import ConfigError
from jaxsft.folders.weights.check import check_weights, report
from jaxsft.folders.weights.copying import copy, is_finite
from jaxsft.folders.weights.layout import Box, Factor, Weight, join, path_text, variables_of, whole_weights
from jaxsft.folders.weights.quantizing import quantized_arrays
from jaxsft.folders.weights.stored import BLOCK_BYTES, PAGE_BYTES, Stored, StoredTensor
from jaxsft.mesh import partition_spec

MAX_THREADS = 32


def load_params(
    stored: Stored,
    family: ModuleType,
    *,
    abstract: nnx.State,
    shardings: nnx.State,
    vocab_size: int,
    stored_vocab_size: int | None = None,
    mean_rows: Sequence[int] = (),
    untied: bool = False,
    only: Callable[[Any], Any] = lambda state: state,
) -> nnx.State:
    """Reads the weights of a model, each device's shard by itself, cast to the dtypes of `abstract`.

    Args:
        stored: what the model's folder holds.
        family: the module of the model's family.
        abstract: the state of all weights: Variables of jax.ShapeDtypeStruct, with axes.
        shardings: the same tree of shardings (`mesh.shardings`).
        vocab_size: rows of the vocabulary that are tokens; the rows behind them are zeros.
        stored_vocab_size: rows of the vocabulary in the files, where the model has more. Those that the files lack
            begin as the mean of those that they have, in the embedding and in the unembedding, on any mesh the same.
        mean_rows: rows of the files that begin as that mean too.
        untied: an output projection that the files lack begins as the embedding.
        only: the part of the state that is wanted; no other tensors are read.

    Returns:
        A state like that part of `abstract`, of jax.Arrays.

    Raises:
        ConfigError: as `check_weights`; or the tensors that hold a number that is not finite, all in one report. Each
            process looks at what it reads, and all of them fail together.
    """
    in_files = vocab_size if stored_vocab_size is None else stored_vocab_size
    check_weights(stored, family, abstract, vocab_size=in_files, untied=untied)
    weights = join(abstract, family, vocab_size=in_files, stored=stored.tensors, untied=untied)
    new_rows = sorted({*mean_rows, *range(in_files, vocab_size)})
    places = {path: place.get_value() for path, place in variables_of(shardings).items()}
    wanted = only(abstract)
    parts = variables_of(wanted)
    weights = {path: weights[path] for path in weights if path in whole_weights(parts)}
    arrays: dict[str, jax.Array] = {}
    problems: dict[str, str] = {}

    def finish(read: _Read) -> None:
        _note(read.futures, problems)
        if "v" in read.weight.axes:
            table = stored.tensors[read.weight.name(())]
            _fill_vocabulary(table, read.shards, new_rows, stored=in_files, vocab_size=vocab_size)
        arrays[read.weight.path] = _on_devices(read, places[read.weight.path])

    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS)) as threads:
        # While one weight is read, the one before goes to the devices.
        before: _Read | None = None
        for path, (weight, variable) in weights.items():
            if path not in parts:
                mesh = places[f"{path}.codes"].mesh

                def layer_of(layer: int, weight: Weight = weight, mesh: Mesh = mesh) -> jax.Array:
                    return _read_layer(threads, weight, layer, problems, mesh=mesh, tensors=stored.tensors)

                arrays |= quantized_arrays(weight, parts, places, layer_of, tensors=stored.tensors)
                continue
            read = _begin(threads, weight, variable, sharding=places[path], tensors=stored.tensors)
            if before is not None:
                finish(before)
            before = read
        if before is not None:
            finish(before)

    _refuse(list(problems.values()))
    return jax.tree_util.tree_map_with_path(
        lambda path, variable: variable.replace(arrays[path_text(path)]),
        wanted,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def _note(futures: list[concurrent.futures.Future], problems: dict[str, str]) -> None:
    """Waits until all is read, and notes of each tensor the first number that is not finite."""
    for future in futures:
        if found := future.result():
            problems.setdefault(*found)


def _refuse(problems: list[str]) -> None:
    """Raises the problems on every process, if any process has found some."""
    elsewhere = 0
    if jax.process_count() > 1:
        counts = multihost_utils.process_allgather(np.array(len(problems), np.int32))
        elsewhere = int(np.count_nonzero(counts)) - bool(problems)
    if elsewhere:
        problems = [*problems, f"{elsewhere} other processes have found such tensors in what they read"]
    if problems:
        raise ConfigError(
            report("the model's weights hold numbers that are not finite, from which nothing can be learnt:", problems)
        )


class _Read(NamedTuple):
    """A weight that is being read."""

    weight: Weight
    variable: nnx.Variable
    shards: dict[Box, np.ndarray]
    """The arrays to fill, by their bounds in the weight; devices that hold the same part share one."""
    futures: list[concurrent.futures.Future]


def _begin(
    threads: concurrent.futures.ThreadPoolExecutor,
    weight: Weight,
    variable: nnx.Variable,
    *,
    sharding: jax.sharding.Sharding,
    tensors: dict[str, StoredTensor],
) -> _Read:
    """Gives the threads all that there is to read of a weight."""
    shards = {
        bounds: _empty([last - first for first, last in bounds], np.dtype(variable.dtype))
        for bounds in _bounds(sharding, variable.shape)
    }
    futures = [threads.submit(_fill_finite, weight, *task) for task in _tasks(weight, tensors, shards)]
    return _Read(weight, variable, shards, futures)


def _on_devices(read: _Read, sharding: jax.sharding.Sharding) -> jax.Array:
    """The array of a weight, once all its shards are read."""
    shape = read.variable.shape
    array = jax.make_array_from_callback(shape, sharding, lambda index: read.shards[_as_bounds(index, shape)])
    # Waits until the devices have copied the shards, which would pile up otherwise.
    return jax.block_until_ready(array)


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Memory for a shard, in pages of its own: on CPU, JAX takes over such an array as it is, and would copy others.

    Private, as the pages of shared memory take longer to get.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    return np.frombuffer(mmap.mmap(-1, max(num_bytes, 1), mmap.MAP_PRIVATE), dtype, math.prod(shape)).reshape(shape)


def _bounds(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> set[Box]:
    """The bounds of every shard that a device of this process holds."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    return {_as_bounds(index, shape) for index in indices}


def _as_bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Box:
    assert index is not None
    return tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))


class Target(NamedTuple):
    """A part of a tensor, and the array that it goes to."""

    box: Box
    """Bounds of the part, factor by factor."""
    out: np.ndarray
    """With a dim for each factor, in the order of the file."""


def _tasks(
    weight: Weight, tensors: dict[str, StoredTensor], shards: dict[Box, np.ndarray]
) -> Iterator[tuple[str, StoredTensor, Box, list[Target]]]:
    """What to read in one go: a block of a tensor that lies together in the file, and where it goes."""
    split, stored = weight.split, weight.shape[weight.split :]
    for index in weight.indices():
        name = weight.name(index)
        tensor = tensors[name]
        targets = []
        for bounds, shard in shards.items():
            outer, inner = bounds[:split], bounds[split:]
            # The vocabulary of the files may end before that of the model.
            inner = tuple((first, min(last, size)) for (first, last), size in zip(inner, stored, strict=True))
            holds = all(first <= at < last for at, (first, last) in zip(index, outer, strict=True))
            if holds and all(first < last for first, last in inner):
                part = shard[tuple(at - first for at, (first, _) in zip(index, outer, strict=True))]
                part = part[tuple(slice(0, last - first) for first, last in inner)]
                targets.append(Target(weight.in_file(inner), weight.file_order(part)))
        itemsize = 4 if tensor.dtype is None else tensor.dtype.itemsize
        for region in _regions([target.box for target in targets]):
            for block in _blocks(weight, region, itemsize):
                yield name, tensor, block, targets


def _regions(boxes: list[Box]) -> Iterator[Box]:
    """Boxes that cover others, such as the shards of the devices of a process, joined where they touch.

    ((0, 2), (0, 4)) and ((2, 4), (0, 4)) are ((0, 4), (0, 4)).
    """
    runs: list[list[tuple[int, int]]] = []
    for ranges in zip(*boxes, strict=True):
        joined: list[tuple[int, int]] = []
        for first, last in sorted(set(ranges)):
            if joined and first <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
            else:
                joined.append((first, last))
        runs.append(joined)
    for region in itertools.product(*runs) if boxes else ():
        if any(all(a < d and c < b for (a, b), (c, d) in zip(region, box, strict=True)) for box in boxes):
            yield region


def _blocks(weight: Weight, region: Box, itemsize: int) -> Iterator[Box]:
    """Cuts a region into blocks whose rows follow each other in the file, of about BLOCK_BYTES."""
    num_rows = len(weight.factors) - len(weight.dims[-1])
    factors, columns = weight.factors[:num_rows], region[num_rows:]
    if not factors:
        yield region
        return
    first, last, _ = _span(weight.dims[-1], columns)
    # Where few columns are wanted, whole rows are read (`stored.SafeTensor.read`).
    width = last - first if (last - first) * itemsize >= PAGE_BYTES else math.prod(f.size for f in weight.dims[-1])
    most = max(1, BLOCK_BYTES // (width * itemsize))
    # The last factor of which only a part is wanted: its indices, and those of factors before it, lie apart in the
    # file.
    cut = max([at for at in range(num_rows) if region[at] != (0, factors[at].size)], default=0)
    while cut < num_rows - 1 and math.prod(factor.size for factor in factors[cut + 1 :]) > most:
        cut += 1
    step = max(1, most // math.prod(factor.size for factor in factors[cut + 1 :]))
    begin, end = region[cut]
    for outer in itertools.product(*(range(*bounds) for bounds in region[:cut])):
        singles = tuple((at, at + 1) for at in outer)
        for at in range(begin, end, step):
            yield (*singles, (at, min(at + step, end)), *region[cut + 1 : num_rows], *columns)


def _span(factors: Sequence[Factor], box: Box) -> tuple[int, int, int]:
    """First and last + 1 of the indices of a flattened dim that hold a box of it, and the factor that they cut.

    Of the factors (2, 3, 4) the box ((1, 2), (0, 2), (1, 4)) lies in 12 to 20, which cuts factor 1.
    """
    begin, inner = 0, math.prod(factor.size for factor in factors)
    for at, (factor, (first, last)) in enumerate(zip(factors, box, strict=True)):
        inner //= factor.size
        if last - first > 1 or at == len(factors) - 1:
            return begin + first * inner, begin + last * inner, at
        begin += first * inner
    raise AssertionError(factors)


def _fill_finite(
    weight: Weight, name: str, tensor: StoredTensor, block: Box, targets: list[Target]
) -> tuple[str, str] | None:
    """Reads a block and puts it where it goes, cast; the tensor's name and a sentence if it holds what is no number."""
    values, row, column = _fill(weight, tensor, block, targets)
    if is_finite(values):
        return None
    at = np.argwhere(~np.isfinite(values.astype(np.float32)))[0]
    value = float(values[tuple(at)])
    index = np.unravel_index(row + int(at[0]), tensor.shape[:-1]) if len(tensor.shape) > 1 else ()
    place = [*map(int, index), column + int(at[1])]
    return name, f"{tensor.file}: {name} {list(tensor.shape)} holds {value} at {place}"


def _fill(weight: Weight, tensor: StoredTensor, block: Box, targets: list[Target]) -> tuple[np.ndarray, int, int]:
    """Reads a block and puts it where it goes, cast; what was read, its first row and its first column."""
    num_rows = len(weight.factors) - len(weight.dims[-1])
    sizes = [last - first for first, last in block]
    row = 0
    for factor, (first, _) in zip(weight.factors[:num_rows], block, strict=False):
        row = row * factor.size + first
    begin, end, cut = _span(weight.dims[-1], block[num_rows:])
    read = tensor.read(slice(row, row + math.prod(sizes[:num_rows])), slice(begin, end))
    inner = [factor.size for factor in weight.dims[-1]][cut + 1 :]
    data = read.reshape(*sizes[: num_rows + cut + 1], *inner)
    if inner:
        outer = (slice(None),) * (num_rows + cut + 1)
        data = data[outer + tuple(slice(*bounds) for bounds in block[num_rows + cut + 1 :])]
    for box, out in targets:
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(block, box, strict=True)]
        if all(first < last for first, last in common):
            source = data[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, block, strict=True))]
            place = out[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, box, strict=True))]
            copy(place, source, num_rows)
    return read, row, begin


# One layer of a weight, to be quantised.


def _read_layer(
    threads: concurrent.futures.ThreadPoolExecutor,
    weight: Weight,
    layer: int,
    problems: dict[str, str],
    *,
    mesh: Mesh,
    tensors: dict[str, StoredTensor],
) -> jax.Array:
    """One layer of a weight as files have it, float32 [1, ...], cut over the mesh as it would be if it stayed so."""
    shape = (1, *weight.shape[1:])
    place = NamedSharding(mesh, partition_spec(" ".join(weight.axes)))
    shards = {
        ((layer, layer + 1), *bounds[1:]): _empty([last - first for first, last in bounds], np.dtype(np.float32))
        for bounds in _bounds(place, shape)
    }
    _note([threads.submit(_fill_finite, weight, *task) for task in _tasks(weight, tensors, shards)], problems)
    array = jax.make_array_from_callback(
        shape, place, lambda index: shards[((layer, layer + 1), *_as_bounds(index, shape)[1:])]
    )
    return jax.block_until_ready(array)


# Rows of the vocabulary that the files do not have.


def _fill_vocabulary(
    table: StoredTensor, shards: dict[Box, np.ndarray], new_rows: Sequence[int], *, stored: int, vocab_size: int
) -> None:
    """New tokens begin as the mean of the `stored` rows of a table [V, D]; rows from `vocab_size` on are zeros."""
    means: dict[tuple[int, int], np.ndarray] = {}
    for ((first, last), columns), shard in shards.items():
        if last > vocab_size:
            shard[max(vocab_size - first, 0) :] = 0
        if new := [row - first for row in new_rows if first <= row < last]:
            if columns not in means:
                means[columns] = _row_mean(table, slice(0, stored), slice(*columns))
            shard[new] = means[columns].astype(shard.dtype)


def _row_mean(table: StoredTensor, rows: slice, columns: slice, *, chunk: int = 128) -> np.ndarray:
    """float64 mean of some rows of a table [V, D], a few rows in memory at a time.

    Whole rows are added to each other and never along one, so that a column's mean is the same to the bit whichever
    columns stand beside it; numpy's sum promises no order.
    """
    total = np.zeros(columns.stop - columns.start, np.float64)
    for at in range(rows.start, rows.stop, chunk):
        part = table.read(slice(at, min(at + chunk, rows.stop)), columns).astype(np.float64)
        while len(part) > 1:
            half = len(part) // 2
            part[:half] += part[half : 2 * half]
            part = np.delete(part, slice(half, 2 * half), axis=0) if len(part) % 2 else part[:half]
        total += part[0]
    return total / (rows.stop - rows.start)
