"""Models in GGUF files, as if they were Hugging Face folders: a config.json, and tensors under their names there.

In: a .gguf file, or a folder whose only weights are one. Out: what config.json would say, and the tensors that
transformers' safetensors would hold, dequantised to float32 as they are read. What llama.cpp's converters change in
some weights (`config.Architecture` says what) is undone here. Architectures, keys of the metadata and tensors that
are not known are refused, so that nothing of a model's mathematics is passed over.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from types import ModuleType

import numpy as np

from jaxsft.config import ConfigError
from jaxsft.disk.writing import at_home
from jaxsft.folders.gguf.config import Meaning, read_config
from jaxsft.folders.gguf.file import PART, GGUFFile, GGUFTensor, read_gguf
from jaxsft.folders.gguf.metadata import ROPE_TENSORS, Config
from jaxsft.folders.weights.stored import Stored, StoredTensor
from jaxsft.model.families.known import family

NAMES = {
    "embed_tokens": "token_embd",
    "embed_positions": "position_embd",
    "layers.pre_attention_norm": "attn_norm",
    "layers.post_attention_norm": "post_attention_norm",
    "layers.pre_mlp_norm": "ffn_norm",
    "layers.post_mlp_norm": "post_ffw_norm",
    "layers.self_attn.q_proj": "attn_q",
    "layers.self_attn.k_proj": "attn_k",
    "layers.self_attn.v_proj": "attn_v",
    "layers.self_attn.o_proj": "attn_output",
    "layers.self_attn.q_norm": "attn_q_norm",
    "layers.self_attn.k_norm": "attn_k_norm",
    "layers.self_attn.sinks": "attn_sinks",
    "layers.mlp.gate_proj": "ffn_gate",
    "layers.mlp.up_proj": "ffn_up",
    "layers.mlp.down_proj": "ffn_down",
    "layers.mlp.router": "ffn_gate_inp",
    "layers.mlp.experts.gate_proj": "ffn_gate_exps",
    "layers.mlp.experts.up_proj": "ffn_up_exps",
    "layers.mlp.experts.down_proj": "ffn_down_exps",
    "norm": "output_norm",
    "lm_head": "output",
}
"""Our path of a weight, without .weight or .bias -> its name in GGUF, where those of a layer begin with "blk.0."."""

FUSED = {"attn_q": "attn_qkv", "attn_k": "attn_qkv", "attn_v": "attn_qkv", "ffn_gate": "ffn_up"}
"""Where several weights of ours lie in one tensor of Hugging Face's, they lie in one of GGUF's, by this name."""

MOST_STACKED = 2**14
"""Experts or heads whose tensors are stacked in one."""

# Tensors.


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """A tensor of Hugging Face's as it lies in a tensor of GGUF's; a `StoredTensor`."""

    source: GGUFTensor
    shape: tuple[int, ...]
    first_row: int = 0
    """Where it is one of several that are stacked in the source."""
    head_dim: int | None = None
    """Given: the rows of each head are in pairs (i, i + head_dim / 2), which lie side by side in the source."""
    shift: float = 0.0
    transposed: bool = False
    dtype: np.dtype = np.dtype(np.float32)

    @property
    def file(self) -> pathlib.Path:
        return self.source.file

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """float32 values of a part of the tensor, seen as a matrix [prod(shape[:-1]), shape[-1]]."""
        if self.transposed:
            return self.source.read(columns, rows).T
        if self.head_dim is not None and len(self.shape) == 1:
            whole = self.source.read(slice(0, 1), slice(0, self.shape[0]))
            return whole[:, self._in_source(columns)]
        if self.head_dim is not None:
            return self.source.read(self._in_source(rows), columns)
        values = self.source.read(slice(self.first_row + rows.start, self.first_row + rows.stop), columns)
        return values - np.float32(self.shift) if self.shift else values

    def _in_source(self, rows: slice) -> np.ndarray:
        """Worked example: with heads of 4, rows 0 1 2 3 of a head are 0 2 1 3 in the source."""
        assert self.head_dim is not None
        numbers = np.arange(rows.start, rows.stop)
        head, row = numbers // self.head_dim, numbers % self.head_dim
        half = self.head_dim // 2
        return head * self.head_dim + row % half * 2 + row // half


@dataclasses.dataclass(frozen=True)
class StackedExperts:
    """gpt-oss' experts in one tensor [E, inputs, outputs], or their biases [E, outputs]; a `StoredTensor`.

    GGUF's are [E, outputs, inputs], and gate and up, whose columns alternate in Hugging Face's, lie in two.
    """

    sources: tuple[GGUFTensor, ...]
    dtype: np.dtype = np.dtype(np.float32)

    @property
    def file(self) -> pathlib.Path:
        return self.sources[0].file

    @property
    def shape(self) -> tuple[int, ...]:
        experts, outputs, *inputs = self.sources[0].shape
        return experts, *inputs, outputs * len(self.sources)

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """float32 values of a part of the tensor, seen as a matrix [prod(shape[:-1]), shape[-1]]."""
        matrix = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
        step = len(self.sources)
        for number, source in enumerate(self.sources):
            # Column c of ours is column c // step of source c % step.
            first, last = (-((number - at) // step) for at in (columns.start, columns.stop))
            matrix[:, first * step + number - columns.start :: step] = self._read(source, rows, slice(first, last))
        return matrix

    def _read(self, source: GGUFTensor, rows: slice, outputs: slice) -> np.ndarray:
        if len(source.shape) == 2:
            return source.read(rows, outputs)
        _, num_outputs, num_inputs = source.shape
        parts = []
        at = rows.start
        while at < rows.stop:
            expert, first = divmod(at, num_inputs)
            last = min(num_inputs, first + rows.stop - at)
            begin = expert * num_outputs
            parts.append(source.read(slice(begin + outputs.start, begin + outputs.stop), slice(first, last)).T)
            at += last - first
        return np.concatenate(parts)


def _hf_tensors(file: GGUFFile, family: ModuleType, meaning: Meaning) -> tuple[dict[str, StoredTensor], list[str]]:
    """All tensors under their names in Hugging Face's files, and a line for each that has none there."""
    tensors: dict[str, StoredTensor] = {}
    together: dict[str, list[GGUFTensor]] = {}
    left = dict.fromkeys(file.tensors)
    problems = []
    names = [name for name, _ in family.WEIGHTS.values()]
    for path, (hf_name, _) in family.WEIGHTS.items():
        module = path.removesuffix(".weight").removesuffix(".bias")
        suffix = "bias" if path.endswith(".bias") else "weight"
        name = meaning.architecture.names.get(module, NAMES.get(module))
        if name is None:
            continue
        if names.count(hf_name) > 1:
            name = FUSED.get(name, name)
        layers = range(meaning.num_layers) if "{l}" in hf_name else [None]
        for layer in layers:
            stored = f"{name}.{suffix}" if layer is None else f"blk.{layer}.{name}.{suffix}"
            source = file.tensors.get(stored)
            if source is None:
                continue
            left.pop(stored, None)
            if "experts" in module and "{e}" not in hf_name:
                together.setdefault(hf_name.format(l=layer), []).append(source)
                continue
            if _stack_letter(hf_name) and not (len(source.shape) > 1 and source.shape[0] <= MOST_STACKED):
                problems.append(
                    f"{stored} {list(source.shape)}: expected 2 to 4 dims, the first at most {MOST_STACKED}"
                )
                continue
            for part, tensor in _parts_of(source, hf_name):
                tensors[hf_name.format(l=layer, **part)] = _undone(tensor, module, meaning)
    for name, sources in together.items():
        shapes = {source.shape for source in sources}
        if len(shapes) > 1 or len(sources[0].shape) not in (2, 3):
            named = ", ".join(f"{source.name} {list(source.shape)}" for source in sources)
            problems.append(f"{named}: expected equal shapes of 2 or 3 dims")
        else:
            tensors[name] = StackedExperts(tuple(sources))
    model_type = meaning.config["model_type"]
    unknown = [f"{name} {list(file.tensors[name].shape)}" for name in left if name not in ROPE_TENSORS]
    return tensors, problems + [f"{name[:100]}: no weight of a {model_type} that is known" for name in unknown]


def _stack_letter(hf_name: str) -> str | None:
    """The dim of ours whose indices have tensors of their own in Hugging Face's files, and are stacked in GGUF's."""
    return next((letter for letter in ("e", "n", "k") if f"{{{letter}}}" in hf_name), None)


def _parts_of(source: GGUFTensor, hf_name: str) -> Iterator[tuple[dict[str, int], HFTensor]]:
    """Each of the tensors that are stacked in one: those of the experts, or of the heads."""
    letter = _stack_letter(hf_name)
    if letter is None:
        yield {}, HFTensor(source, source.shape)
        return
    shape = source.shape[1:]
    for number in range(source.shape[0]):
        yield {letter: number}, HFTensor(source, shape, first_row=number * math.prod(shape[:-1]))


def _undone(tensor: HFTensor, module: str, meaning: Meaning) -> HFTensor:
    """With what llama.cpp's converter changed."""
    architecture = meaning.architecture
    if module.endswith("norm") and architecture.norm_shift:
        return dataclasses.replace(tensor, shift=architecture.norm_shift)
    if architecture.pairs_adjacent and module.endswith((".q_proj", ".k_proj")):
        return dataclasses.replace(tensor, head_dim=meaning.head_dim)
    if architecture.transposed and module.startswith("layers.") and len(tensor.shape) == 2:
        return dataclasses.replace(tensor, shape=tensor.shape[::-1], transposed=True)
    return tensor


# The whole.


def is_gguf(path: str) -> bool:
    """Whether a `model.path` is a .gguf file, or a folder whose only weights are .gguf files."""
    place = at_home(path, "model.path")
    if place.suffix == ".gguf":
        return True
    return place.is_dir() and any(place.glob("*.gguf")) and not any(place.glob("*.safetensors*"))


def gguf_file(path: str | pathlib.Path) -> pathlib.Path:
    """The .gguf file that a `model.path` is about; of a split one, the first.

    Raises:
        ConfigError: there is none, or the folder holds several.
    """
    place = at_home(path, "model.path")
    if not place.is_dir():
        if not place.exists():
            raise ConfigError(f"{place}: no such file")
        return place
    found = sorted(place.glob("*.gguf"))
    firsts = [file for file in found if not (match := PART.fullmatch(file.name)) or int(match[2]) == 1]
    if len(firsts) != 1:
        names = ", ".join(file.name for file in firsts) or "none"
        raise ConfigError(f"{place}: one .gguf model is expected, found: {names}; give the file as model.path")
    return firsts[0]


def open_gguf(path: str | pathlib.Path) -> tuple[Stored, Config]:
    """A model in a GGUF file: its tensors by Hugging Face's names, and its config.json.

    Raises:
        ConfigError: what `read_gguf` refuses; an architecture, key or tensor that is not known, all together.
    """
    file = read_gguf(gguf_file(path))
    meaning = read_config(file)
    tensors, problems = _hf_tensors(file, family(meaning.config), meaning)
    problems = meaning.problems + problems
    if problems:
        shown = problems[:20] + [f"... and {len(problems) - 20} more"] * (len(problems) > 20)
        raise ConfigError("\n  ".join([f"{file.path}: the model is not understood:", *shown]))
    return Stored(path=file.path, tensors=tensors), meaning.config | {"dtype": "float32"}


def notes(path: str | pathlib.Path) -> tuple[str, ...]:
    """What the user should know of the weights."""
    file = read_gguf(gguf_file(path))
    kinds = sorted({tensor.type.name for tensor in file.tensors.values()} - {"F32", "F16", "BF16"})
    if not kinds:
        return ()
    return (
        f"the weights of {file.path.name} are dequantised ({', '.join(kinds)}): close to the original ones, not equal",
    )
