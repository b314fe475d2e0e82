"""What steps are compiled with beside what is in them: options of XLA, by the devices and the version of the compiler.

In: a mesh. Out: its options, and what a user is told of them. The flags of the TPU's compiler come and go, and some
were found to be wrong in a version; so an entry is for one version, with which `tests/test_tpu_compile.py` compiles it,
and every other version goes without.
"""

import importlib.metadata
import importlib.util
import os
import pathlib

from jax.sharding import Mesh

from jaxsft.mesh import AnyMesh

Options = dict[str, str | int]

ONE_CPU: Options = {"xla_cpu_prefer_vector_width": 512}
"""Vectors of 512 bits where one CPU device has them (AVX-512), of which XLA by itself takes 256. Attention of one layer
then takes 0.91 to 0.97 of the time."""

TPU: dict[tuple[str, str], Options] = {
    ("TPU v6 lite", "0.0.42.1"): {
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    },
}
"""(kind of device, version of libtpu) -> options of a step that is cut over several devices.

They let it compute while the weights of a layer are gathered. What each changes is counted in compiled programs
(benchmarks/README.md); none of them ran on a TPU.
"""


def compiler_options(mesh: AnyMesh) -> Options:
    """What a train step on this mesh is compiled with; nothing where nothing is known to help."""
    if not isinstance(mesh, Mesh):
        return {}  # of shapes alone, for which nothing is compiled
    device = mesh.devices.flat[0]
    if device.platform == "cpu" and mesh.size == 1:
        return ONE_CPU
    if device.platform == "tpu" and mesh.size > 1:
        return TPU.get((device.device_kind, libtpu_version() or ""), {})
    return {}


def describe_options(mesh: Mesh) -> str | None:
    """A line on the options for TPUs, on their absence where other versions have some; None for other devices."""
    device = mesh.devices.flat[0]
    if device.platform != "tpu" or mesh.size == 1:
        return None
    version = libtpu_version() or "of unknown version"
    if options := compiler_options(mesh):
        listed = ", ".join(f"{name}={value}" for name, value in options.items())
        return f"libtpu {version}, {listed}"
    known = [version for kind, version in TPU if kind == device.device_kind]
    tried = f"tried with {', '.join(known)} only" if known else f"none are known to help on {device.device_kind}"
    return f"libtpu {version}, no options: {tried}"


def libtpu_version() -> str | None:
    """Of the package whose library JAX loads; None where there is none, or where the environment names another one."""
    found = importlib.util.find_spec("libtpu")
    if found is None or found.origin is None:
        return None
    library = pathlib.Path(found.origin).with_name("libtpu.so")
    if pathlib.Path(os.environ.get("TPU_LIBRARY_PATH", library)) != library:
        return None
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:  # a nightly build
        return None
