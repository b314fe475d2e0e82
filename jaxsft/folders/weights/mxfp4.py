"""Weights of four bits, as gpt-oss is published in (`quant_method: mxfp4`), read as the bfloat16 that they stand for.

A number is one of 16, times a power of two that 32 neighbours along the inputs of a linear map share (OCP Microscaling
Formats v1.0, MXFP4). bfloat16 holds every such product, so nothing is lost. In: a `Stored` with tensors
`NAME_blocks` uint8 [E, outputs, inputs / 32, 16] and `NAME_scales` uint8 [E, outputs, inputs / 32]. Out: a `Stored`
with `NAME` [E, inputs, outputs] in their place, unpacked as it is read.
"""

import pathlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxsft.folders.weights.stored import SafeTensor, Stored, StoredTensor

GROUP = 32
"""Numbers that share a scale; two lie in a byte, the first of them in its lower half."""
FP4_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
FP4_VALUES = np.concatenate([FP4_VALUES, -FP4_VALUES])
PAIRS = np.stack([FP4_VALUES[np.arange(256) & 15], FP4_VALUES[np.arange(256) >> 4]], axis=1).view(np.uint64)[:, 0]
"""[256]: the two float32 numbers in a byte, in one of eight bytes."""
CHUNK_BYTES = 1 << 16
"""Unpacked at once: the float32 numbers in between, 8 times as much, stay in the cache."""


def is_mxfp4(hf_config: dict[str, Any]) -> bool:
    """Whether a config.json says that its model's weights are stored so."""
    quantization = hf_config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"


def unpacked(stored: Stored, hf_config: dict[str, Any]) -> tuple[Stored, dict[str, Any]]:
    """What is stored, as bfloat16, and the config.json of such a model.

    Exports are of the new kind: of other tensors and files than those that were read.
    """
    tensors: dict[str, StoredTensor] = {}
    problems = list(stored.problems)
    for name, tensor in stored.tensors.items():
        base, _, part = name.rpartition("_")
        scales = stored.tensors.get(f"{base}_scales")
        if part == "scales" and f"{base}_blocks" in stored.tensors:
            continue
        if part != "blocks" or not isinstance(tensor, SafeTensor) or not isinstance(scales, SafeTensor):
            tensors[name] = tensor
            continue
        if tensor.word != "U8" or len(tensor.shape) != 4 or tensor.shape[-1] != GROUP // 2:
            expected = f"U8 [E, outputs, groups, {GROUP // 2}]"
            problems.append(f"{tensor.file}: {name} is {_words(tensor)}, expected {expected}")
        elif (scales.word, scales.shape) != ("U8", tensor.shape[:-1]):
            expected = f"U8 {list(tensor.shape[:-1])}"
            problems.append(f"{scales.file}: {base}_scales is {_words(scales)}, expected {expected}, as of {name}")
        else:
            tensors[base] = PackedTensor(tensor, scales)
    hf_config = {key: value for key, value in hf_config.items() if key != "quantization_config"}
    if not hf_config.keys() & {"dtype", "torch_dtype"}:
        hf_config["dtype"] = "bfloat16"
    return Stored(stored.path, tensors, tuple(problems)), hf_config


def _words(tensor: SafeTensor) -> str:
    return f"{tensor.word} {list(tensor.shape)}"


class PackedTensor(NamedTuple):
    """A weight [E, inputs, outputs] that lies in two tensors."""

    blocks: SafeTensor
    scales: SafeTensor

    @property
    def file(self) -> pathlib.Path:
        return self.blocks.file

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        experts, outputs, groups, _ = self.blocks.shape
        return experts, groups * GROUP, outputs

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """See `StoredTensor.read`; a row is an input of an expert, a column an output."""
        _, inputs, _ = self.shape
        out = np.empty((rows.stop - rows.start, columns.stop - columns.start), self.dtype)
        at = rows.start
        while at < rows.stop:
            expert, first = divmod(at, inputs)
            last = min(inputs, first + rows.stop - at)
            place = out[at - rows.start :][: last - first]
            self._unpack(expert, first, last, columns, place.view(np.uint16))
            at += last - first
        return out

    def _unpack(self, expert: int, first: int, last: int, columns: slice, out: np.ndarray) -> None:
        """Inputs `first` to `last` of some outputs of an expert, as the bits of bfloat16 numbers."""
        _, outputs, groups, group_bytes = self.blocks.shape
        begin, end = first // GROUP, -(-last // GROUP)
        step = max(1, CHUNK_BYTES // ((end - begin) * group_bytes))
        for column in range(columns.start, columns.stop, step):
            count = min(step, columns.stop - column)
            row = (expert * outputs + column) * groups
            blocks = self.blocks.read_bytes(row * group_bytes, count * groups * group_bytes)
            scales = self.scales.read_bytes(row, count * groups)
            blocks = blocks.reshape(count, groups, group_bytes)[:, begin:end]
            exponents = scales.reshape(count, groups)[:, begin:end].astype(np.int32) - 127
            numbers = PAIRS.take(blocks).view(np.float32)
            numbers *= np.ldexp(np.float32(1), exponents)[..., None]
            # A bfloat16 is the upper half of a float32; the lower half of these is zero.
            bits = numbers.view(np.uint16)[..., 1::2].reshape(count, -1)
            bits = bits[:, first - begin * GROUP : last - begin * GROUP]
            at = column - columns.start
            out[:, at : at + count] = bits.T
