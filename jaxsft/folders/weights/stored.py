"""The tensors that a model folder holds: which there are, where, and reading parts of them.

In: a folder of safetensors, one file or several with an index, on a disk or in a bucket. Out: a `Stored`, with all that
is wrong about the files. Whether these are the tensors that a model needs is `load.py`'s question. Only headers are
read here; the bytes of a tensor are read by those who ask for them. A model in another format (`folders/gguf/model.py`)
is a `Stored` too.
"""

import collections
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import ml_dtypes
import numpy as np

from jaxsft.config import ConfigError
from jaxsft.disk.buckets import BucketPath
from jaxsft.disk.foreign import MOST_CONFIG_BYTES, MOST_JSON_BYTES, open_regular, read_object, read_regular

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
"""safetensors' word for a dtype -> numpy's, of those that weights may have."""

DTYPE_BITS: dict[str, int] = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32},
    **{"U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Every dtype of safetensors to the bits of a number."""

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PAGE_BYTES = 4096
BLOCK_BYTES = 1 << 24
"""Read at once by a thread."""
SPAN_BYTES = 1 << 26
"""Asked of a bucket at once."""
MOST_NUMBER = 2**64
"""No size or count in a header reaches it: the safetensors library holds them in 64 bits."""


FilePath: TypeAlias = pathlib.Path | BucketPath


class StoredTensor(Protocol):
    """A tensor in a file."""

    @property
    def file(self) -> FilePath:
        """Where it lies, for messages."""

    @property
    def dtype(self) -> np.dtype | None:
        """Dtype of what `read` gives; None where the file holds no numbers that a weight may have."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In the order of torch."""

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """A part of the tensor, seen as a matrix whose columns are its last dim and whose rows are all others.

        Called by several threads at once, for some MB at a time. Nothing may stay in memory that is not given back;
        what is given back is neither kept nor changed.

        Args:
            rows: start and stop are given, step is not; a tensor of one dim has one row.
            columns: as `rows`.
        """


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor, as `StoredTensor.read` sees it; one without dims is a number in a row."""
    return math.prod(shape[:-1]), math.prod(shape[-1:])


def read_whole(tensor: StoredTensor) -> np.ndarray:
    """All of a tensor, in its shape."""
    num_rows, num_columns = as_matrix(tensor.shape)
    return tensor.read(slice(0, num_rows), slice(0, num_columns)).reshape(tensor.shape)


class SafeTensor(NamedTuple):
    """A tensor in a safetensors file."""

    file: FilePath
    word: str
    """Its dtype, as safetensors calls it."""
    shape: tuple[int, ...]
    offset: int
    """Place of its first byte in the file."""
    num_bytes: int

    @property
    def dtype(self) -> np.dtype | None:
        return DTYPES.get(self.word)

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        assert self.dtype is not None, self
        num_columns, itemsize = as_matrix(self.shape)[1], self.dtype.itemsize
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        row_bytes = num_columns * itemsize
        at = self.offset + rows.start * row_bytes + columns.start * itemsize
        if isinstance(self.file, BucketPath):
            return _read_rows(self.file, at, shape, self.dtype, row_bytes=row_bytes)
        with self.file.open("rb", buffering=0) as file:
            if shape[1] == num_columns:
                return _read_at(file.fileno(), at, shape[0] * row_bytes, self.file).view(self.dtype).reshape(shape)
            if shape[1] * itemsize < PAGE_BYTES:
                # Their pages are all read in any case: at once is faster.
                whole = _read_at(file.fileno(), at, (shape[0] - 1) * row_bytes + shape[1] * itemsize, self.file)
                strides = (row_bytes, itemsize)
                return np.ndarray(shape, self.dtype, whole, strides=strides)
            part = np.empty((shape[0], shape[1] * itemsize), np.uint8)
            for number, row in enumerate(part):
                _read_into(file.fileno(), at + number * row_bytes, row, self.file)
            return part.view(self.dtype)

    def read_bytes(self, at: int, count: int) -> np.ndarray:
        """uint8 [count] from byte `at` of the tensor on."""
        if isinstance(self.file, BucketPath):
            return _read_rows(self.file, self.offset + at, (1, count), np.dtype(np.uint8), row_bytes=count)[0]
        with self.file.open("rb", buffering=0) as file:
            return _read_at(file.fileno(), self.offset + at, count, self.file)


def _read_at(descriptor: int, at: int, count: int, path: pathlib.Path) -> np.ndarray:
    return _read_into(descriptor, at, np.empty(count, np.uint8), path)


def _read_into(descriptor: int, at: int, out: np.ndarray, path: pathlib.Path) -> np.ndarray:
    done = 0
    while done < len(out):
        # A map of the file would count its pages as memory of this process, and a file cut short would kill it.
        count = os.preadv(descriptor, [out[done:].data], at + done)
        if count == 0:
            raise ConfigError(f"{path}: became shorter while it was read")
        done += count
    return out


def _read_rows(path: BucketPath, at: int, shape: tuple[int, int], dtype: np.dtype, *, row_bytes: int) -> np.ndarray:
    """A part of a matrix whose rows lie `row_bytes` apart, from byte `at` on.

    What lies between the parts of two rows is read along: a request takes as long as reading a megabyte.
    """
    out = np.empty(shape, dtype)
    width, step = shape[1] * dtype.itemsize, max(1, SPAN_BYTES // max(1, row_bytes))
    for first in range(0, shape[0], step) if width else ():
        count = min(step, shape[0] - first)
        span = (count - 1) * row_bytes + width
        data = path.read_range(at + first * row_bytes, span)
        if len(data) != span:
            raise ConfigError(f"{path}: became shorter while it was read")
        out[first : first + count] = np.ndarray((count, shape[1]), dtype, data, strides=(row_bytes, dtype.itemsize))
    return out


class StoredFile(NamedTuple):
    """A safetensors file as it was written."""

    name: str
    header: bytes
    """All that stands before the first tensor."""
    metadata: dict[str, str] | None
    names: tuple[str, ...]
    """In the order of their bytes."""


class Stored(NamedTuple):
    """What a model is stored as."""

    path: FilePath
    """The folder or file."""
    tensors: dict[str, StoredTensor]
    """By the names that the family's table has, with or without its prefix."""
    problems: tuple[str, ...] = ()
    """Why files could not be read; their tensors are missing in `tensors`."""
    files: tuple[StoredFile, ...] = ()
    """Where the tensors lie in safetensors; an export is split into files of these names again."""
    index_file: bytes | None = None
    """The index file, where there is one."""


def open_folder(folder: FilePath) -> Stored:
    """Reads the headers of a folder's safetensors; what is wrong with the files is noted in `problems`."""
    problems: list[str] = []
    if (folder / SINGLE_FILE).exists() or (folder / SINGLE_FILE).is_symlink():
        single = _read_header(folder / SINGLE_FILE, problems)
        if single is None:
            return Stored(folder, {}, tuple(problems))
        return Stored(folder, dict(single[1]), tuple(problems), (single[0],))
    if not ((folder / INDEX_FILE).exists() or (folder / INDEX_FILE).is_symlink()):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
        hint = ""
        if pickles:
            hint = (
                f"; {', '.join(pickles[:3])}: pickled weights are not read, as opening them may run any program "
                "(transformers' save_pretrained writes them as safetensors)"
            )
        return Stored(folder, {}, (f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}{hint}",))
    places = load_json(folder / INDEX_FILE, most=MOST_JSON_BYTES).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        return Stored(folder, {}, (f"{folder / INDEX_FILE}: weight_map is not a mapping of tensor names to files",))
    tensors: dict[str, StoredTensor] = {}
    files = []
    for name in sorted(set(places.values())):
        if not is_plain_name(name):
            problems.append(f"{folder / INDEX_FILE}: names {name[:100]!r}, which is not a file of this folder")
        elif found := _read_header(folder / name, problems):
            file, held = found
            files.append(file)
            for absent in sorted({tensor for tensor, place in places.items() if place == name} - held.keys()):
                problems.append(f"{folder / name}: lacks {absent}, which {INDEX_FILE} places there")
            for tensor in held.keys() & places.keys():
                if places[tensor] != name:
                    problems.append(f"{folder / name}: holds {tensor}, which {INDEX_FILE} places in {places[tensor]}")
            tensors |= held
    index_file = read_regular(folder / INDEX_FILE, most=MOST_JSON_BYTES)
    return Stored(folder, tensors, tuple(problems), tuple(files), index_file)


def open_file(path: FilePath) -> Stored:
    """Reads the header of one safetensors file; what is wrong with it is noted in `problems`."""
    problems: list[str] = []
    found = _read_header(path, problems)
    return Stored(path, dict(found[1]) if found else {}, tuple(problems), (found[0],) if found else ())


def is_plain_name(name: str) -> bool:
    """Whether it names a file of the folder itself: "model-1.safetensors", not "../model.safetensors"."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0", os.sep} and name.isprintable()


def _read_header(path: FilePath, problems: list[str]) -> tuple[StoredFile, dict[str, SafeTensor]] | None:
    """A file's tensors: 8 bytes of header length, the header in JSON, then the bytes of the tensors."""
    try:
        start, text, size = _header_bytes(path)
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_twins)
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not all(isinstance(each, str) for each in metadata.values()):
            raise ValueError("corrupt header: __metadata__ is not a mapping of texts to texts")
        begin = len(start) + len(text)
        tensors = {name: _stored(path, name, entry, begin) for name, entry in header.items()}
        in_order = _in_order(tensors, begin, size)
    except ConfigError as error:
        problems.append(str(error))
    except FileNotFoundError:
        problems.append(f"{path}: no such file")
    except UnicodeDecodeError:
        problems.append(f"{path}: corrupt header, or not a safetensors file")
    except json.JSONDecodeError as error:
        problems.append(f"{path}: corrupt header: {error}")
    except RecursionError:
        problems.append(f"{path}: corrupt header: nested too deeply")
    except (OSError, ValueError, MemoryError) as error:
        problems.append(f"{path}: {error}")
    except (KeyError, TypeError, AttributeError):
        problems.append(f"{path}: corrupt header")
    else:
        return StoredFile(path.name, start + text, metadata, tuple(in_order)), tensors
    return None


def _header_bytes(path: FilePath) -> tuple[bytes, bytes, int]:
    """The 8 bytes of the header's length, the header, and the size of the file.

    Raises:
        ValueError: this cannot be a safetensors file; says what it is, where that is known.
    """
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if size == 0:
            raise ValueError("an empty file")
        if start.startswith(b"version "):
            raise ValueError("a Git LFS pointer, not the file itself (run `git lfs pull`)")
        if start.lstrip().lower().startswith((b"<!doct", b"<html", b"<?xml")):
            raise ValueError("a web page, not the file itself (was its download refused?)")
        if size < 8 or 8 + length > size:
            raise ValueError("truncated, or not a safetensors file")
        if length > MOST_JSON_BYTES:
            raise ValueError(f"a header of {length:,} bytes; safetensors have at most {MOST_JSON_BYTES:,}")
        text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError("corrupt header, or not a safetensors file")
    return start, text, size


def _in_order(tensors: dict[str, SafeTensor], begin: int, size: int) -> list[str]:
    """Names of the tensors in the order of the file, which they fill from byte `begin` to its end.

    Raises:
        ValueError: they leave gaps, overlap, or end before or after the file does.
    """
    names = sorted(tensors, key=lambda name: (tensors[name].offset, tensors[name].num_bytes))
    end = begin
    for name in names:
        tensor = tensors[name]
        if tensor.offset != end:
            raise ValueError(f"corrupt header: {name} begins at byte {tensor.offset}, expected at {end}")
        end += tensor.num_bytes
    if end > size:
        first = next(name for name in names if tensors[name].offset + tensors[name].num_bytes > size)
        raise ValueError(f"truncated: {size} bytes, but {first} and what follows needs {end}")
    if end < size:
        raise ValueError(f"{size - end} bytes behind the last tensor, not a sound safetensors file")
    return names


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twin, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"corrupt header: {twin[:100]!r} stands twice in it")
    return found


def _stored(path: FilePath, name: str, entry: dict[str, Any], begin: int) -> SafeTensor:
    word, shape, offsets = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if len(offsets) != 2:
        raise ValueError(f"corrupt header: {name[:100]} has {len(offsets)} data_offsets")
    first, last = offsets
    label = f"{name[:100]} [{', '.join(str(size)[:20] for size in shape[:8])}{', ...' * (len(shape) > 8)}]"
    if any(type(size) is not int or not 0 <= size < MOST_NUMBER for size in (*shape, first, last)):
        raise ValueError(f"corrupt header: {label} from byte {str(first)[:20]} to {str(last)[:20]}")
    if not isinstance(word, str) or word not in DTYPE_BITS:
        raise ValueError(f"corrupt header: {name[:100]} has dtype {str(word)[:20]!r}, which safetensors do not know")
    count = 1
    for size in shape:
        count *= size
        # A product of thousands of sizes would take for ever.
        if count * DTYPE_BITS[word] >= MOST_NUMBER:
            raise ValueError(f"corrupt header: {label} has more numbers than any file holds")
    if (last - first) * 8 != -(-count * DTYPE_BITS[word] // 8) * 8:
        raise ValueError(f"corrupt header: {label} {word} has {last - first} bytes")
    return SafeTensor(path, word, shape, begin + first, last - first)


def load_json(path: FilePath, *, most: int = MOST_CONFIG_BYTES) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        ConfigError: it does not, or is no regular file of at most `most` bytes, or nested too deeply.
    """
    return read_object(path, most=most)
