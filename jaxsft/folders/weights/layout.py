"""Which tensors of a Hugging Face model are which weights of ours, read from the tables of `model/families/`.

In: a state of Variables with `axes`, and the family's table `path: (tensor name, layout)`. Out: a `Weight` for each, by
which `load.py` reads and `save.py` writes. The language of the table:

    {l} {e}         in a name: the dims of ours that lie in tensors of their own
    "(n h) d"       dims of one tensor in the order of the file; a group is one dim there
    "(n+k*+k h) d"  a dim that several weights share; this one lies at the term with the star
    "d (f 1*+1)"    1 is a term of size 1: even columns are this weight's, odd columns another's
    ""              a tensor without dims: one number, with us a dim of size 1
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxsft.model.adapter import of_layers
from jaxsft.model.quantized import Layout

Box = tuple[tuple[int, int], ...]
"""First and last + 1 of each dim."""


@dataclasses.dataclass(frozen=True)
class Factor:
    """One factor of a dim of a tensor, of `size` in the file; the weight lies at [start, start + length)."""

    letter: str | None
    """The dim of ours that it is; None: it only says where we lie, and is no dim of ours."""
    size: int
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of ours, and how it lies in files.

    Worked example: k_proj with axes "l d k h", shape [2, 64, 4, 8] and the line
    ("layers.{l}.qkv.weight", "(n+k*+k h) d") of a model with 8 query heads lies in the tensors layers.0.qkv.weight and
    layers.1.qkv.weight of `file_shape` [128, 64]; seen as [16, 8, 64], it is [8:12, :, :] of each, and transposed by
    `to_ours` (2, 0, 1) that is one layer of ours, [64, 4, 8].
    """

    path: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    """Of ours; the vocabulary as large as in the files."""
    template: str
    """Name of the tensors, with the dims that are `split` in braces."""
    split: int
    """How many of our leading dims lie in tensors of their own."""
    dims: tuple[tuple[Factor, ...], ...]
    """The factors of each dim of a tensor."""
    layers: tuple[int, ...] | None = None
    """Numbers of our layers, where we are some of the layers."""
    is_scalar: bool = False
    """A tensor is one number, and has no dims; `dims` has one of size 1."""

    @property
    def factors(self) -> tuple[Factor, ...]:
        return tuple(factor for dim in self.dims for factor in dim)

    @property
    def file_shape(self) -> tuple[int, ...]:
        return () if self.is_scalar else tuple(math.prod(factor.size for factor in dim) for dim in self.dims)

    @property
    def to_ours(self) -> tuple[int, ...]:
        letters = [factor.letter for factor in self.factors if factor.letter]
        return tuple(letters.index(letter) for letter in self.axes[self.split :])

    def name(self, index: tuple[int, ...]) -> str:
        """The tensor that holds our weight at `index` of its split dims."""
        at = dict(zip(self.axes, index))  # noqa: B905 (only the split dims have an index)
        if self.layers is not None and "l" in at:
            at["l"] = self.layers[at["l"]]
        return self.template.format(**at)

    def indices(self) -> Iterator[tuple[int, ...]]:
        """The indices of the split dims; one empty one where there are none."""
        return itertools.product(*map(range, self.shape[: self.split]))

    def in_file(self, box: Box) -> Box:
        """The part of a tensor, factor by factor, that is the part `box` of ours (without the split dims)."""
        bounds = dict(zip(self.axes[self.split :], box, strict=True))
        ours = [bounds[factor.letter] if factor.letter else (0, factor.length) for factor in self.factors]
        return tuple((f.start + first, f.start + last) for f, (first, last) in zip(self.factors, ours, strict=True))

    def file_order(self, ours: np.ndarray) -> np.ndarray:
        """A view of our weight (without the split dims), or of a part of it, with its dims in the order of the file.

        A factor that is no dim of ours has size 1.
        """
        view = ours.transpose(np.argsort(self.to_ours))
        return view[tuple(None if factor.letter is None else slice(None) for factor in self.factors)]


def join(
    state: nnx.State, family: ModuleType, *, vocab_size: int, stored: Collection[str] = (), untied: bool = False
) -> dict[str, tuple[Weight, nnx.Variable]]:
    """The weights of a state by path, in the order of the family's table.

    Args:
        state: Variables with axes, of arrays or abstract. A quantised weight is an abstract one here.
        family: the module with the table.
        vocab_size: rows of the vocabulary in the files; the state has more.
        stored: names of the tensors in the files: where none of them begins with the prefix of the table's names, the
            model was saved without its head, and names have no prefix.
        untied: an output projection that the files lack is read from the embedding.
    """
    variables = whole_weights(variables_of(state))
    lines = {path.removeprefix("last_") for path in variables}
    assert lines <= family.WEIGHTS.keys(), lines - family.WEIGHTS.keys()
    letters: dict[str, int] = {}
    for variable in variables.values():
        letters |= zip(variable.get_metadata("axes").split(), variable.shape, strict=True)
    table = dict(family.WEIGHTS)
    if stored and not any(name.startswith(base_prefix(family)) for name in stored):
        table = {path: (name.removeprefix(base_prefix(family)), layout) for path, (name, layout) in table.items()}
    if untied and table["lm_head.weight"][0] not in stored:
        table["lm_head.weight"] = table["embed_tokens.weight"]
    joined = {}
    for line, (template, layout) in table.items():
        first_layer = 0
        for path in (line, f"last_{line}"):  # the last layers may be a stack of their own
            if path in variables:
                axes = tuple(variables[path].get_metadata("axes").split())
                sizes = letters | dict(zip(axes, variables[path].shape, strict=True)) | {"v": vocab_size}
                weight = make_weight(path, axes, template, layout, sizes)
                layers = variables[path].get_metadata().get("layers")
                if "l" in axes and layers is None and first_layer:
                    layers = tuple(range(first_layer, first_layer + sizes["l"]))
                joined[path] = (dataclasses.replace(weight, layers=layers), variables[path])
                first_layer = sizes["l"] if "l" in axes else 0
    check_tiling([weight for weight, _ in joined.values() if not (untied and weight.path == "lm_head.weight")])
    return joined


def variables_of(state: nnx.State) -> dict[str, nnx.Variable]:
    """The Variables of a state by path, such as "layers.mlp.up_proj.weight"."""
    leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))[0]
    return {path_text(path): variable for path, variable in leaves}


def whole_weights(variables: Mapping[str, nnx.Variable]) -> dict[str, nnx.Variable]:
    """Variables by path, those of a quantised weight as the abstract one that they stand for (`is_quantized`).

    Of `x.weight.codes`, whose `layout` says what they are codes of, and its absmax this makes `x.weight`.
    """
    whole: dict[str, nnx.Variable] = {}
    for path, variable in variables.items():
        parent, _, part = path.rpartition(".")
        if part == "codes":
            layout: Layout = variable.get_metadata("layout")
            shape = (*variable.shape[: len(layout.leading.split())], *layout.shape)
            parts = {name: variables[f"{parent}.{name}"] for name in layout.axes}
            abstract = jax.ShapeDtypeStruct(shape, np.dtype(np.float32))
            whole[parent] = nnx.Variable(abstract, axes=layout.ours, quantized=parts, **of_layers(variable))
        elif f"{parent}.codes" not in variables:
            whole[path] = variable
    return whole


def is_quantized(variable: nnx.Variable) -> bool:
    """Whether it stands for others, by name in its `quantized`."""
    return "quantized" in variable.get_metadata()


def path_text(path: tuple[Any, ...]) -> str:
    return ".".join(str(key.key) for key in path)


def base_prefix(family: ModuleType) -> str:
    """What transformers puts in front of the names of a model that has a head: "model.", "transformer.", ..."""
    return family.WEIGHTS["embed_tokens.weight"][0].split(".")[0] + "."


def make_weight(path: str, axes: tuple[str, ...], template: str, layout: str, sizes: Mapping[str, int]) -> Weight:
    """Reads one line of a table; `sizes` has those of all letters that the layout names."""
    split = tuple(re.findall(r"{(\w)}", template))
    assert split == axes[: len(split)], (path, axes, template)
    inner = layout or " ".join(axes[len(split) :])
    groups = [group or letter for group, letter in re.findall(r"\(([^()]*)\)|(\S+)", inner)]
    dims = tuple(tuple(_factor(text, sizes) for text in group.split()) for group in groups)
    letters = [factor.letter for dim in dims for factor in dim if factor.letter]
    assert sorted(letters) == sorted(axes[len(split) :]), (path, axes, template, layout)
    shape = tuple(sizes[letter] for letter in axes)
    return Weight(path, axes, shape, template, len(split), dims, is_scalar=not layout)


def _factor(text: str, sizes: Mapping[str, int]) -> Factor:
    """ "n" or "n+k*+k" """
    terms = text.split("+")
    starred = [at for at, term in enumerate(terms) if term.endswith("*")] or [0]
    assert len(starred) == 1 and (len(terms) == 1 or terms[starred[0]].endswith("*")), text
    lengths = [1 if term.rstrip("*") == "1" else sizes[term.rstrip("*")] for term in terms]
    letter = terms[starred[0]].rstrip("*")
    return Factor(
        letter=None if letter == "1" else letter,
        size=sum(lengths),
        start=sum(lengths[: starred[0]]),
        length=lengths[starred[0]],
    )


def check_tiling(weights: list[Weight]) -> None:
    """Weights that lie in one tensor must fill it, without overlap; only the tables can be wrong about that."""
    by_template: dict[str, list[Weight]] = {}
    for weight in weights:
        # Some of the layers are not in the way of others.
        by_template.setdefault(f"{weight.template} of {weight.layers}", []).append(weight)
    for template, sharing in by_template.items():
        first = sharing[0]
        assert len({(weight.file_shape, weight.axes[: weight.split]) for weight in sharing}) == 1, template
        marks = [[_marks(dim) for dim in weight.dims] for weight in sharing]
        # They differ in one dim of the file at most, and there they are added up.
        shared = [at for at in range(len(first.dims)) if not all(each[at].all() for each in marks)]
        assert len(shared) <= 1, (template, [weight.path for weight in sharing])
        filled = sum(each[shared[0]].astype(int) for each in marks) if shared else np.array(len(marks))
        assert np.all(filled == 1), (template, [weight.path for weight in sharing])


def _marks(dim: tuple[Factor, ...]) -> np.ndarray:
    """Which indices of a dim of the file are a weight's."""
    marks = np.zeros([factor.size for factor in dim], bool)
    marks[tuple(slice(factor.start, factor.start + factor.length) for factor in dim)] = True
    return marks.reshape(-1)
