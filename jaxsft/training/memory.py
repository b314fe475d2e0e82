"""Where the bytes of a step go on one device, before a weight is read.

In: a model without its values, the optimizer and a mesh, and the rows of a forward-backward. Out: `Bytes`, a table of
what a device must hold, and which keys of a config make each entry smaller.

Parameters, moments and gradients are counted by their shapes and shardings. What a backward pass needs of the forward
pass is not guessed by a formula: the model is traced as one device sees it, and what its differentiation keeps is added
up, whatever family, remat policy or adapters it has. The rest is an estimate (docs/memory.md says how good).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Var
from jax.sharding import Mesh

from jaxsft.config import OptimConfig
from jaxsft.mesh import DIM_AXES, ROW_AXES, WIDTH_AXES, shardings
from jaxsft.model.abstract import Model
from jaxsft.model.decoder import Decoder
from jaxsft.training.chunks import chunk_size
from jaxsft.training.loss import is_in_blocks
from jaxsft.training.loss_in_blocks import block_rows
from jaxsft.training.step import abstract_state


class Term(NamedTuple):
    """An entry of the table."""

    name: str
    num_bytes: int
    """Of one device."""
    lowered_by: str
    """Keys of a config, and what to do with them; empty where there is nothing to lower."""


class Bytes(NamedTuple):
    """What one device must hold in a step."""

    terms: tuple[Term, ...]
    """In the order of `NAMES`."""
    peak: int
    """All of them together, of the last two the larger, as they are not needed at the same time."""

    @property
    def largest(self) -> Term:
        """What it would help most to lower."""
        return max(self.terms, key=lambda term: term.num_bytes)


NAMES = ("parameters", "frozen", "optimizer", "gradients", "activations", "one layer", "loss")
"""`activations` is what all layers keep for the backward pass, `one layer` what is computed again and made of it in the
backward pass of one period of layers, its gathered or rounded weights included."""


def where_bytes_go(
    model: Model, optim: OptimConfig, mesh: Mesh, *, rows: int, length: int, num_microbatches: int
) -> Bytes:
    """The table of a train step. Nothing is allocated or compiled; the model is traced twice, in about a second.

    Args:
        model: whose `params` are trained, and whose `frozen` are not.
        optim: whose moments are counted.
        mesh: of devices that need not be there.
        rows: of one forward-backward, over all devices.
        length: T.
        num_microbatches: forward-backward passes of a step.
    """
    state = abstract_state(model.params, optim, mesh)
    trained = jax.tree.leaves(state.params)
    # The sum over microbatches, and, where it is not the sum already, what one of them gives.
    gradients = sum(_size(leaf) * 4 for leaf in trained)
    gradients += sum(_num_bytes(leaf) for leaf in trained if num_microbatches > 1 or leaf.dtype != jnp.float32)
    decoder = _of_one_device(nnx.merge(*model), mesh)
    cut_params, cut_frozen = (_resized(tree, _over_tensor(mesh)) for tree in (model.params, model.frozen))
    tokens = rows // math.prod(mesh.shape[axis] for axis in ROW_AXES), length // mesh.shape["context"]
    kept = _kept_bytes(nnx.split(decoder)[0], cut_params, cut_frozen, tokens)
    table = (decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head).weight
    is_trained = any(leaf.shape == table.shape for leaf in trained)
    loss = _loss_bytes(table, decoder.compute_dtype, mesh, math.prod(tokens), is_trained=is_trained)
    layer = _layer_bytes(decoder, cut_params, cut_frozen, mesh, tokens)
    sizes = {
        "parameters": sum(map(_num_bytes, trained)),
        "frozen": sum(map(_num_bytes, _placed(model.frozen, mesh))),
        "optimizer": sum(map(_num_bytes, jax.tree.leaves(state.opt_state))),
        "gradients": gradients,
        "activations": kept,
        "one layer": layer,
        "loss": loss,
    }
    lowered_by = _lowered_by(decoder, optim, mesh, rows=rows)
    terms = tuple(Term(name, sizes[name], lowered_by[name] if sizes[name] else "") for name in NAMES)
    return Bytes(terms, sum(sizes.values()) - min(layer, loss))


def describe_bytes(found: Bytes, *, limit: int | None = None) -> str:
    """The table as lines for the terminal; `limit` is what a device has, where that is known."""
    shown = [term for term in found.terms if term.num_bytes]
    lines = [f"  {term.name:<12}{_mib(term.num_bytes):>14}  {term.num_bytes / found.peak:4.0%}" for term in shown]
    of = f" of {_mib(limit)}" if limit is not None else ""
    lines.insert(0, f"each device needs about {_mib(found.peak)}{of} (`one layer` or `loss`, whichever is larger):")
    lines.append(f"  largest: {found.largest.name}; smaller with {found.largest.lowered_by}")
    if limit is not None and found.peak > limit:
        lines.append(f"  WARNING: that is {_mib(found.peak - limit)} more than a device has")
    return "\n".join(lines)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


# One device's part of the model.


def _of_one_device(decoder: Decoder, mesh: Mesh) -> Decoder:
    """The decoder as it is to be traced: without kernels, whose arrays are those of the formula.

    Of CPUs, what XLA makes of it there: bfloat16 is computed in float32, and what unrolled layers would compute again
    is found to be there already, and kept.
    """
    decoder.layers.self_attn.kernel = "xla"
    if mesh.devices.flat[0].platform == "cpu":
        decoder.compute_dtype = jnp.dtype(jnp.float32)
        decoder.remat = "none" if decoder.unroll else decoder.remat
    return decoder


Resize = Callable[[str, int], int]
"""From the letter and the size of a dim to another size."""


def _over_tensor(mesh: Mesh) -> Resize:
    """Of heads and MLP widths, the part of one device; the table of the vocabulary is looked up whole."""

    def resize(letter: str, size: int) -> int:
        return size // mesh.shape["tensor"] if DIM_AXES[letter] == ("tensor",) and letter != "v" else size

    return resize


def _resized(tree: Any, resize: Resize) -> Any:
    """Abstract weights (Variables with `axes`), whose dims have other sizes."""

    def of_leaf(leaf: nnx.Variable) -> nnx.Variable:
        sizes = map(resize, leaf.get_metadata("axes").split(), leaf.shape)
        return leaf.replace(jax.ShapeDtypeStruct(tuple(sizes), leaf.dtype))

    return jax.tree.map(of_leaf, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _kept_bytes(graphdef: Any, params: Any, frozen: Any, tokens: tuple[int, int]) -> int:
    """What the backward pass from hidden states [B, T, D] = `tokens` needs besides weights, on the device."""
    ids = jax.ShapeDtypeStruct(tokens, jnp.int32)

    def backward(params: Any, frozen: Any, *ids: jax.Array) -> list[jax.Array]:
        def hidden(params: Any) -> jax.Array:
            return nnx.merge(graphdef, params, frozen)(*ids).hidden

        # The function that `vjp` returns is a pytree, whose leaves are what it needs.
        return jax.tree.leaves(jax.vjp(hidden, params)[1])

    jaxpr = jax.make_jaxpr(backward)(params, frozen, ids, ids, ids).jaxpr
    kept = {each for each in jaxpr.outvars if isinstance(each, Var)} - set(jaxpr.invars)
    on_device: list[Any] = [
        each.aval for each in kept if getattr(each.aval, "memory_space", None) != jax.memory.Space.Host
    ]
    return sum(aval.size * aval.dtype.itemsize for aval in on_device)


def _layer_bytes(decoder: Decoder, params: Any, frozen: Any, mesh: Mesh, tokens: tuple[int, int]) -> int:
    """What one period of layers makes in its backward pass: all that it would keep if nothing were computed again.

    Where the width of weights is cut, or they are rounded for matmuls, theirs as well, whole in the compute dtype;
    where it is cut, the float32 gradient of the largest, before it is reduced to parts.
    """
    period = decoder.config.period
    decoder.config = dataclasses.replace(decoder.config, layers=decoder.config.layers[:period])
    decoder.remat, decoder.unroll = "none", True

    def one_period(letter: str, size: int) -> int:
        return period if letter == "l" else size

    params, frozen = (_resized(tree, one_period) for tree in (params, frozen))
    made = _kept_bytes(nnx.split(decoder)[0], params, frozen, tokens)
    weights = [
        leaf
        for tree in (params, frozen)
        for leaf in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        if leaf.get_metadata("axes").startswith("l ")
    ]
    is_cut = any(mesh.shape[axis] > 1 for axis in WIDTH_AXES)
    itemsize = decoder.compute_dtype.itemsize
    made += sum(math.prod(leaf.shape) * itemsize for leaf in weights if is_cut or leaf.dtype.itemsize != itemsize)
    return made + is_cut * max(math.prod(leaf.shape) // period * 4 for leaf in weights)


def _loss_bytes(table: Any, compute_dtype: jnp.dtype, mesh: Mesh, num_tokens: int, *, is_trained: bool) -> int:
    """What the loss makes: logits of a chunk, the gradient by hidden states, and its own copy of the table's rows."""
    table_rows, width = table.shape
    is_cut = any(mesh.shape[axis] > 1 for axis in WIDTH_AXES)
    with jax.set_mesh(mesh):
        in_blocks = is_in_blocks(table)
        at_once = table_rows // mesh.shape["tensor"]
        at_once = block_rows(at_once, width) if in_blocks else at_once
        chunk = chunk_size(num_tokens, at_once)
    # Logits and their exponentials, or what becomes of them; on CPUs the comparison with the largest besides.
    num_logits = 3 if mesh.devices.flat[0].platform == "cpu" else 2
    by_hidden = (2 if in_blocks else 1) * num_tokens * width * 4
    rows = at_once * width
    copied = rows * compute_dtype.itemsize if is_cut or table.dtype != compute_dtype else 0
    reduced = rows * 4 if is_cut and is_trained else 0
    return num_logits * 4 * chunk * at_once + by_hidden + copied + reduced


def _placed(tree: Any, mesh: Mesh) -> list[Any]:
    """The leaves of abstract weights with their shardings."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings(mesh, tree)), strict=True)
    return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for leaf, sharding in leaves]


def _size(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _num_bytes(leaf: Any) -> int:
    return _size(leaf) * leaf.dtype.itemsize


# What lowers it.


def _lowered_by(decoder: Decoder, optim: OptimConfig, mesh: Mesh, *, rows: int) -> dict[str, str]:
    """Keys that are not at their lowest already, for each entry."""
    shares = math.prod(mesh.shape[axis] for axis in ROW_AXES)
    more = "more devices along mesh.fsdp"
    if mesh.shape["data"] > 1:
        more = f"devices along mesh.fsdp instead of mesh.data (now {mesh.shape['data']})"
    tokens = []
    if rows > shares:
        tokens.append(f"train.microbatch_size {shares} (now {rows})")
    tokens += [more, "devices along mesh.context" if mesh.shape["context"] == 1 else "more along mesh.context"]
    less_kept = {"none": "attention, or full", "attention": "full", "full": "offload", "offload": ""}
    remat = less_kept[decoder.remat]
    again = [f"model.remat {remat} (now {decoder.remat})"] if remat else []
    moments = ["optim.moment_dtype bfloat16 (now float32)"] if optim.moment_dtype == "float32" else []
    found = {
        "parameters": [more],
        "frozen": [more],
        "optimizer": [*moments, more],
        "gradients": [more],
        "activations": [*again, *tokens, "a smaller data.seq_len"],
        "one layer": [*tokens, "mesh.tensor", "a smaller data.seq_len"],
        "loss": [*tokens, "mesh.tensor"],
    }
    return {name: ", or ".join(ways) for name, ways in found.items()}
