"""Which weights of a decoder are trained, where not all are.

In: a decoder, and names of weights. Out: the same decoder with the others frozen: Variables of another type, which
`abstract.py` parts from what is trained.

Frozen weights that only ever enter matmuls are kept in the compute dtype, to which the matmul would cast them: the same
numbers in half the memory. Where layers are trained from some layer on, these become a stack of their own: no gradient
goes further down than the first of them, nor are activations kept below it for that.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsft.config import ConfigError
from jaxsft.model.adapter import Constant, Frozen, LoraParam, of_layers
from jaxsft.model.decoder import Decoder
from jaxsft.model.embedding import Embedding
from jaxsft.model.experts import MixtureMLP, PerExpert
from jaxsft.model.layers import Linear

GROUPS: dict[str, Callable[[str], bool]] = {
    "embeddings": lambda name: name.split(".")[0] in ("embed_tokens", "embed_positions", "lm_head"),
    "norms": lambda name: any("norm" in part for part in name.split(".")),
}
"""Word of `train.only` -> whether a weight is one of these."""


def train_only(decoder: Decoder, words: Sequence[str], weights: Mapping[str, tuple[str, str]]) -> None:
    """Freezes all but some weights of a decoder.

    Args:
        decoder: all of whose weights are trained so far.
        words: of `GROUPS`, ends of names, or regular expressions for whole names, ours or those of files, such as
            "layers.3.mlp.up_proj.weight".
        weights: the family's table, `path: (tensor name, layout)`.

    Raises:
        ConfigError: words that fit nothing, or layers are trained that are not the last ones.
    """
    if problems := regex_problems("train.only", words):
        raise ConfigError("\n".join(problems))
    used: set[str] = set()

    def is_trained(path: str, number: int | None) -> bool:
        ours = path if number is None else path.replace("layers.", f"layers.{number}.", 1)
        theirs = weights[path][0].replace("{l}", str(number)).replace(".{e}", "")
        names = [name for full in (ours, theirs) for name in (full, full.removesuffix(".weight"))]
        hits = [word for word in words if (word in GROUPS and GROUPS[word](ours)) or fits(word, names)]
        used.update(hits)
        return bool(hits)

    whole: dict[str, bool] = {}
    firsts: dict[str, int] = {}
    for path in _paths(decoder):
        if not path.startswith("layers."):
            whole[path] = is_trained(path, None)
            continue
        trained = [is_trained(path, number) for number in decoder.config.layers_of(path)]
        whole[path] = all(trained)
        if any(trained) and not all(trained):
            first = trained.index(True)
            if not all(trained[first:]):
                first = -1
            firsts[path] = first
    if missed := [word for word in words if word not in used]:
        listed = ", ".join(map(repr, missed))
        raise ConfigError(
            f"train.only: {listed} fits no weight of this model; there are {', '.join(GROUPS)}, and names such as "
            f"{', '.join(_paths(decoder)[:4])}"
        )
    if firsts and len(decoder.config.mixers) > 1:
        raise ConfigError(
            f"train.only: {', '.join(firsts)} would be trained in some layers only, which is not possible in a model "
            f"whose layers differ in their parts ({', '.join(decoder.config.mixers)}); name them in all layers"
        )
    if len(set(firsts.values())) > 1 or -1 in firsts.values():
        listed = "\n  ".join(f"{path}: {_from(first)}" for path, first in firsts.items())
        raise ConfigError(
            "train.only: where not all layers are trained, the last ones are, from the same layer on for all weights; "
            f"asked for are\n  {listed}"
        )
    if firsts:
        _part_layers(decoder, next(iter(firsts.values())))

    def is_frozen(path: str) -> bool:
        if path.startswith("last_layers."):
            path = path.removeprefix("last_")
            return not (whole[path] or path in firsts)
        return not whole[path]

    freeze(decoder, is_frozen)


def _from(first: int) -> str:
    return "layers with others after them" if first < 0 else f"layers from {first} on"


def _paths(decoder: Decoder) -> list[str]:
    """Of all weights that can be trained."""
    return [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(decoder, nnx.Param))]


def _part_layers(decoder: Decoder, at: int) -> None:
    """Makes two stacks of the layers: those before `at`, and the others."""
    graphdef, state = nnx.split(decoder.layers)

    def part(begin: int, end: int | None) -> Any:
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[begin:end], state))

    decoder.layers, decoder.last_layers = part(0, at), nnx.data(part(at, None))


def freeze(decoder: Decoder, is_frozen: Callable[[str], bool]) -> None:
    """Makes weights of the model frozen ones, by their paths; matrices in the compute dtype. Adapters stay trained."""
    routers = {id(layers.mlp.router) for layers in decoder.stacks if isinstance(layers.mlp, MixtureMLP)}
    for path, module in list(nnx.iter_graph(decoder)):
        if not isinstance(module, nnx.Module):
            continue
        # A router computes in float32, and so do norms and biases.
        is_matrix = isinstance(module, Linear | PerExpert | Embedding) and id(module) not in routers
        for name, variable in list(vars(module).items()):
            if not isinstance(variable, nnx.Param) or isinstance(variable, LoraParam | Constant):
                continue
            if is_frozen(".".join(map(str, (*path, name)))):
                value = variable.get_value()
                if name == "weight" and is_matrix:
                    value = value.astype(decoder.compute_dtype)
                setattr(module, name, Frozen(value, axes=variable.get_metadata("axes"), **of_layers(variable)))


@jax.jit
def _sums_of_bits(leaves: list[jax.Array]) -> list[jax.Array]:
    def of_leaf(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for dim, size in enumerate(leaf.shape):
            place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dim)
        # Whole numbers: the same sum in any order, so on any mesh.
        factors = place * jnp.uint32(2654435761) ^ (place >> 15)
        return jnp.stack([jnp.sum(bits * (factors | 1), dtype=jnp.uint32), jnp.sum(bits ^ factors, dtype=jnp.uint32)])

    return [of_leaf(leaf) for leaf in leaves]


def frozen_key(frozen: Any) -> str:
    """What changes when frozen weights do, the same on every mesh: what is trained beside them is nothing without them.

    Of each array, two sums over its numbers' bits by their places. No hash that withstands an attacker.
    """
    leaves = jax.tree_util.tree_flatten_with_path(frozen)[0]
    if not leaves:
        return ""
    sums = jax.device_get(_sums_of_bits([leaf for _, leaf in leaves]))
    text = [f"{path} {leaf.dtype} {each.tolist()}" for (path, leaf), each in zip(leaves, sums, strict=True)]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def fits(word: str, names: Sequence[str]) -> bool:
    """Whether a word is one of some names, the end of one, or a regular expression for all of one."""
    return any(name == word or name.endswith(f".{word}") or re.fullmatch(word, name) for name in names)


def regex_problems(key: str, words: Sequence[str]) -> list[str]:
    """A sentence for each word that is no regular expression."""
    problems = []
    for word in words:
        try:
            re.compile(word)
        except re.error as error:
            problems.append(f"{key}: {word!r} is no regular expression: {error}")
    return problems
