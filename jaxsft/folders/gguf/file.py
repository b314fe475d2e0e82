"""GGUF files: their metadata, and their tensors, dequantised block by block as they are read.

In: a .gguf file, or the files of a split one. Out: the metadata as plain values, and each tensor as a matrix of float32
of which rows and columns can be read. What keys and names mean is `folders/gguf/model.py`'s. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import functools
import math
import mmap
import pathlib
import re
import struct
from typing import Any, NamedTuple

import numpy as np

from jaxsft.config import ConfigError
from jaxsft.disk.foreign import open_regular

VERSIONS = (2, 3)
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
"""Name of one file of a split GGUF."""

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's number of a type of metadata -> that of `struct`; 8 is a string, 9 an array."""

MOST_HEADER_BYTES, MOST_ITEMS, MOST_NAME_BYTES = 1 << 27, 1 << 24, 1 << 16
"""Bytes of all that stands before the tensors (a large vocabulary has some 15 MB), items of an array there, and bytes
of a name."""
MOST_TENSORS, MOST_KEYS = 1 << 20, 1 << 16
MOST_PARTS = 999
"""Files of one model."""
MOST_SIZE = 2**48
"""No dim of a tensor and no place in a file reaches it."""
MOST_ALIGNMENT = 1 << 20

BYTES_AT_ONCE = 1 << 16
"""Quantised bytes that are dequantised together: gguf works in groups of 16 rows, however short they are."""


class TensorType(NamedTuple):
    """A format of numbers: `block_size` of them lie in `block_bytes` bytes."""

    number: int
    name: str
    block_size: int
    block_bytes: int


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file, seen as a matrix [rows, columns] whose columns are the last dim of `shape`."""

    file: pathlib.Path
    name: str
    type: TensorType
    shape: tuple[int, ...]
    """In the order of torch, the reverse of the file's."""
    offset: int

    def read(self, rows: slice | np.ndarray, columns: slice) -> np.ndarray:
        """float32 values of some rows (a slice, or their numbers) and a slice of columns; only their bytes are read.

        Quantised numbers lie in blocks along the columns, and no block belongs to two rows.
        """
        import gguf

        _, _, size, width = self.type
        num_rows, row_bytes = math.prod(self.shape[:-1]), self.shape[-1] // size * width
        stored = np.memmap(self.file, np.uint8, mode="r", offset=self.offset, shape=(num_rows, row_bytes))
        first, last = columns.start // size, -(-columns.stop // size)
        blocks = np.ascontiguousarray(stored[rows, first * width : last * width])
        count = max(1, BYTES_AT_ONCE // width)
        pieces = [blocks.reshape(-1)[at : at + count * width] for at in range(0, blocks.size, count * width)]
        kind = gguf.GGMLQuantizationType(self.type.number)
        values = [gguf.dequantize(piece.reshape(1, -1), kind).reshape(-1) for piece in pieces]
        matrix = np.concatenate([np.empty(0, np.float32), *values]).reshape(len(blocks), (last - first) * size)
        return matrix[:, columns.start - first * size : columns.stop - first * size]


class GGUFFile(NamedTuple):
    """What the file, or the files of a split one, hold."""

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: pathlib.Path) -> GGUFFile:
    """The metadata and tensors of a .gguf file; of a split one, any of its files may be given.

    Raises:
        ConfigError: the `gguf` package is missing; a file is missing, truncated, corrupt, of another version or byte
            order, or holds tensors of formats that are not known, all such tensors together.
    """
    parts = _parts(path)
    if missing := [str(part) for part in parts if not part.exists()]:
        named = ", ".join(missing[:5]) + f" and {len(missing) - 5} more" * (len(missing) > 5)
        raise ConfigError(f"{path}: one of {len(parts)} files of a model, of which are missing: {named}")
    files = [_read_file(part) for part in parts]
    metadata = files[0].metadata
    tensors: dict[str, GGUFTensor] = {}
    for number, file in enumerate(files):
        own, count = file.metadata.get("split.no", 0), file.metadata.get("split.count", 1) or 1
        if (own, count) != (number, len(files)):
            raise ConfigError(
                f"{file.path}: part {number + 1} of {len(files)} of a model by its name, but by its metadata "
                f"split.no is {str(own)[:60]!r} and split.count {str(count)[:60]!r}"
            )
        if twice := tensors.keys() & file.tensors.keys():
            raise ConfigError(f"{file.path}: {', '.join(sorted(twice)[:5])}: also in another file of the model")
        tensors |= file.tensors
    expected = metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise ConfigError(
            f"{path}: {len(tensors)} tensors in {len(files)} files, but {str(expected)[:60]} are announced"
        )
    return GGUFFile(path, metadata, tensors)


def _parts(path: pathlib.Path) -> list[pathlib.Path]:
    if match := PART.fullmatch(path.name):
        name, count = match[1], int(match[3])
        if not 1 <= int(match[2]) <= count <= MOST_PARTS:
            raise ConfigError(f"{path}: a part {int(match[2])} of {count} by its name; expected at most {MOST_PARTS}")
        return [path.with_name(f"{name}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    return [path]


class _Cursor:
    """Reads one value after the other."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError(f"truncated or corrupt: its header asks for more than its {len(self.data)} bytes")
        if count > MOST_HEADER_BYTES - self.at:
            raise ValueError(f"corrupt: its header has more than {MOST_HEADER_BYTES:,} bytes")
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def name(self) -> str:
        size = self.unpack("Q")
        if size > MOST_NAME_BYTES:
            raise ValueError(f"truncated or corrupt: a key or the name of a tensor has {size:,} bytes")
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("corrupt: a key or the name of a tensor is no UTF-8") from None

    def text(self) -> str:
        # A vocabulary may have tokens that are no UTF-8.
        return self.take(self.unpack("Q")).decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.text()
        if kind == 9:
            kind, count = self.unpack("I"), self.unpack("Q")
            if count > MOST_ITEMS:
                raise ValueError(f"truncated or corrupt: an array of {count:,} values, expected at most {MOST_ITEMS:,}")
            if kind == 8:
                return [self.text() for _ in range(count)]
            if kind in SCALARS:
                code = SCALARS[kind]
                return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))
        elif kind in SCALARS:
            return self.unpack(SCALARS[kind])
        raise ValueError(f"corrupt: metadata of type {kind}")


def _read_file(path: pathlib.Path) -> GGUFFile:
    try:
        with open_regular(path) as file:
            start = file.read(8)
            if start.startswith(b"version "):
                raise ValueError("a Git LFS pointer, not the file itself (run `git lfs pull`)")
            if start[:4] != b"GGUF":
                raise ValueError(f"not a GGUF file: it begins with {start[:4]!r}")
            little, big = int.from_bytes(start[4:], "little"), int.from_bytes(start[4:], "big")
            if little not in VERSIONS and big in VERSIONS:
                raise ValueError("a big-endian GGUF, which is not read; convert it with gguf_convert_endian.py")
            if little not in VERSIONS:
                raise ValueError(f"GGUF of version {little}; read are {' and '.join(map(str, VERSIONS))}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read_content(path, data)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except ConfigError:
        raise
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _read_content(path: pathlib.Path, data: mmap.mmap) -> GGUFFile:
    cursor = _Cursor(data)
    cursor.take(8)
    num_tensors, num_keys = cursor.unpack("Q"), cursor.unpack("Q")
    if num_tensors > MOST_TENSORS or num_keys > MOST_KEYS:
        raise ValueError(f"truncated or corrupt: {num_tensors:,} tensors and {num_keys:,} keys by its header")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.name()
        if key in metadata:
            raise ValueError(f"corrupt: {key[:100]} stands twice in its metadata")
        metadata[key] = cursor.value(cursor.unpack("I"))
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        name, num_dims = cursor.name(), cursor.unpack("I")
        if name in entries or not 1 <= num_dims <= 4:
            raise ValueError(f"corrupt: tensor {name[:100]!r} has {num_dims} dims, or stands twice")
        shape = tuple(reversed([cursor.unpack("Q") for _ in range(num_dims)]))
        number, offset = cursor.unpack("I"), cursor.unpack("Q")
        if max(*shape, offset) >= MOST_SIZE:
            raise ValueError(f"corrupt: tensor {name[:100]!r} {list(shape)} begins at {offset}, beyond any file")
        entries[name] = (shape, number, offset)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"corrupt: general.alignment is {str(alignment)[:60]}, no power of two up to {MOST_ALIGNMENT}")
    begin = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    problems = []
    for name, (shape, number, offset) in entries.items():
        kind, label = tensor_types().get(number), name[:100]
        if kind is None:
            problems.append(f"{label} is in a format of numbers that is not read ({_type_name(number)})")
        elif 0 in shape or shape[-1] % kind.block_size:
            problems.append(f"corrupt: {label} {list(shape)} is no whole number of blocks of {kind.name}")
        elif begin + offset + math.prod(shape) // kind.block_size * kind.block_bytes > len(data):
            problems.append(
                f"truncated: {len(data)} bytes, but {label} begins at {begin + offset} and ends beyond them"
            )
        else:
            tensors[name] = GGUFTensor(path, name, kind, shape, begin + offset)
    if problems:
        more = [f"... and {len(problems) - 10} more tensors"] if len(problems) > 10 else []
        raise ValueError("\n  ".join(problems[:10] + more))
    return GGUFFile(path, metadata, tensors)


@functools.cache
def tensor_types() -> dict[int, TensorType]:
    """The formats that the `gguf` package can dequantise, by GGUF's number.

    Raises:
        ConfigError: the package is not installed.
    """
    gguf = _package()
    known = {}
    for kind, (size, width) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, width), np.uint8), kind)
        except NotImplementedError:
            continue
        known[int(kind)] = TensorType(int(kind), kind.name, size, width)
    return known


def _type_name(number: int) -> str:
    kinds = {int(kind): kind.name for kind in _package().GGMLQuantizationType}
    read = ", ".join(kind.name for kind in tensor_types().values())
    return f"{kinds.get(number, f'number {number}')}; read are {read}"


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ConfigError("GGUF files need the gguf package: pip install jaxsft[gguf]") from None
    return gguf
