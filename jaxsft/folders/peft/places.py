"""What PEFT can put an adapter on, and where A, B and magnitudes of our maps lie in its tensors.

In: a decoder and its family's table. Out: the modules and parameters of transformers' model by name, each with the maps
of ours that lie in it. Several maps in one module (`qkv_proj`) share one pair of tensors: their A's are stacked, and B
has a block for each, so that the rank of the module is the sum of theirs.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np

from jaxsft.folders.weights.layout import Factor, Weight, make_weight
from jaxsft.model.decoder import Decoder
from jaxsft.model.lora import is_parameter, maps_of

PREFIX = "base_model.model."
"""What PEFT puts in front of the names of a model's modules."""


class Member(NamedTuple):
    """One map of ours, of one layer (or one expert of it), as a part of a place."""

    path: str
    """Such as "layers.self_attn.q_proj"."""
    at: tuple[int, ...]
    """Of its dims that lie in tensors of their own: the layer, or layer and expert."""
    weight: Weight
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def dim(self, letters: Collection[str]) -> tuple[Factor, ...]:
        """The factors of the dim of the stored weight that these letters are; none where it has no such dim."""
        dims = [dim for dim in self.weight.dims if {f.letter for f in dim if f.letter} <= set(letters)]
        return dims[0] if dims else ()

    @property
    def experts(self) -> tuple[Factor, ...]:
        """The factors of the dim of the experts, where they lie in one tensor."""
        return () if "e" in (*self.inputs, *self.outputs) else self.dim("e")


class Place(NamedTuple):
    """A module of transformers' model that PEFT can put an adapter on, or a parameter of one."""

    name: str
    """Such as "model.layers.0.self_attn.qkv_proj"; of a parameter it ends with that parameter's own name."""
    kind: Literal["linear", "conv", "embedding", "parameter"]
    """A conv stores its weight [in, out] (GPT-2's Conv1D)."""
    members: tuple[Member, ...]
    group: str
    """The name with `{l}` for the layer: places of one group differ in nothing else."""

    @property
    def is_head(self) -> bool:
        """PEFT's "all-linear" leaves the output projection out."""
        return self.members[0].path == "lm_head"

    @property
    def num_inputs(self) -> int:
        first = self.members[0]
        return math.prod(factor.size for factor in first.dim(first.inputs))

    @property
    def num_outputs(self) -> int:
        first = self.members[0]
        return math.prod(factor.size for factor in first.dim(first.outputs))

    @property
    def num_experts(self) -> int:
        return math.prod(factor.size for factor in self.members[0].experts)

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors, by their words in names."""
        a, b = ("lora_embedding_A", "lora_embedding_B") if self.kind == "embedding" else ("lora_A", "lora_B")
        rows = rank * self.num_experts
        return {
            a: (rows, self.num_inputs),
            b: (self.num_outputs, rows),
            "lora_magnitude_vector": (self.num_outputs,),
        }


class Files(NamedTuple):
    """How the tensors of a place are called."""

    a: str
    b: str
    magnitude: str


def places_of(decoder: Decoder, family: ModuleType, *, vocab_size: int, as_in_files: bool = False) -> dict[str, Place]:
    """Everything in a model that PEFT can put an adapter on, by name, in the model's order.

    Args:
        decoder: abstract or not.
        family: the module of its family.
        vocab_size: rows of the vocabulary in files.
        as_in_files: as transformers had models before version 5, with modules for each expert.
    """
    table = dict(family.WEIGHTS) | ({} if as_in_files else getattr(family, "IN_MEMORY", {}))
    groups: dict[str, tuple[str, str]] = {}
    members: dict[str, list[Member]] = {}
    for place in maps_of(decoder):
        template, layout = table[f"{place.path}.weight"]
        sizes = {**decoder.config.sizes, **place.sizes, "v": vocab_size}
        weight = make_weight(f"{place.path}.weight", place.axes, template, layout, sizes)
        as_parameter = is_parameter(place, family) and not as_in_files
        if place.leading:
            weight = dataclasses.replace(weight, layers=decoder.config.layers_of(place.path))
        for index in weight.indices():
            name = weight.name(index)
            if not as_parameter:
                name, template = name.removesuffix(".weight"), template.removesuffix(".weight")
            member = Member(place.path, index, weight, tuple(place.inputs.split()), tuple(place.outputs.split()))
            members.setdefault(name, []).append(member)
            groups[name] = (_kind(member, is_parameter=as_parameter), template)
    return {
        name: Place(name, kind, tuple(members[name]), template)  # type: ignore[arg-type]
        for name, (kind, template) in groups.items()
    }


def _kind(member: Member, *, is_parameter: bool) -> str:
    if is_parameter:
        return "parameter"
    if member.path == "embed_tokens":
        return "embedding"
    dims = member.weight.dims
    return "conv" if dims.index(member.dim(member.inputs)) < dims.index(member.dim(member.outputs)) else "linear"


def file_names(places: Iterable[Place]) -> dict[str, Files]:
    """How the tensors of some places are called, which are all that have adapters, in the model's order.

    Of several parameters of one module PEFT wraps the module once for each, the first one innermost.
    """
    names = {}
    places = list(places)
    of_module: dict[str, list[str]] = {}
    for place in places:
        if place.kind == "parameter":
            of_module.setdefault(place.name.rpartition(".")[0], []).append(place.name)
    for place in places:
        if place.kind == "embedding":
            full = PREFIX + place.name
            names[place.name] = Files(f"{full}.lora_embedding_A", f"{full}.lora_embedding_B", "")
            continue
        full = place.name
        if place.kind == "parameter":
            module = place.name.rpartition(".")[0]
            siblings = of_module[module]
            full = module + ".base_layer" * (len(siblings) - 1 - siblings.index(place.name))
        full = PREFIX + full
        names[place.name] = Files(f"{full}.lora_A.weight", f"{full}.lora_B.weight", f"{full}.lora_magnitude_vector")
    return names


def a_in_file(member: Member, rank: Factor) -> Weight:
    """A of one layer, ours [inputs, r] (of experts [e, inputs, r]), in a tensor [r, in] (of experts [(e r), in])."""
    dims = ((*member.experts, rank), member.dim(member.inputs))
    return _pseudo_weight(member, (*member.inputs, "r"), dims, rank.length)


def b_in_file(member: Member, rank: Factor) -> Weight:
    """B of one layer, ours [r, outputs] (of experts [e, r, outputs]), in a tensor [out, r] (or [out, (r e)])."""
    dims = (member.dim(member.outputs), (rank, *member.experts))
    return _pseudo_weight(member, ("r", *member.outputs), dims, rank.length)


def magnitude_in_file(member: Member) -> Weight:
    """A magnitude of one layer, ours [outputs], in a tensor [out]."""
    return _pseudo_weight(member, member.outputs, (member.dim(member.outputs),), 0)


def _pseudo_weight(member: Member, axes: Sequence[str], dims: tuple[tuple[Factor, ...], ...], rank: int) -> Weight:
    axes = (*("e" for _ in member.experts), *axes)
    sizes = dict(zip(member.weight.axes, member.weight.shape, strict=True)) | {"r": rank}
    return Weight(member.path, tuple(axes), tuple(sizes[letter] for letter in axes), "", 0, dims)


def put(weight: Weight, tensor: np.ndarray, ours: np.ndarray) -> None:
    """Writes ours into its part of a tensor."""
    _part(weight, tensor)[...] = weight.file_order(ours)


def take(weight: Weight, tensor: np.ndarray) -> np.ndarray:
    """Ours out of its part of a tensor: a view of it."""
    part = _part(weight, tensor)
    letters = [factor.letter for factor in weight.factors]
    part = part[tuple(slice(None) if letter else 0 for letter in letters)]
    return part.transpose(weight.to_ours)


def _part(weight: Weight, tensor: np.ndarray) -> np.ndarray:
    assert tensor.shape == weight.file_shape, (weight.path, tensor.shape, weight.file_shape)
    whole = tensor.reshape([factor.size for factor in weight.factors])
    return whole[tuple(slice(factor.start, factor.start + factor.length) for factor in weight.factors)]


def rank_factors(ranks: Iterable[int]) -> Iterator[Factor]:
    """The parts of the members of a place in the rank of the place."""
    ranks = list(ranks)
    for at, rank in enumerate(ranks):
        yield Factor("r", sum(ranks), sum(ranks[:at]), rank)


def short_names(places: Mapping[str, Place]) -> dict[str, str]:
    """For each group of places the shortest end of a name that means all of the group and nothing else."""
    groups = {place.group: place for place in places.values()}
    members: dict[str, list[str]] = {}
    for place in places.values():
        members.setdefault(place.group, []).append(place.name)
    short = {}
    for group, place in groups.items():
        words = group.split(".")
        # Parameters are told from those of other modules by more than their own name.
        for count in range(3 if place.kind == "parameter" else 1, len(words) + 1):
            end = ".".join(words[-count:])
            if "{" in end:
                break
            hits = {other.group for other in places.values() if f".{other.name}".endswith(f".{end}")}
            if hits == {group}:
                short[group] = end
                break
    return short
