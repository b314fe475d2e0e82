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

from jaxsft.config import KEYS_OF, OptimConfig
from jaxsft.mesh import DIM_AXES, ROW_AXES, WIDTH_AXES, AnyMesh, in_scope, shardings
from jaxsft.model.abstract import Model
from jaxsft.model.adapter import of_layers
from jaxsft.model.decoder import Decoder
from jaxsft.model.dispatch import WEIGHTS_AT_ONCE
from jaxsft.model.quantized_maps import with_plain_weights
from jaxsft.training.chunks import chunk_size
from jaxsft.training.loss import is_in_blocks
from jaxsft.training.loss_in_blocks import block_rows
from jaxsft.training.optimizers.params import sides
from jaxsft.training.step import abstract_state

UNPACKED_BYTES = 16
"""For each quantised number of a layer, what it takes to unpack it: XLA unpacks the maps of a layer at once, in
float32. Seen in compiled programs (docs/memory.md)."""


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
    """What it needs at once: less than all of them together, as the loss is done when the layers' backward begins."""

    @property
    def largest(self) -> Term:
        """What it would help most to lower."""
        return max(self.terms, key=lambda term: term.num_bytes)


NAMES = ("parameters", "frozen", "optimizer", "gradients", "activations", "one layer", "loss")
"""`activations` is what all layers keep for the backward pass, `one layer` what is computed again and made of it in the
backward pass of one period of layers, its gathered or rounded weights included, `loss` all that the loss makes."""


def where_bytes_go(
    model: Model, optim: OptimConfig, mesh: AnyMesh, *, rows: int, length: int, num_microbatches: int
) -> Bytes:
    """The table of a train step. Nothing is allocated or compiled; the model is traced twice, in about a second.

    Args:
        model: whose `params` are trained, and whose `frozen` are not.
        optim: whose moments are counted.
        mesh: of devices that need not be there; an AbstractMesh is one of accelerators.
        rows: of one forward-backward, over all devices.
        length: T.
        num_microbatches: forward-backward passes of a step.
    """
    state = abstract_state(model.params, optim, mesh)
    trained = jax.tree.leaves(state.params)
    # The sum over microbatches, and, where it is not the sum already, what one of them gives.
    gradient_sum = sum(_size(leaf) * 4 for leaf in trained)
    of_one = sum(_num_bytes(leaf) for leaf in trained if num_microbatches > 1 or leaf.dtype != jnp.float32)
    decoder = _of_one_device(nnx.merge(*model), mesh)
    unpacked = with_plain_weights(decoder)
    weights = [_resized(tree, _over_tensor(mesh)) for tree in nnx.split(decoder, nnx.Param, ...)[1:]]
    tokens = rows // math.prod(mesh.shape[axis] for axis in ROW_AXES), length // mesh.shape["context"]
    sizes = {
        "parameters": sum(map(_num_bytes, trained)),
        "frozen": sum(map(_num_bytes, _placed(model.frozen, mesh))),
        "optimizer": sum(map(_num_bytes, jax.tree.leaves(state.opt_state))),
        "gradients": gradient_sum + of_one,
        "activations": _kept_bytes(decoder, weights, tokens),
        "one layer": _layer_bytes(decoder, weights, mesh, tokens) + UNPACKED_BYTES * unpacked // mesh.shape["tensor"],
        "loss": _loss_bytes(decoder, mesh, math.prod(tokens)),
    }
    at_loss = sizes["gradients"]
    if not _is_cpu(mesh):  # There, gradients are made when they are needed; those of former microbatches are there.
        at_loss = gradient_sum if num_microbatches > 1 else 0
    held = sum(sizes[name] for name in ("parameters", "frozen", "optimizer", "activations"))
    peak = held + max(sizes["one layer"] + sizes["gradients"], sizes["loss"] + at_loss)
    frozen = jax.tree.leaves(model.frozen, is_leaf=_is_variable)
    # Some models have a few numbers in each layer that nobody trains.
    is_all_trained = not any(len(sides(leaf.get_metadata("axes"))) > 1 for leaf in frozen)
    lowered_by = _lowered_by(
        nnx.merge(*model), optim, mesh, rows=rows, is_all_trained=is_all_trained, is_quantised=unpacked > 0
    )
    return Bytes(tuple(Term(name, sizes[name], lowered_by[name] if sizes[name] else "") for name in NAMES), peak)


def describe_bytes(found: Bytes, *, limit: int | None = None) -> str:
    """The table as lines for the terminal; `limit` is what a device has, where that is known."""
    of = f" of {_mib(limit)}" if limit is not None else ""
    lines = [f"{'memory':<11}a device needs about {_mib(found.peak)}{of} at once, of:"]
    lines += [f"{'':<11}{term.name:<12}{_mib(term.num_bytes):>16}" for term in found.terms if term.num_bytes]
    lines.append(f"{'':<11}most are {found.largest.name}; fewer with {found.largest.lowered_by}")
    if limit is not None and found.peak > limit:
        lines.append(f"{'WARNING':<11}that is {_mib(found.peak - limit)} more than a device has")
    return "\n".join(lines)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


# One device's part of the model.


def _of_one_device(decoder: Decoder, mesh: AnyMesh) -> Decoder:
    """The decoder as it is to be traced: without kernels, whose arrays are those of the formula.

    Of CPUs, what XLA makes of it there: bfloat16 is computed in float32, and what unrolled layers would compute again
    is found to be there already, and kept.
    """
    for layers in decoder.stacks:
        layers.self_attn.kernel = "xla"
    if _is_cpu(mesh):
        decoder.compute_dtype = jnp.dtype(jnp.float32)
        decoder.remat = "none" if decoder.unroll else decoder.remat
    return decoder


Resize = Callable[[str, int], int]
"""From the letter and the size of a dim to another size."""


def _over_tensor(mesh: AnyMesh) -> Resize:
    """Of heads and MLP widths, the part of one device; the table of the vocabulary is looked up whole."""

    def resize(letter: str, size: int) -> int:
        return size // mesh.shape["tensor"] if DIM_AXES[letter] == ("tensor",) and letter != "v" else size

    return resize


def _resized(tree: Any, resize: Resize) -> Any:
    """Abstract weights (Variables with `axes`), whose dims have other sizes."""

    def of_leaf(leaf: nnx.Variable) -> nnx.Variable:
        sizes = map(resize, leaf.get_metadata("axes").split(), leaf.shape)
        return leaf.replace(jax.ShapeDtypeStruct(tuple(sizes), leaf.dtype))

    return jax.tree.map(of_leaf, tree, is_leaf=_is_variable)


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _kept_bytes(decoder: Decoder, weights: list[Any], tokens: tuple[int, int]) -> int:
    """What the backward pass needs on the device besides weights, these given as [trained, frozen].

    `tokens` are the rows and the positions of one device.
    """
    graphdef, ids = nnx.split(decoder)[0], jax.ShapeDtypeStruct(tokens, jnp.int32)

    def backward(params: Any, frozen: Any, *ids: jax.Array) -> list[jax.Array]:
        def hidden(params: Any) -> jax.Array:
            return nnx.merge(graphdef, params, frozen)(*ids).hidden

        # The function that `vjp` returns is a pytree, whose leaves are what it needs.
        return jax.tree.leaves(jax.vjp(hidden, params)[1])

    jaxpr = jax.make_jaxpr(backward)(*weights, ids, ids, ids).jaxpr
    there = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if equation.primitive.name == "reshape" and there.issuperset(equation.invars):
            there |= set(equation.outvars)  # The same bytes, as periods of layers.
    kept = {each for each in jaxpr.outvars if isinstance(each, Var)} - there
    on_device: list[Any] = [
        each.aval for each in kept if getattr(each.aval, "memory_space", None) != jax.memory.Space.Host
    ]
    return sum(aval.size * aval.dtype.itemsize for aval in on_device)


def _layer_bytes(decoder: Decoder, weights: list[Any], mesh: AnyMesh, tokens: tuple[int, int]) -> int:
    """What one period of layers makes in its backward pass.

    On CPUs, where little is fused: all that it would keep if nothing were computed again. Elsewhere what it would keep
    with remat "none", and as much for the gradients by that. Where the width of weights is cut, or they are rounded for
    matmuls, theirs as well, whole in the compute dtype; where it is cut, the float32 gradient of the largest that is
    trained, before it is reduced to parts.
    """
    period = decoder.config.period

    def kept(num_periods: int, *, unroll: bool) -> int:
        of_some = nnx.merge(*nnx.split(decoder))  # a copy
        layers = decoder.config.layers[:period] * (num_periods * len(decoder.stacks))
        of_some.config = dataclasses.replace(decoder.config, layers=layers)
        of_some.remat, of_some.unroll = "none", unroll
        return _kept_bytes(of_some, _of_periods(weights, period, num_periods), tokens)

    # From one period to the next in a scan, as a scan of one is unrolled, and then keeps all.
    made = kept(1, unroll=True) if _is_cpu(mesh) else 2 * (kept(3, unroll=False) - kept(2, unroll=False))
    trained, all_of_layers = (
        [each for each in jax.tree.leaves(tree, is_leaf=_is_variable) if "l" in each.get_metadata("axes").split()]
        for tree in (_of_periods(weights[:1], period), _of_periods(weights, period))
    )
    is_cut, itemsize = _is_cut(mesh), decoder.compute_dtype.itemsize
    needed = [each for each in all_of_layers if is_cut or each.dtype.itemsize != itemsize]
    made += sum(_at_once(each, mesh, period) * itemsize for each in needed)
    of_one_layer = (
        _at_once(each, mesh, period) // (1 if _is_of_experts(each) else _num_layers(each)) * 4 for each in trained
    )
    return made + is_cut * max(of_one_layer, default=0)


def _at_once(leaf: nnx.Variable, mesh: AnyMesh, period: int) -> int:
    """Numbers of a weight, in all its width, that a device works with at once in a period of layers.

    Of dense layers all; of experts those of the device in one layer, in groups where they are gathered (`dispatch.py`).
    """
    numbers = math.prod(leaf.shape)
    if not _is_of_experts(leaf):
        return numbers
    of_layer = numbers // period // mesh.shape["expert"]
    one = numbers // period // leaf.shape[leaf.get_metadata("axes").split().index("e")]
    return min(of_layer, max(one, WEIGHTS_AT_ONCE // 3)) if _is_cut(mesh) else of_layer


def _num_layers(leaf: nnx.Variable) -> int:
    return leaf.shape[leaf.get_metadata("axes").split().index("l")]


def _is_of_experts(leaf: nnx.Variable) -> bool:
    return "e" in leaf.get_metadata("axes").split()


def _of_periods(weights: list[Any], period: int, num_periods: int = 1) -> list[Any]:
    """Abstract weights of some periods of layers; of a mixer that only some of a period have, of those."""

    def of_leaf(leaf: nnx.Variable) -> nnx.Variable:
        numbers = of_layers(leaf).get("layers", range(period))
        num_layers = sum(number < period for number in numbers) * num_periods
        return _resized(leaf, lambda letter, size: num_layers if letter == "l" else size)

    return [jax.tree.map(of_leaf, tree, is_leaf=_is_variable) for tree in weights]


def _loss_bytes(decoder: Decoder, mesh: AnyMesh, num_tokens: int) -> int:
    """What the loss makes: logits of a chunk, the gradient by hidden states, and its own copy of the table's rows."""
    table = (decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head).weight
    (table_rows, width), is_cut, itemsize = table.shape, _is_cut(mesh), decoder.compute_dtype.itemsize
    with in_scope(mesh):
        in_blocks = is_in_blocks(table)
        at_once = table_rows // mesh.shape["tensor"]
        at_once = block_rows(at_once, width) if in_blocks else at_once
        chunk = chunk_size(num_tokens, at_once)
    # On CPUs logits, exponentials, and where they are the largest; elsewhere logits, and their gradients rounded.
    logits = chunk * at_once * (12 if _is_cpu(mesh) else 4 + itemsize)
    by_hidden = (2 if in_blocks else 1) * num_tokens * width * 4
    copied = at_once * width * itemsize if is_cut or table.dtype.itemsize != itemsize else 0
    reduced = at_once * width * 4 if is_cut and isinstance(table, nnx.Param) else 0
    return logits + by_hidden + copied + reduced


def _is_cpu(mesh: AnyMesh) -> bool:
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"


def _is_cut(mesh: AnyMesh) -> bool:
    """Whether the width of weights is."""
    return any(mesh.shape[axis] > 1 for axis in WIDTH_AXES)


def _placed(tree: Any, mesh: AnyMesh) -> list[Any]:
    """The leaves of abstract weights with their shardings."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings(mesh, tree)), strict=True)
    return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for leaf, sharding in leaves]


def _size(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _num_bytes(leaf: Any) -> int:
    return _size(leaf) * leaf.dtype.itemsize


# What lowers it.


def _lowered_by(
    decoder: Decoder, optim: OptimConfig, mesh: AnyMesh, *, rows: int, is_all_trained: bool, is_quantised: bool
) -> dict[str, str]:
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
    adapters = ["adapters (lora.rank), or some weights alone (train.only)"] if is_all_trained else []
    quantised = [] if is_quantised or is_all_trained else ["model.quantize nf4 (now none)"]
    moments = []
    if "moment_dtype" in KEYS_OF[optim.name] and optim.moment_dtype == "float32":
        moments.append("optim.moment_dtype bfloat16 (now float32)")
    if optim.name not in ("adamw8bit", "adafactor"):
        moments.append(f"optim.name adamw8bit (now {optim.name})")
    found = {
        "parameters": [more],
        "frozen": [*quantised, more],
        "optimizer": [*adapters, *moments, more],
        "gradients": [*adapters, more],
        "activations": [*again, *tokens, "a smaller data.seq_len"],
        "one layer": [*tokens, "mesh.tensor", "a smaller data.seq_len"],
        "loss": [*tokens, "mesh.tensor"],
    }
    return {name: ", or ".join(ways) for name, ways in found.items()}
