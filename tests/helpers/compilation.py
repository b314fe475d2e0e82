"""How tests compile: without making fast what runs once or twice, and as for users what is itself looked at.

Almost all of the suite's time was XLA making programs fast. Without that, the same program of operations is compiled in
a tenth of the time; what it computes differs by rounding. The quickstart, the comparisons with PyTorch in
tests/compare, answers of a real model, and what counts loops, bytes or FLOPs in a compiled program are compiled as for
users. To run all tests like that: `XLA_FLAGS="--xla_backend_optimization_level=3
--xla_llvm_disable_expensive_passes=false --xla_cpu_use_fusion_emitters=true"`, the last of them for jax 0.10 only.
"""

import os

import jaxlib.version

HAS_TWO_EMITTERS = jaxlib.version.__version__.startswith("0.10.")
"""Whether this XLA can still write loops without MLIR, which compiles 3 times as fast; newer ones refuse the flag."""

AS_FOR_USERS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
"""Options for `compile` of a program that is looked at."""
if HAS_TWO_EMITTERS:
    AS_FOR_USERS["xla_cpu_use_fusion_emitters"] = True


def xla_flags(num_devices: int) -> str:
    """XLA_FLAGS of a process that compiles quickly for so many simulated devices; flags of the environment win."""
    flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    flags += ["--xla_cpu_use_fusion_emitters=false"] * HAS_TWO_EMITTERS
    return " ".join([*flags, os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={num_devices}"])
