"""How tests compile: without making fast what runs once or twice, and as for users what is itself looked at.

Almost all of the suite's time was XLA making programs fast. Without that, the same program of operations is compiled in
a tenth of the time; what it computes differs by rounding. The quickstart, and SmolLM2's answers and its comparison with
PyTorch, are compiled as for users; where loops, bytes or FLOPs are counted in a compiled program, these are as for
users. To run all tests like that: `XLA_FLAGS="--xla_backend_optimization_level=3
--xla_llvm_disable_expensive_passes=false --xla_cpu_use_fusion_emitters=true"`, the last of them for jax 0.10 only.
"""

import os

import jaxlib.version

HAS_TWO_EMITTERS = jaxlib.version.__version__.startswith("0.10.")
"""Whether this XLA can still write loops without MLIR, which compiles 3 times as fast; newer ones refuse the flag."""

TO_READ = {"xla_cpu_use_fusion_emitters": True} if HAS_TWO_EMITTERS else {}
"""Options for `compile` of a program that is looked at and seldom run: its operations, FLOPs and bytes are those that
users get (`test_program.py` compares them), its machine code is not."""

TO_RUN_LONG = {"xla_backend_optimization_level": 1}
"""Options for `compile` of a step that is taken some fifty times: twice as fast, compiled in three times as long."""

AS_FOR_USERS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False} | TO_READ
"""Options for `compile` of a program that computes for minutes."""


def xla_flags(num_devices: int) -> str:
    """XLA_FLAGS of a process that compiles quickly for so many simulated devices; flags of the environment win."""
    flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    # One piece of code in place of 32, and one thread for it; and XLA need not check what it has written.
    flags += ["--xla_cpu_parallel_codegen_split_count=1", "--xla_cpu_emitter_verification_level=0"]
    flags += ["--xla_cpu_use_fusion_emitters=false"] * HAS_TWO_EMITTERS
    return " ".join([*flags, os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={num_devices}"])
