"""A model with its adapters in its weights: what is written of each tensor when a run is exported whole.

In: the weights of a model with adapters, and what its base was stored as. Out: for each tensor what makes its values:
the base's own, read again from its files (those in memory were perhaps rounded), plus what the adapters add, in float32
and rounded once when they are written. No more than one tensor is in host memory.
"""

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import NamedTuple

import numpy as np
from flax import nnx

from jaxsft.folders.peft.places import take
from jaxsft.folders.weights.gathering import of_layer, rows_of
from jaxsft.folders.weights.layout import Weight, join, variables_of
from jaxsft.folders.weights.save import Made
from jaxsft.folders.weights.stored import Stored, read_whole
from jaxsft.folders.weights.together import Part, put_together
from jaxsft.model.lora import of_files


class Factors(NamedTuple):
    """An adapter of one layer, float32 on the host."""

    inputs: tuple[str, ...]
    """Letters, such as ("n", "h")."""
    outputs: tuple[str, ...]
    a: np.ndarray
    """[inputs, r]; of experts that lie in one tensor [e, inputs, r]."""
    b: np.ndarray
    """[r, outputs], or [e, r, outputs]."""
    scale: np.ndarray
    magnitude: np.ndarray | None
    """[outputs]"""


def merged_tensors(
    weights: nnx.State,
    family: ModuleType,
    *,
    stored: Stored | None,
    vocab_size: int,
    stored_vocab_size: int,
    token_ids: tuple[int, ...],
    untied: bool,
) -> dict[str, Made]:
    """What makes the values of each tensor, by name.

    Args:
        weights: of the whole model with adapters, Variables with axes.
        family: the module of its family.
        stored: of the base; None where its weights lie nowhere but in `weights`.
        vocab_size: rows of the vocabulary that are written.
        stored_vocab_size: those of the base.
        token_ids: rows that are taken from `weights`.
        untied: an output projection that the base lacks is its embedding.
    """
    variables = variables_of(weights)
    names = stored.tensors if stored is not None else ()
    own = join(of_files(weights), family, vocab_size=vocab_size, stored=names)
    source = join(of_files(weights), family, vocab_size=stored_vocab_size, stored=names, untied=untied)
    parts: dict[str, list[tuple[Part, Weight]]] = {}
    for path, (weight, variable) in own.items():
        for index in weight.indices():
            parts.setdefault(weight.name(index), []).append((Part(weight, variable, index), source[path][0]))

    def make(of_tensor: list[tuple[Part, Weight]], writes: bool) -> np.ndarray | None:
        adapters = [_factors(part, variables) for part, _ in of_tensor]
        table = of_tensor[0][0]
        has_rows = bool(token_ids) and "v" in table.weight.axes
        rows = rows_of(table.variable.get_value(), token_ids) if has_rows else None
        whole = _base(of_tensor, stored, writes=writes)
        if whole is None:
            return None
        if rows is not None:
            grown = np.zeros(table.weight.file_shape, np.float32)
            grown[: len(whole)] = whole
            whole = grown
            whole[list(token_ids)] = rows
        for (part, _), factors in zip(of_tensor, adapters, strict=True):
            if factors is not None:
                _add(part.weight.axes[part.weight.split :], take(part.weight, whole), factors)
        return whole

    return {
        name: Made(
            functools.partial(make, each),
            is_stored=stored is not None and not _changes(each, variables, token_ids),
        )
        for name, each in parts.items()
    }


def _changes(of_tensor: list[tuple[Part, Weight]], variables: Mapping[str, nnx.Variable], ids: tuple[int, ...]) -> bool:
    has_rows = "v" in of_tensor[0][0].weight.axes and bool(ids)
    return has_rows or any(_adapter_of(part, variables) for part, _ in of_tensor)


def _adapter_of(part: Part, variables: Mapping[str, nnx.Variable]) -> str | None:
    path, _, name = part.weight.path.rpartition(".")
    return f"{path}.adapter" if name == "weight" and f"{path}.adapter.a" in variables else None


def _base(of_tensor: list[tuple[Part, Weight]], stored: Stored | None, *, writes: bool) -> np.ndarray | None:
    """float32, in the shape of the file, on the process that writes."""
    part, source = of_tensor[0]
    if stored is None:
        gathered = put_together([part for part, _ in of_tensor], np.dtype(np.float32), keeps=writes)
        whole = None if gathered is None else np.array(gathered)  # what a device has may not be changed
        return whole if whole is None else whole.reshape(part.weight.file_shape)
    if not writes:
        return None
    return read_whole(stored.tensors[source.name(part.at)]).astype(np.float32)


def _factors(part: Part, variables: Mapping[str, nnx.Variable]) -> Factors | None:
    """Of one layer or expert, gathered; on every process."""
    if (path := _adapter_of(part, variables)) is None:
        return None
    layer, expert = part.at[:1], part.at[1:]

    def get(name: str) -> np.ndarray:
        values = of_layer(variables[f"{path}.{name}"].get_value(), layer)
        return values[expert] if name != "scale" else values

    a, b = (variables[f"{path}.{name}"].get_metadata("axes").split() for name in ("a", "b"))
    inputs, outputs = (tuple(each for each in axes[len(part.at) :] if each != "r") for axes in (a, b))
    scale = get("scale")
    magnitude = get("magnitude") if f"{path}.magnitude" in variables and scale > 0 else None
    return Factors(inputs, outputs, get("a"), get("b"), scale, magnitude)


def _add(letters: tuple[str, ...], weight: np.ndarray, factors: Factors) -> None:
    """Adds what an adapter does to a view of a weight, whose dims are `letters`."""
    inputs, outputs, a, b, scale, magnitude = factors
    if "e" in inputs:  # all experts lie in one tensor
        for expert, of_expert in enumerate(weight):
            one = Factors(inputs[1:], outputs[1:], a[expert], b[expert], scale, None)
            _add(letters[1:], of_expert, one)
        return
    delta = scale * (a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[0], -1))
    delta = delta.reshape(*a.shape[:-1], *b.shape[1:])
    delta = delta.transpose([(*inputs, *outputs).index(letter) for letter in letters])
    weight += delta[tuple(slice(0, size) for size in weight.shape)]  # without rows behind the vocabulary
    if magnitude is not None:
        over = tuple(at for at, letter in enumerate(letters) if letter in inputs)
        ratio = magnitude / np.sqrt(np.square(weight).sum(axis=over))
        weight *= ratio[tuple(None if letter in inputs else slice(None) for letter in letters)]
