"""The device mesh, the one table from the letter of a dim to its mesh axis, and the start-up of processes.

In: the `mesh` section, and arrays that name their dims by letters. Out: a mesh, and the sharding of each array on it.

Every parameter is born with the letters of its dims (`"l d n h"`) and every activation is constrained by its letters
(`"b t d"`); `DIM_AXES` says over which mesh axis each letter is cut. Nothing else in the program decides a sharding.
"""

import os
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsft.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "expert", "context", "tensor")

DIM_AXES: dict[str, tuple[str, ...]] = {
    "b": ("data", "fsdp", "expert"),
    "u": ("data", "expert"),
    "t": ("context",),
    "d": ("fsdp",),
    "n": ("tensor",),
    "k": ("tensor",),
    "f": ("tensor",),
    "v": ("tensor",),
    "e": ("expert",),
    "p": (),
    "a": (),
    "h": (),
    "l": (),
}
"""Letter of a dim (the glossary of names) to the mesh axes that it is cut over.

`u` are rows on the way out of a table that is cut over fsdp by its width: the same bytes per device as `b`.
"""

ROW_AXES = DIM_AXES["b"]


def partition_spec(axes: str) -> PartitionSpec:
    """The PartitionSpec of an array whose dims are named by letters.

    A mesh axis cuts one dim at most, the first that asks for it: `"b t d"` gives
    `P(("data", "fsdp", "expert"), "context", None)`, `"v d"` gives `P("tensor", "fsdp")`.
    """
    used: set[str] = set()
    spec: list[Any] = []
    for letter in axes.split():
        free = tuple(axis for axis in DIM_AXES[letter] if axis not in used)
        used.update(free)
        spec.append(free[0] if len(free) == 1 else free or None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """Pins the sharding of an activation inside jit, by the letters of its dims; without a mesh in scope, nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def shardings(mesh: Mesh, tree: Any) -> Any:
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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every leaf of a batch."""
    return NamedSharding(mesh, partition_spec("b t"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a scalar, or of anything that every device holds whole."""
    return NamedSharding(mesh, partition_spec(""))


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Sizes of the five axes, `fsdp` filled in with the devices that the other axes leave over.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    others = int(np.prod([size for size in sizes.values() if size is not None]))
    if sizes["fsdp"] is None and num_devices % others == 0:
        sizes["fsdp"] = num_devices // others
    if sizes["fsdp"] is None or int(np.prod(list(sizes.values()))) != num_devices:
        given = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size not in (1, None)) or "all sizes 1"
        raise ConfigError(
            f"mesh: {given} does not fit {num_devices} device{'s' * (num_devices != 1)}: the product of the axis sizes "
            f"must be {num_devices} (leave mesh.fsdp out and it takes what the other axes leave over)"
        )
    return sizes


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices of all processes (or over `devices`), always with the five axes.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = devices if devices is not None else jax.devices()
    sizes = mesh_shape(config, len(devices))
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def on_cpu() -> bool:
    """Whether what is being traced runs on a CPU: on the mesh in scope, or where JAX puts it without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend() == "cpu"
    return mesh.abstract_device is not None and mesh.abstract_device.platform == "cpu"


def on_one_device() -> bool:
    """Whether what is being traced runs on one device: on a mesh of one in scope, or on none."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def check_divisible(mesh: Mesh, tree: Any, sizes: dict[str, int]) -> None:
    """Refuses a mesh that cannot cut the weights or the batch evenly, before any weight is read.

    Args:
        mesh: the mesh.
        tree: abstract parameters (Variables with `axes`).
        sizes: further dims by name, each given as {"name (letter)": size}, such as {"microbatch_size (b)": 8}.

    Raises:
        ConfigError: all dims that do not divide, with the axis they are cut over.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))[0]
    dims: dict[tuple[str, int], str] = {}
    for path, leaf in leaves:
        name = ".".join(str(key.key) for key in path)
        for letter, size in zip(leaf.get_metadata("axes").split(), leaf.shape, strict=True):
            dims.setdefault((letter, size), name)
    for name, size in sizes.items():
        label, letter = name.rstrip(")").split(" (")
        dims.setdefault((letter, size), label)
    problems = []
    for (letter, size), name in dims.items():
        ways = int(np.prod([mesh.shape[axis] for axis in DIM_AXES[letter]]))
        if size % ways:
            over = " x ".join(f"mesh.{axis} {mesh.shape[axis]}" for axis in DIM_AXES[letter] if mesh.shape[axis] > 1)
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
    "l": "number of layers",
}


def start_processes() -> None:
    """Joins the other processes of this run when a cluster is detected; a single process goes on alone.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` name the run by hand; otherwise
    `jax.distributed.initialize` asks SLURM, OpenMPI, GKE and Cloud TPU. Must run before anything touches a device.
    """
    if jax.distributed.is_initialized():
        return
    by_hand = [os.environ.get(f"JAX_{name}") for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")]
    if all(by_hand):
        address, num_processes, process_id = by_hand
        assert address and num_processes and process_id
        jax.distributed.initialize(address, int(num_processes), int(process_id))
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        # This exact complaint is how JAX says that no cluster was found; any other is a cluster that failed.
        if "coordinator_address should be defined" not in str(error):
            raise
