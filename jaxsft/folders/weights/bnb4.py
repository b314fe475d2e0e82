"""Weights of four bits as bitsandbytes makes them and transformers writes them, read as the numbers they stand for.

In: a `Stored` with `NAME` uint8 (two codes a byte, the first in the upper half) and beside it `NAME.absmax`,
`NAME.quant_map` and `NAME.quant_state.bitsandbytes__nf4`, a JSON text as bytes; where the absmax are quantised too,
`NAME.nested_absmax` and `NAME.nested_quant_map`. Out: a `Stored` with `NAME` [outputs, inputs] in their place, in the
dtype that it had before. Neither torch nor bitsandbytes is needed.
"""

import json
import math
import pathlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxsft.folders.weights.stored import SafeTensor, Stored, StoredTensor
from jaxsft.model.quantize import BLOCK, DYNAMIC_VALUES, NF4_VALUES, SCALE_BLOCK

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
MOST_STATE_BYTES = 1 << 16


def is_bnb4(hf_config: dict[str, Any]) -> bool:
    """Whether a config.json says that its model's weights are stored so."""
    quantization = hf_config.get("quantization_config")
    return (
        isinstance(quantization, dict)
        and quantization.get("quant_method") == "bitsandbytes"
        and bool(quantization.get("load_in_4bit", quantization.get("_load_in_4bit")))
    )


def dequantized(stored: Stored, hf_config: dict[str, Any]) -> tuple[Stored, dict[str, Any]]:
    """What is stored, as numbers, and the config.json of such a model; its exports are not quantised."""
    tensors: dict[str, StoredTensor] = {}
    problems = list(stored.problems)
    states = {
        name.removesuffix(f".{word}"): tensor
        for word in STATES
        for name, tensor in stored.tensors.items()
        if name.endswith(f".{word}")
    }
    beside = {f"{name}.{part}" for name in states for part in (*PARTS, *STATES)}
    for name, tensor in stored.tensors.items():
        if name in states:
            try:
                tensors[name] = _opened(name, stored.tensors, states[name])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                problems.append(f"{tensor.file}: {name} is no tensor of bitsandbytes' four bits: {error}")
        elif name not in beside:
            tensors[name] = tensor
    return Stored(stored.path, tensors, tuple(problems)), {
        key: value for key, value in hf_config.items() if key != "quantization_config"
    }


def _opened(name: str, tensors: dict[str, StoredTensor], state_tensor: StoredTensor) -> "Bnb4Tensor":
    """Raises ValueError and its like where parts are missing or do not fit each other."""

    def part(word: str, suffix: str, size: int) -> SafeTensor:
        tensor = tensors.get(f"{name}.{suffix}" if suffix else name)
        if not isinstance(tensor, SafeTensor):
            raise ValueError(f"{suffix} is missing")
        if tensor.word != word or math.prod(tensor.shape) != size:
            raise ValueError(
                f"{suffix or name} is {tensor.word} {list(tensor.shape)}, expected {word} of {size} numbers"
            )
        return tensor

    if not isinstance(state_tensor, SafeTensor) or state_tensor.num_bytes > MOST_STATE_BYTES:
        raise ValueError("its quant_state is no small tensor")
    state = json.loads(state_tensor.read_bytes(0, state_tensor.num_bytes).tobytes())
    shape = tuple(state["shape"])
    block, dtype = state["blocksize"], DTYPES.get(str(state["dtype"]).removeprefix("torch."))
    if dtype is None:
        raise ValueError(f"dtype {str(state['dtype'])[:20]!r}, expected one of {', '.join(DTYPES)}")
    if len(shape) != 2 or not all(type(size) is int and size > 0 for size in (*shape, block)):
        raise ValueError(f"shape {str(shape)[:40]} in blocks of {str(block)[:20]}, expected two sizes and a number")
    size = math.prod(shape)
    codes, num_blocks = part("U8", "", -(-size // 2)), -(-size // block)
    values = part("F32", "quant_map", 16).read(slice(0, 1), slice(0, 16))[0]
    if f"{name}.nested_absmax" not in tensors:
        return Bnb4Tensor(shape, dtype, codes, values, block, part("F32", "absmax", num_blocks), None)
    nested_block = state["nested_blocksize"]
    if type(nested_block) is not int or nested_block < 1:
        raise ValueError(f"nested blocks of {str(nested_block)[:20]}")
    nested = Nested(
        scales=part("F32", "nested_absmax", -(-num_blocks // nested_block)),
        values=part("F32", "nested_quant_map", 256).read(slice(0, 1), slice(0, 256))[0],
        block=nested_block,
        offset=np.float32(state["nested_offset"]),
    )
    return Bnb4Tensor(shape, dtype, codes, values, block, part("U8", "absmax", num_blocks), nested)


class Nested(NamedTuple):
    """What quantised absmax stand for."""

    scales: SafeTensor
    values: np.ndarray
    """float32 [256], by code."""
    block: int
    offset: np.float32


class Bnb4Tensor(NamedTuple):
    """A weight [outputs, inputs] that lies in several tensors; numbers in the order of the file share an absmax."""

    shape: tuple[int, ...]
    dtype: np.dtype
    codes: SafeTensor
    values: np.ndarray
    """float32 [16], by code."""
    block: int
    absmax: SafeTensor
    nested: Nested | None

    @property
    def file(self) -> pathlib.Path:
        return self.codes.file

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """See `StoredTensor.read`."""
        num_columns = self.shape[-1]
        first, last = rows.start * num_columns, rows.stop * num_columns
        found = self.codes.read_bytes(first // 2, -(-last // 2) - first // 2)
        both = np.stack([found >> 4, found & 15], axis=-1).reshape(-1)[first % 2 :][: last - first]
        blocks = np.arange(first, last) // self.block
        absmax = self._absmax(first // self.block, -(-last // self.block))
        numbers = self.values[both] * absmax[blocks - first // self.block]
        return numbers.reshape(-1, num_columns)[:, columns].astype(self.dtype)

    def _absmax(self, first: int, last: int) -> np.ndarray:
        """float32, of some blocks."""
        if self.nested is None:
            return self.absmax.read_bytes(4 * first, 4 * (last - first)).view(np.float32)
        block = self.nested.block
        codes = self.absmax.read_bytes(first, last - first)
        begin = first // block
        scales = self.nested.scales.read_bytes(4 * begin, 4 * (-(-last // block) - begin)).view(np.float32)
        return self.nested.values[codes] * scales[np.arange(first, last) // block - begin] + self.nested.offset

    @property
    def is_ours(self) -> bool:
        """Whether its codes are those that we would make, to be taken as they are."""
        return (
            (self.block, self.shape[-1] % BLOCK) == (BLOCK, 0)
            and self.nested is not None
            and self.nested.block == SCALE_BLOCK
            and np.array_equal(self.values, NF4_VALUES)
            and np.array_equal(self.nested.values, DYNAMIC_VALUES)
        )

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of one of the arrays of an `NF4`, by its name there; only where `is_ours`."""
        assert self.nested is not None
        num_rows, num_inputs = self.shape
        if name == "offset":
            return np.asarray(self.nested.offset)
        if name == "scales":
            scales = self.nested.scales
            return scales.read_bytes(0, scales.num_bytes).view(np.float32)[index]
        tensor, width = (self.codes, num_inputs // 2) if name == "codes" else (self.absmax, num_inputs // BLOCK)
        rows, columns = index
        begin, end, _ = rows.indices(num_rows)
        return tensor.read_bytes(begin * width, (end - begin) * width).reshape(-1, width)[:, columns]
