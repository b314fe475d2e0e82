"""The device mesh, and the one table from the letter of a dim to its mesh axis.

In: the `mesh` section, and arrays that name their dims by letters. Out: a mesh, and the sharding of each array on it.

Every parameter is born with the letters of its dims (`"l d n h"`) and every activation is constrained by its letters
(`"b t d"`); `DIM_AXES` says over which mesh axis each letter is cut. Nothing else in the program decides a sharding.
"""

import contextlib
import math
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsft.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "expert", "context", "tensor")

AnyMesh: TypeAlias = Mesh | AbstractMesh
"""A mesh of devices, which may be those of another machine; or of none, for shapes alone."""

DIM_AXES: dict[str, tuple[str, ...]] = {
    "b": ("data", "fsdp", "expert"),
    "u": ("data",),
    "t": ("context",),
    "d": ("fsdp", "expert", "context"),
    "n": ("tensor",),
    "k": ("tensor",),
    "f": ("tensor",),
    "v": ("tensor",),
    "e": ("expert",),
    "p": (),
    "a": (),
    "c": (),
    "g": (),
    "h": (),
    "i": ("tensor",),
    "j": (),
    "l": (),
    "m": ("tensor",),
    "z": (),
    "o": ("tensor", "fsdp", "expert", "context"),
    "r": (),
    "s": (),
    "w": (),
}
"""Letter of a dim (the glossary of names) to the mesh axes that it is cut over, where no dim before it is (`cut_axes`).

Devices that have different tokens have the same weights to work with, so the width of weights is cut over all of them
but those along `data`, which are copies: that of experts, whose number is cut over `expert`, over the others. `c` are
blocks of numbers that share a scale, of which some meshes would cut the dim into uneven parts. `u` are
rows on the way out of a table that is cut by its width (`"u p d"`, positions not cut): the same bytes per device as
`"b t d"`. `o`, `i` and `j` are of quantised weights (`quantized.py`): rows of codes, and the bytes of a row, cut and
not. `z` is a dim of size 1, of what has one number in each layer.
"""

ROW_AXES = DIM_AXES["b"]
TOKEN_AXES = (*ROW_AXES, *DIM_AXES["t"])
"""Along these, devices have different tokens."""

WIDTH_AXES = DIM_AXES["d"]
COPY_AXES = tuple(axis for axis in TOKEN_AXES if axis not in WIDTH_AXES)
"""Along these, devices have different tokens, and the same parts of all weights."""


def cut_axes(axes: str) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that cut each dim of an array, of whose letters `axes` is made; axes of size 1 among them.

    A mesh axis cuts one dim at most, the first that asks for it: of `"v d"`, the width is cut over
    `("fsdp", "expert", "context")`, and of `"e d f"` over `("fsdp", "context")`.
    """
    used: set[str] = set()
    cut = []
    for letter in axes.split():
        cut.append(tuple(axis for axis in DIM_AXES[letter] if axis not in used))
        used.update(cut[-1])
    return tuple(cut)


def partition_spec(axes: str, *, over: Collection[str] = AXES) -> PartitionSpec:
    """The PartitionSpec of an array whose dims are named by letters, by `cut_axes`.

    `"b t d"` gives `P(("data", "fsdp", "expert"), "context", None)`, `"v d"` gives
    `P("tensor", ("fsdp", "expert", "context"))`, and `P("tensor", None)` where it is cut over `("tensor",)` only. Axes
    that are not free (`free_axes`) are not named.
    """
    named = free_axes(over)
    spec: list[Any] = []
    for cut in cut_axes(axes):
        cut = tuple(axis for axis in cut if axis in named)
        spec.append(cut[0] if len(cut) == 1 else cut or None)
    return PartitionSpec(*spec)


def free_axes(axes: Collection[str]) -> tuple[str, ...]:
    """Those of some mesh axes that are the partitioner's, where arrays are whole along them.

    Along the others `jax.shard_map` is under way: arrays are a device's own part, and what is summed up over tokens
    here is one summand of several.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in axes if axis not in manual)


def in_scope(mesh: AnyMesh) -> contextlib.AbstractContextManager[Any]:
    """Puts a mesh into scope; under one of shapes alone, functions can be traced."""
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh)


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """Pins the sharding of an activation inside jit, by the letters of its dims; without a mesh in scope, nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def num_parts(letter: str) -> int:
    """Into how many parts the mesh in scope cuts a dim of this letter; without one, it is whole."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in free_axes(DIM_AXES[letter]))


def is_cut_evenly(shape: Sequence[int], axes: str) -> bool:
    """Whether the mesh in scope cuts each dim of an array into equal parts; without one, it does."""
    sizes = jax.sharding.get_abstract_mesh().shape
    ways = (math.prod(sizes.get(axis, 1) for axis in free_axes(cut)) for cut in cut_axes(axes))
    return all(size % number == 0 for size, number in zip(shape, ways, strict=True))


def shardings(mesh: AnyMesh, tree: Any) -> Any:
    """The sharding of each leaf of a state: parameters and moments by their `axes`, all other leaves replicated.

    `tree` is any pytree whose weights are `nnx.Variable`s with `axes` metadata (optimizer moments keep it). The result
    has the same structure, Variables included, so it can be given to `jax.jit` as in_shardings or out_shardings.
    """

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            return leaf.replace(NamedSharding(mesh, partition_spec(leaf.get_metadata("axes"))))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(of_leaf, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def constrain_params(tree: Any) -> Any:
    """Pins, inside jit, each weight of a state (or its gradient) to the sharding that its `axes` ask for."""

    def of_leaf(leaf: nnx.Variable) -> nnx.Variable:
        return leaf.replace(constrain(leaf.get_value(), leaf.get_metadata("axes")))

    return jax.tree.map(of_leaf, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """The sharding of every leaf of a batch."""
    return NamedSharding(mesh, partition_spec("b t"))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The sharding of a scalar, or of anything that every device holds whole."""
    return NamedSharding(mesh, partition_spec(""))


def mesh_shape(config: MeshConfig, num_devices: int, *, num_slices: int = 1) -> dict[str, int]:
    """Sizes of the five axes: `data` left out is the number of slices, `fsdp` left out what the other axes leave over.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices; says which ones would.
    """
    # What crosses slices goes over the slow network: copies meet there once a step, parts of weights in every layer.
    for data in [config.data] if config.data is not None else [num_slices, 1]:
        others = data * config.expert * config.context * config.tensor
        fsdp = config.fsdp if config.fsdp is not None else max(num_devices // others, 1)
        if others * fsdp == num_devices:
            return dict(zip(AXES, (data, fsdp, config.expert, config.context, config.tensor), strict=True))
    sizes = {axis: getattr(config, axis) for axis in AXES}
    given = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size not in (1, None)) or "all sizes 1"
    divisors = ", ".join(str(size) for size in range(1, num_devices + 1) if num_devices % size == 0)
    raise ConfigError(
        f"mesh: {given} does not fit {num_devices} device{'s' * (num_devices != 1)}: the product of the axis sizes "
        f"must be {num_devices}, so that each is one of {divisors} (leave mesh.fsdp out and it takes what the other "
        "axes leave over)"
    )


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices of all processes (or over `devices`), always with the five axes.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, or slices differ in size.
    """
    devices = list(devices) if devices is not None else jax.devices()
    slices = slices_of(devices)
    sizes = mesh_shape(config, len(devices), num_slices=len(slices))
    arranged = arrange(slices, tuple(sizes.values()))
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slices_of(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices of each slice of a TPU run, between which there is only the network of the data centre.

    Raises:
        ConfigError: they have not the same number of devices.
    """
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        number = getattr(device, "slice_index", None) if device.platform == "tpu" else None
        slices.setdefault(number or 0, []).append(device)
    found = [slices[number] for number in sorted(slices)]
    if len({len(each) for each in found}) > 1:
        listed = ", ".join(f"slice {number} has {len(slices[number])}" for number in sorted(slices))
        raise ConfigError(f"mesh: {listed} devices; expected as many in each slice")
    return found


def arrange(slices: Sequence[Sequence[jax.Device]], shape: tuple[int, ...]) -> np.ndarray:
    """All devices as an array of `shape`, so that neighbours along an axis are near each other on the machine.

    Slices are crossed by the first axis as far as its size goes, then by the next. With 2 slices of 8, shape (2, 8)
    has a slice in each row, and shape (1, 16) goes through the one and then through the other.
    """
    across, left = [], len(slices)
    for size in shape:
        across.append(math.gcd(size, left))
        left //= across[-1]
    within = tuple(size // crossing for size, crossing in zip(shape, across, strict=True))
    parts = np.stack([_arrange_slice(devices, within) for devices in slices])
    # [slices..., within...] to pairs of (slices, within) for each axis.
    pairs = np.arange(2 * len(shape)).reshape(2, -1).T.ravel()
    return parts.reshape(*across, *within).transpose(pairs).reshape(shape)


def _arrange_slice(devices: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """The devices of one slice. Those that share a chip are neighbours along the last axis that can hold them so."""
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    chips: dict[tuple[int, ...], list[jax.Device]] = {}
    for device in devices:
        chips.setdefault(tuple(device.coords), []).append(device)
    firsts, per_chip = [chip[0] for chip in chips.values()], len(devices) // len(chips)
    inner = max((axis for axis, size in enumerate(shape) if size % per_chip == 0), default=None)
    if inner is None or len({len(chip) for chip in chips.values()}) > 1:  # Some of a machine, or an odd axis.
        return np.array(devices).reshape(shape)
    outer = tuple(size // per_chip if axis == inner else size for axis, size in enumerate(shape))
    try:
        arranged = mesh_utils.create_device_mesh(outer, firsts)
    except NotImplementedError:  # No axis is a whole side of the torus.
        arranged = mesh_utils.create_device_mesh(outer, firsts, allow_split_physical_axes=True)
    cores = np.empty((*outer, per_chip), object)
    for index, device in np.ndenumerate(arranged):
        cores[index] = sorted(chips[tuple(device.coords)], key=lambda each: each.core_on_chip)
    return np.moveaxis(cores, -1, inner + 1).reshape(shape)


def on_cpu() -> bool:
    """Whether what is being traced runs on a CPU: on the mesh in scope, or where JAX puts it without one."""
    return platform_and_kind()[0] == "cpu"


def platform_and_kind() -> tuple[str, str]:
    """Of the devices that what is being traced runs on, such as "tpu" and "TPU v5 lite", wherever it is compiled."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        device = jax.devices()[0]
        return device.platform, device.device_kind
    device = mesh.abstract_device
    return ("", "") if device is None else (device.platform, device.device_kind)


def on_one_device() -> bool:
    """Whether what is being traced runs on one device: on a mesh of one in scope, or on none."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def check_divisible(mesh: AnyMesh, tree: Any, sizes: dict[str, int]) -> None:
    """Refuses a mesh that cannot cut the weights or the batch evenly, before any weight is read.

    Args:
        mesh: the mesh.
        tree: abstract parameters (Variables with `axes`).
        sizes: further dims by name, each given as {"name (letter)": size}, such as {"microbatch_size (b)": 8}.

    Raises:
        ConfigError: all dims that do not divide, with the axis they are cut over.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))[0]
    dims: dict[tuple[str, int, tuple[str, ...]], str] = {}
    for path, leaf in leaves:
        name, axes = ".".join(str(key.key) for key in path), leaf.get_metadata("axes")
        for letter, size, cut in zip(axes.split(), leaf.shape, cut_axes(axes), strict=True):
            dims.setdefault((letter, size, cut), name)
    for name, size in sizes.items():
        label, letter = name.rstrip(")").split(" (")
        dims.setdefault((letter, size, DIM_AXES[letter]), label)
    problems = []
    for (letter, size, cut), name in dims.items():
        ways = math.prod(mesh.shape[axis] for axis in cut)
        if size % ways:
            over = " x ".join(f"mesh.{axis} {mesh.shape[axis]}" for axis in cut if mesh.shape[axis] > 1)
            problems.append(f"  {name}: {DIM_WORDS[letter]} is {size}, not a multiple of {ways} ({over})")
    if problems:
        raise ConfigError("the mesh does not fit this model and batch:\n" + "\n".join(problems))


DIM_WORDS = {
    "a": "number of microbatches",
    "b": "number of rows",
    "t": "sequence length",
    "d": "model width",
    "n": "number of query heads",
    "k": "number of key/value heads",
    "h": "head dim",
    "f": "MLP width",
    "v": "vocabulary size",
    "p": "number of positions",
    "e": "number of experts",
    "i": "number of bytes in a row of a quantised weight",
    "l": "number of layers",
    "m": "number of channels of a short convolution",
    "o": "number of rows of a quantised weight",
    "r": "rank of adapters",
}
