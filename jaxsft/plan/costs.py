"""How long a step takes at least: its products, its bytes from and to memory, and what its devices send each other.

In: what is known of a step, and the chips that it runs on. Out: `Bound`s, each a time that no program which does this
work on these chips can fall below. All three may go on at once, so that a step takes at least the longest of them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsft.config import Config
from jaxsft.mesh import ROW_AXES, WIDTH_AXES, cut_axes
from jaxsft.model.abstract import Model
from jaxsft.model.adapter import Frozen
from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.dispatch import block_rows
from jaxsft.plan.topologies import Topology
from jaxsft.training.matmuls import Matmul
from jaxsft.training.metrics import matmul_params, train_flops
from jaxsft.training.program import Collective


class Flops(NamedTuple):
    """Of one step on all devices, in rows of which every token is trained."""

    maps: float
    """Of linear maps in layers, forward and backward."""
    attention: float
    experts: float
    """Of mixtures, their routers not included."""
    loss: float
    again: float
    """Of all these, what remat computes a second time."""
    needed: float
    """Without recomputation, by the formula of the MFU."""

    @property
    def all(self) -> float:
        return self.maps + self.attention + self.experts + self.loss


class Bound(NamedTuple):
    """Seconds that a step takes at least."""

    compute: float
    memory: float
    links: float
    """Between chips."""

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def by(self) -> str:
        """What it is that takes so long."""
        return ("compute", "memory", "links")[self.index(self.seconds)]


def count_flops(
    matmuls: Sequence[Matmul], model: Model, structure: DecoderConfig, config: Config, mesh_shape: Mapping[str, int]
) -> Flops:
    """FLOPs of a step, of its traced products.

    Three loops turn as often as no trace says. The products of the loss are two of each trained token with each row of
    the table, and one more where that is trained. Experts have a turn for each block of choices, here taken to be full.
    Attention in tiles of which some are left out counts by its formula: six products of each pair of tokens, two of
    which remat may compute again.

    Args:
        matmuls: see `read_matmuls`.
        model: of the step.
        structure: of it.
        config: of the run, as it was traced.
        mesh_shape: sizes of its axes.
    """
    length, tokens = config.data.seq_len, config.train.batch_size * config.data.seq_len
    turns = _turns(structure, config, mesh_shape)
    parts, again = {"maps": 0.0, "attention": 0.0, "experts": 0.0}, 0.0
    for each in matmuls:
        part = "attention" if "attention" in each.name else "experts" if each.is_open else "maps"
        if each.is_open and (part == "attention" or "layers" not in each.name):
            continue  # and those of the loss
        flops = each.flops * (each.runs * turns if each.is_open else 1)
        parts[part] += flops
        again += flops * each.is_again
    pairs = sum(_pairs(length, window) for window in structure.windows) * (tokens // length)
    width = structure.num_heads * structure.head_dim
    if tiles := [each for each in matmuls if each.is_open and "attention" in each.name]:
        again_here = 4.0 * width * pairs * any(each.is_again for each in tiles)
        parts["attention"] += 12.0 * width * pairs + again_here
        again += again_here
    table = model.weights["embed_tokens" if structure.tie_embeddings else "lm_head"]["weight"]
    num_products = 2 if isinstance(table, Frozen) else 3
    needed = train_flops(
        matmul_params=matmul_params(model.params, structure),
        frozen_matmul_params=matmul_params(model.frozen, structure),
        tokens=tokens,
        attention_width=width,
        attention_pairs=pairs,
    )
    return Flops(**parts, loss=2.0 * num_products * tokens * math.prod(table.shape), again=again, needed=needed)


def _turns(structure: DecoderConfig, config: Config, mesh_shape: Mapping[str, int]) -> float:
    """Blocks of choices in one layer and microbatch, on all devices together."""
    if structure.routing is None:
        return 0.0
    choices = config.train.microbatch_rows * config.data.seq_len * structure.routing.top_k
    # Of tokens, devices along `expert` gather each other's.
    parts = math.prod(mesh_shape[axis] for axis in (*ROW_AXES, "context") if axis != "expert")
    # Along `tensor`, each has a part of every product.
    return choices / block_rows(choices // parts, structure.routing.num_experts) * mesh_shape["tensor"]


def _pairs(length: int, window: int | None) -> int:
    """(query, key) pairs of one row that is one example."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def memory_bytes(
    model: Model, config: Config, mesh_shape: Mapping[str, int], *, moments: int, activations: int, itemsize: int
) -> float:
    """Bytes that one device at least reads from its memory and writes to it in a step.

    Parameters, moments and gradients are read and written once by the optimizer; in each microbatch all weights, as
    matmuls take them, are read forward and backward, and once more where layers are computed again; what is kept for
    the backward pass is written and read.

    Args:
        model: of the step.
        config: of the run.
        mesh_shape: sizes of its axes.
        moments: bytes of one device.
        activations: that it keeps of a microbatch, bytes.
        itemsize: of the compute dtype, bytes.
    """
    trained, frozen = (_sizes(tree, mesh_shape) for tree in (model.params, model.frozen))
    update = sum(own * (dtype.itemsize + 4) for own, _, dtype in trained) * 2 + moments * 2
    passes = 2 if config.model.remat == "none" else 3
    weights = sum(whole * itemsize for _, whole, _ in trained)
    weights += sum(whole * min(dtype.itemsize, itemsize) for _, whole, dtype in frozen)
    return update + config.train.num_microbatches * (passes * weights + 2 * activations)


def _sizes(tree: Any, mesh_shape: Mapping[str, int]) -> list[tuple[int, int, Any]]:
    """Of each weight the numbers that a device holds, and works with, and their dtype."""
    found = []
    for leaf in jax.tree.leaves(tree, is_leaf=_is_variable):
        own = whole = math.prod(leaf.shape)
        for axis in (axis for cut in cut_axes(leaf.get_metadata("axes")) for axis in cut):
            own //= mesh_shape[axis]
            whole //= 1 if axis in WIDTH_AXES and not _is_of_experts(leaf, axis) else mesh_shape[axis]
        found.append((own, whole, jnp.dtype(leaf.dtype)))
    return found


def _is_of_experts(leaf: Any, axis: str) -> bool:
    """Whether a mesh axis cuts the number of experts, which stays so in a layer."""
    return axis == "expert" and "e" in leaf.get_metadata("axes").split()


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def expected_collectives(
    model: Model, structure: DecoderConfig, config: Config, mesh_shape: Mapping[str, int], *, itemsize: int
) -> list[Collective]:
    """What a step sends, by a formula: where there is no compiled program to count in, and to compare meshes.

    Each weight that is cut by its width is gathered forward and backward in each microbatch, and its float32 gradient
    reduced; copies along `data` sum up their gradients once a step; along `tensor` each layer sums up tokens twice
    forward and four times backward, along `context` it gathers keys and values and reduces their gradients.
    """
    microbatches, layers = config.train.num_microbatches, len(structure.layers)
    found: list[Collective] = []

    def add(kind: str, axes: Iterable[str], num_bytes: float, times: int) -> None:
        along = tuple(axis for axis in axes if mesh_shape[axis] > 1)
        if along and num_bytes:
            found.append(Collective(kind, along, int(num_bytes), times, "", is_async=False, is_open=False))

    for tree, is_trained in ((model.params, True), (model.frozen, False)):
        for leaf in jax.tree.leaves(tree, is_leaf=_is_variable):
            ((own, whole, dtype),) = _sizes(leaf, mesh_shape)
            axes = [
                axis
                for cut in cut_axes(leaf.get_metadata("axes"))
                for axis in cut
                if axis in WIDTH_AXES and not _is_of_experts(leaf, axis)
            ]
            add("all-gather", axes, whole * min(dtype.itemsize, itemsize), 2 * microbatches)
            if is_trained:
                add("reduce-scatter", axes, whole * 4, microbatches)
                add("all-reduce", ("data",), own * 4, 1)
    rows = config.train.microbatch_rows // math.prod(mesh_shape[axis] for axis in ROW_AXES)
    of_row = config.data.seq_len * itemsize
    hidden = rows * of_row // mesh_shape["context"] * structure.hidden_size
    add("all-reduce", ("tensor",), hidden, 6 * layers * microbatches)
    attending = len(structure.layers_of("layers.self_attn"))
    keys = 2 * rows * of_row * structure.num_kv_heads * structure.head_dim // mesh_shape["tensor"]
    add("all-gather", ("context",), keys, (1 if config.model.remat == "none" else 2) * attending * microbatches)
    add("reduce-scatter", ("context",), keys * 4 // itemsize, attending * microbatches)
    return found


def link_seconds(collectives: Iterable[Collective], mesh_shape: Mapping[str, int], topology: Topology) -> float:
    """Seconds in which one chip can receive what a step sends it, at the full rate of all its links.

    Of n devices each receives (n - 1) / n of what is gathered, reduced or exchanged, and that twice of what is reduced
    and gathered again. Where links do not reach all n, what comes from beyond them comes by the network.
    """
    chip = topology.chip
    if chip is None:
        return 0.0
    seconds = 0.0
    for each in collectives:
        sizes = {axis: mesh_shape[axis] for axis in each.axes}
        count = math.prod(sizes.values())
        received = each.num_bytes * each.times * (2 if each.kind == "all-reduce" else 1) / max(count, 1)
        if topology.num_slices > 1 and "data" in sizes:
            near = count // topology.num_slices
        else:
            near = min(count, chip.linked or count)
        seconds += received * (near - 1) / chip.link_rate + received * (count - near) / chip.network_rate
    return seconds


def bound_of(flops: Flops, num_bytes: float, links: float, topology: Topology) -> Bound | None:
    """The least time of a step; None where nothing is known of the chip.

    Args:
        flops: of all devices.
        num_bytes: of one device, see `memory_bytes`.
        links: seconds, see `link_seconds`.
        topology: that it runs on.
    """
    chip = topology.chip
    if chip is None:
        return None
    return Bound(flops.all / topology.num_chips / chip.flops, num_bytes / chip.memory_rate, links)
