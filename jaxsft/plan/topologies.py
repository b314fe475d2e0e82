"""Devices that are not there: a topology by its name, and what compiles for it.

In: a name such as `v6e:8x8`, `h100:8` or `cpu:1`. Out: a `Topology`, whose devices a mesh can be made of where a
compiler for them is installed: `libtpu` for TPUs, the CUDA plugin of JAX for GPUs, and JAX itself for CPUs.
"""

import contextlib
import difflib
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from jaxsft.config import ConfigError
from jaxsft.training.chips import CHIPS, Chip

EXAMPLES = "v6e:8x8, v5p:8x8x4, h100:8, h200:1 or cpu:1"

GPU_FACTS = {
    "a100": {"cores": 108, "shared": 166912, "capability": 8, "clock": 1.41, "cache": 41943040, "registers": 65536},
    "h100": {"cores": 132, "shared": 232448, "capability": 9, "clock": 1.98, "cache": 52428800, "registers": 65536},
    "h200": {"cores": 132, "shared": 232448, "capability": 9, "clock": 1.98, "cache": 62914560, "registers": 65536},
    "b200": {"cores": 148, "shared": 232448, "capability": 10, "clock": 1.965, "cache": 132644864, "registers": 65536},
}
"""What XLA's compiler asks of a GPU beside its memory: multiprocessors, bytes of shared memory of a block, compute
capability, GHz, bytes of cache, registers of a block. From NVIDIA's CUDA programming guide."""


class Topology(NamedTuple):
    """Chips of one kind."""

    name: str
    chip: Chip | None
    """None: CPUs, of which nothing is known."""
    shape: tuple[int, ...]
    """Of one slice; of GPUs and CPUs their number."""
    num_slices: int

    @property
    def num_chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.num_slices


def read_topology(name: str, *, num_slices: int = 1) -> Topology:
    """A topology by its name.

    Raises:
        ConfigError: there is no such kind of chip, or no such shape; names the nearest.
    """
    kind, _, shape = name.strip().lower().partition(":")
    chips = {chip.name: chip for chip in CHIPS}
    if kind not in chips and kind != "cpu":
        near = difflib.get_close_matches(kind, [*chips, "cpu"], n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"--topology: {name}: no such chip{meant} (known: {', '.join(chips)}, cpu; such as {EXAMPLES})"
        )
    chip = chips.get(kind)
    is_tpu = chip is not None and chip.is_tpu
    sizes = shape.split("x") if shape else []
    if not sizes or not all(size.isdecimal() and int(size) for size in sizes) or (len(sizes) > 1) != is_tpu:
        wanted = "sizes joined by x, such as 8x8" if is_tpu else "a number of devices"
        raise ConfigError(f"--topology: {name}: expected {kind}: and {wanted}; such as {EXAMPLES}")
    if num_slices > 1 and not is_tpu:
        raise ConfigError(
            f"--slices: {num_slices} given, but only TPUs have slices; give {kind}:{num_slices * int(shape)}"
        )
    numbers = tuple(map(int, sizes))
    if chip is not None and chip.linked and numbers[0] > chip.linked and numbers[0] % chip.linked:
        raise ConfigError(
            f"--topology: {name}: more than one host of {kind} has {chip.linked} each, expected a multiple of that"
        )
    return Topology(f"{kind}:{shape}", chip, numbers, num_slices)


def missing_compiler(topology: Topology) -> str | None:
    """What would have to be installed to compile for it; None where all is there."""
    if topology.chip is None:
        return None
    if topology.chip.is_tpu:
        return None if importlib.util.find_spec("libtpu") else "libtpu"
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    return None if any(importlib.util.find_spec(each) for each in plugins) else "jax-cuda12-plugin and jax-cuda12-pjrt"


def devices_of(topology: Topology) -> Sequence[Any]:
    """Devices to compile for, none of which is there; to be called before JAX looks for devices.

    Raises:
        ConfigError: the compiler knows no such shape, or this machine has not so many CPU devices.
    """
    jax.config.update("jax_platforms", "cpu")
    if topology.chip is None:
        return _cpus(topology)
    if topology.chip.is_tpu:
        # No TPU is looked for, several processes may compile at once, and it says nothing of hosts that are not there.
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v6e-8"}
        options: dict[str, Any] = {} if topology.num_slices == 1 else {"num_slices": topology.num_slices}
        platform, options = "tpu", options | {"topology_name": topology.name}
    else:
        hosts = -(-topology.num_chips // (topology.chip.linked or topology.num_chips))
        shape = f"1x{hosts}x{topology.num_chips // hosts}"
        platform, options = "cuda", {"topology": shape, "target_config": _target(topology.chip)}
    try:
        return topologies.get_topology_desc(platform=platform, **options).devices
    except Exception as error:  # each compiler has errors of its own
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"--topology: {topology.name}: its compiler knows no such shape: {reason}") from error


def _cpus(topology: Topology) -> Sequence[Any]:
    with contextlib.suppress(RuntimeError):  # JAX has looked for its devices already.
        jax.config.update("jax_num_cpu_devices", topology.num_chips)
    if len(jax.devices()) < topology.num_chips:
        raise ConfigError(f"--topology: {topology.name}: JAX has {len(jax.devices())} CPU devices already")
    return jax.devices()[: topology.num_chips]


def _target(chip: Chip) -> str:
    """A GPU as XLA's compiler is told of it (`GpuTargetConfigProto`, as text)."""
    facts = GPU_FACTS[chip.name]
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "core_count": facts["cores"],
        "fpus_per_core": 128,
        "clock_rate_ghz": facts["clock"],
        "device_memory_size": int(chip.memory_bytes),
        "memory_bandwidth": int(chip.memory_rate),
        "l2_cache_size": facts["cache"],
        "shared_memory_per_block": 49152,
        "shared_memory_per_block_optin": facts["shared"],
        "shared_memory_per_core": int(facts["shared"]) + 1024,
        "registers_per_core_limit": facts["registers"],
        "registers_per_block_limit": facts["registers"],
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
    }
    text = " ".join(f"{key}: {value}" for key, value in device.items())
    capability = f"cuda_compute_capability {{ major: {facts['capability']} minor: 0 }}"
    name = f'"{chip.kinds[0]}"'
    return (
        f'gpu_device_info {{ {text} {capability} name: {name} }} platform_name: "CUDA" '
        f"dnn_version_info {{ major: 9 minor: 10 }} device_description_str: {name}"
    )
