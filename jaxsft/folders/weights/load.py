"""Weights from files onto a mesh: what is stored compared with what a model needs, and read, each device's part.

In: a `Stored` (`stored.py`), and the abstract state of a `Decoder` with its shardings. Out: the state with values, each
process reading only the bytes that its devices hold. A tensor is read in blocks that are cast and transposed while they
are in the cache, straight into the arrays that the devices get, so that a process holds little more than these.
"""

import concurrent.futures
import fnmatch
import itertools
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from jaxsft.config import ConfigError
from jaxsft.folders.weights.copying import as_bits, copy, is_finite
from jaxsft.folders.weights.layout import Box, Factor, Weight, base_prefix, join, path_text, variables_of
from jaxsft.folders.weights.stored import DTYPES, PAGE_BYTES, SafeTensor, Stored, StoredTensor, open_folder

__all__ = ["Stored", "StoredTensor", "check_weights", "load_params", "open_folder", "vocabulary_tables"]

BLOCK_BYTES = 1 << 24
"""Read at once by a thread."""
MAX_THREADS = 32


# What is stored, against what is needed.


def check_weights(
    stored: Stored,
    family: ModuleType,
    abstract: nnx.State,
    *,
    vocab_size: int,
    untied: bool = False,
) -> None:
    """Compares the tensors that are stored with the weights of a model.

    Args:
        stored: what the model's folder holds.
        family: the module of its family; tensors that match its IGNORED are passed over.
        abstract: the model's state; only shapes and axes are looked at.
        vocab_size: rows of the vocabulary in the files.
        untied: the model's own output projection is read from the embedding where the files have none.

    Raises:
        ConfigError: every unreadable file and every missing, extra or misshapen tensor, and those of other dtypes, in
            one report.
    """
    problems = list(stored.problems)
    extra = dict(stored.tensors)
    for weight, _ in join(abstract, family, vocab_size=vocab_size, stored=extra, untied=untied).values():
        for name in map(weight.name, weight.indices()):
            tensor = stored.tensors.get(name)
            # With a file unreadable, its tensors would all be reported missing, which they may not be.
            if tensor is None and not stored.problems:
                problems.append(f"{stored.path}: {name} is missing, expected with shape {list(weight.file_shape)}")
            if tensor is None or name not in extra:
                continue
            del extra[name]
            if tensor.shape != weight.file_shape:
                expected = list(weight.file_shape)
                shape = list(tensor.shape)
                problems.append(f"{tensor.file}: {name} has shape {shape}, but config.json asks for {expected}")
            if tensor.dtype is None:
                given = tensor.word if isinstance(tensor, SafeTensor) else "unknown"
                problems.append(f"{tensor.file}: {name} has dtype {given}; read are {', '.join(DTYPES)}")
    if "lm_head" not in abstract:
        problems += _check_tied(stored, family, extra)
    patterns = getattr(family, "IGNORED", ())
    for name, tensor in extra.items():
        full = base_prefix(family) + name
        if not any(fnmatch.fnmatch(each, pattern) for each in (name, full) for pattern in patterns):
            problems.append(f"{tensor.file}: {name} {list(tensor.shape)} is extra, no weight that config.json asks for")
    if problems:
        raise ConfigError(_report("the model's weights do not fit its config.json:", list(dict.fromkeys(problems))))


def _check_tied(stored: Stored, family: ModuleType, extra: dict[str, StoredTensor]) -> list[str]:
    """Takes an output projection out of `extra` that the model does not have, as its embedding is both."""
    name = family.WEIGHTS["lm_head.weight"][0]
    embedding = family.WEIGHTS["embed_tokens.weight"][0]
    table = stored.tensors.get(embedding) or stored.tensors.get(embedding.removeprefix(base_prefix(family)))
    if table is None or name not in extra:
        return []
    head = extra.pop(name)
    if (head.shape, head.dtype) == (table.shape, table.dtype) and _are_equal(head, table):
        return []
    return [
        f"{head.file}: {name} differs from the embedding, but config.json says that they are one (tie_word_embeddings);"
        " set model.tie_embeddings: false to train them apart"
    ]


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    num_rows, columns = math.prod(one.shape[:-1]), slice(0, one.shape[-1])
    step = max(1, BLOCK_BYTES // (4 * one.shape[-1]))
    blocks = (slice(at, min(at + step, num_rows)) for at in range(0, num_rows, step))
    return one.dtype is None or all(
        np.array_equal(as_bits(one.read(rows, columns)), as_bits(other.read(rows, columns))) for rows in blocks
    )


def vocabulary_tables(stored: Stored, family: ModuleType, abstract: nnx.State) -> dict[str, StoredTensor]:
    """The embedding and, if it is another tensor, the unembedding [V, D], by tensor name."""
    weights = [weight for weight, _ in join(abstract, family, vocab_size=1, stored=stored.tensors).values()]
    names = [weight.name(()) for weight in weights if weight.axes == ("v", "d")]
    return {name: stored.tensors[name] for name in names if name in stored.tensors}


def read_rows(table: StoredTensor, ids: Sequence[int]) -> np.ndarray:
    """Some rows of a table."""
    columns = slice(0, table.shape[-1])
    return np.concatenate([table.read(slice(id, id + 1), columns) for id in ids])


def _report(title: str, problems: list[str], shown: int = 30) -> str:
    more = [f"... and {len(problems) - shown} more"] if len(problems) > shown else []
    return "\n  ".join([title, *problems[:shown], *more])


# Reading.


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
) -> nnx.State:
    """Reads the weights of a model, each device's shard by itself, cast to the dtypes of `abstract`.

    Args:
        stored: what the model's folder holds.
        family: the module of the model's family.
        abstract: the state to fill: Variables of jax.ShapeDtypeStruct, with axes.
        shardings: the same tree of shardings (`mesh.shardings`).
        vocab_size: rows of the vocabulary that are tokens; the rows behind them are zeros.
        stored_vocab_size: rows of the vocabulary in the files, where the model has more. Those that the files lack
            begin as the mean of those that they have, in the embedding and in the unembedding, on any mesh the same.
        mean_rows: rows of the files that begin as that mean too.
        untied: an output projection that the files lack begins as the embedding.

    Returns:
        A state like `abstract`, of jax.Arrays.

    Raises:
        ConfigError: as `check_weights`; or the tensors that hold a number that is not finite, all in one report. Each
            process looks at what it reads, and all of them fail together.
    """
    in_files = vocab_size if stored_vocab_size is None else stored_vocab_size
    check_weights(stored, family, abstract, vocab_size=in_files, untied=untied)
    weights = join(abstract, family, vocab_size=in_files, stored=stored.tensors, untied=untied)
    new_rows = sorted({*mean_rows, *range(in_files, vocab_size)})
    places = {path: place.get_value() for path, place in variables_of(shardings).items()}
    arrays: dict[str, jax.Array] = {}
    problems: dict[str, str] = {}

    def finish(read: _Read) -> None:
        for future in read.futures:
            if found := future.result():
                problems.setdefault(*found)
        shape = read.variable.shape
        if "v" in read.weight.axes:
            table = stored.tensors[read.weight.name(())]
            _fill_vocabulary(table, read.shards, new_rows, stored=in_files, vocab_size=vocab_size)
        array = jax.make_array_from_callback(
            shape, places[read.weight.path], lambda index: read.shards[_as_bounds(index, shape)]
        )
        # Devices that copy host arrays are done with them, or these would pile up.
        arrays[read.weight.path] = jax.block_until_ready(array)

    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS)) as threads:
        before: _Read | None = None
        for path, (weight, variable) in weights.items():
            shards = {
                bounds: _empty([last - first for first, last in bounds], np.dtype(variable.dtype))
                for bounds in _bounds(places[path], variable.shape)
            }
            tasks = _tasks(weight, stored.tensors, shards)
            futures = [threads.submit(_fill_finite, weight, *task) for task in tasks]
            if before is not None:
                finish(before)
            before = _Read(weight, variable, shards, futures)
        if before is not None:
            finish(before)

    _refuse(list(problems.values()))
    return jax.tree_util.tree_map_with_path(
        lambda path, variable: variable.replace(arrays[path_text(path)]),
        abstract,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def _refuse(problems: list[str]) -> None:
    """On every process, where any of them has found something."""
    elsewhere = 0
    if jax.process_count() > 1:
        counts = multihost_utils.process_allgather(np.array(len(problems), np.int32))
        elsewhere = int(np.count_nonzero(counts)) - bool(problems)
    if elsewhere:
        problems = [*problems, f"{elsewhere} other processes have found such tensors in what they read"]
    if problems:
        raise ConfigError(
            _report("the model's weights hold numbers that are not finite, from which nothing can be learnt:", problems)
        )


class _Read(NamedTuple):
    """A weight that is being read."""

    weight: Weight
    variable: nnx.Variable
    shards: dict[Box, np.ndarray]
    """By their bounds; devices that hold copies of one share it."""
    futures: list[concurrent.futures.Future]


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Memory for a shard, in pages of its own: on CPU, JAX takes over such an array as it is, and would copy others.

    Private, as the pages of shared memory take longer to get.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    return np.frombuffer(mmap.mmap(-1, max(num_bytes, 1), mmap.MAP_PRIVATE), dtype, math.prod(shape)).reshape(shape)


def _bounds(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> set[Box]:
    """Of every shard that a device of this process holds."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    return {_as_bounds(index, shape) for index in indices}


def _as_bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Box:
    assert index is not None
    return tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))


class Target(NamedTuple):
    """A part of a tensor, and the array that it goes to."""

    box: Box
    """Factor by factor."""
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
    # Of narrow columns, whole rows are read (`stored.SafeTensor.read`).
    width = last - first if (last - first) * itemsize >= PAGE_BYTES else math.prod(f.size for f in weight.dims[-1])
    most = max(1, BLOCK_BYTES // (width * itemsize))
    # Up to the last factor of which only a part is wanted, its indices are apart in the file.
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
