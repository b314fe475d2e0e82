"""What chips can do at most, as their makers state it: the constants behind every MFU and every bound.

In: the name of a chip, or the `device_kind` of a device. Out: its `Chip`.
"""

from typing import NamedTuple

import jax

GB, GBIT = 1e9, 1e9 / 8


class Chip(NamedTuple):
    """One chip; all rates are per second, in one direction."""

    name: str
    """As topologies are named: v6e, h100."""
    kinds: tuple[str, ...]
    """Beginnings of JAX's `device_kind`."""
    flops: float
    """Dense matrix products in bfloat16."""
    memory_bytes: float
    """That a program may use."""
    memory_rate: float
    """Bytes from and to the chip's memory."""
    link_rate: float
    """Bytes that a chip receives over all its links to other chips (ICI, NVLink)."""
    network_rate: float
    """Bytes that a chip receives from other slices or hosts, where links do not reach."""
    linked: int | None
    """Chips that links join, at most; None: all of a slice."""
    source: str

    @property
    def is_tpu(self) -> bool:
        """Whether `libtpu` compiles for it."""
        return self.kinds[0].startswith("TPU")


_TPU, GIB = "cloud.google.com/tpu/docs/", 2**30
_NVIDIA = "NVIDIA's data sheet of the "

CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, 31.5 * GIB, 1228 * GB, 2400 * GBIT, 25 * GBIT, None, _TPU + "v4"),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819 * GB, 1600 * GBIT, 25 * GBIT, None, _TPU + "v5e"),
    Chip("v5p", ("TPU v5p", "TPU v5"), 459e12, 95.7 * GIB, 2765 * GB, 4800 * GBIT, 50 * GBIT, None, _TPU + "v5p"),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GIB, 1640e9, 3584 * GBIT, 100 * GBIT, None, _TPU + "v6e"),
    Chip("tpu7x", ("TPU7x",), 2307e12, 189.5 * GIB, 7380 * GB, 9600 * GBIT, 100 * GBIT, None, _TPU + "tpu7x"),
    Chip("a100", ("NVIDIA A100",), 312e12, 80e9, 2039 * GB, 300 * GB, 200 * GBIT, 8, _NVIDIA + "A100 80GB SXM"),
    Chip("h100", ("NVIDIA H100",), 989e12, 79.1 * GIB, 3352 * GB, 450 * GB, 400 * GBIT, 8, _NVIDIA + "H100 SXM"),
    Chip("h200", ("NVIDIA H200",), 989e12, 139.8 * GIB, 4800 * GB, 450 * GB, 400 * GBIT, 8, _NVIDIA + "H200 SXM"),
    Chip("b200", ("NVIDIA B200",), 2250e12, 180e9, 8000 * GB, 900 * GB, 400 * GBIT, 8, _NVIDIA + "DGX B200"),
)  # fmt: skip
"""Memory of TPUs is what their compiler gives a program (libtpu 0.0.42.1); that of GPUs is all there is."""


def chip_of(device: jax.Device) -> Chip | None:
    """The chip of a device, None where it is none of these, as on CPUs."""
    found = [(kind, chip) for chip in CHIPS for kind in chip.kinds if device.device_kind.startswith(kind)]
    return max(found, key=lambda each: len(each[0]))[1] if found else None
