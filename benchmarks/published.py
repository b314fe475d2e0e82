"""What others have measured on such chips, beside what `run.py plan` says is the most that can be.

    python benchmarks/published.py

Each is planned with nothing computed again (remat none), whatever they did, and with enough rows that no message or
weight is what it waits for: so the bound holds for every way to run it. A test fails where one of them is above it.
"""

import pathlib
import sys
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from jaxsft.config_files import load_config
from jaxsft.plan.make import Plan, make_plan
from jaxsft.plan.topologies import read_topology

MODELS = pathlib.Path(__file__).resolve().parent / "models"


class Published(NamedTuple):
    """A run of others, in bfloat16."""

    name: str
    model: str
    topology: str
    length: int
    measured: float
    """MFU where it is below 1, else tokens per second and chip."""
    source: str
    overrides: tuple[str, ...] = ()


RUNS = (
    Published("Llama 2 70B", "llama2_70b", "v5p:4x4x4", 4096, 0.654, "MaxText, README"),
    Published("32B", "maxtext_32b", "v5e:16x16", 2048, 0.6686, "MaxText, configs/v5e"),
    Published("Llama 3.1 8B", "llama3_8b", "v6e:16x16", 8192, 0.455, "MaxText, tpu-recipes"),
    Published("Llama 3.1 8B", "llama3_8b", "h100:8", 8192, 6667, "torchtitan, docs/performance.md, compiled"),
    Published("Llama 2 7B", "llama2_7b", "h100:8", 4096, 11361, "JAX-Toolbox"),
    Published("Llama 3 8B, LoRA", "llama3_8b", "h100:1", 4096, 12473, "NeMo AutoModel", ("lora.rank=16",)),
)


def plan_of(run: Published) -> Plan:
    """What is the most that can be, counted."""
    topology = read_topology(run.topology)
    source = {
        "model": {"path": str(MODELS / f"{run.model}.json"), "weights": "random", "remat": "none"},
        "data": {"train": "none", "seq_len": run.length},
        "train": {"batch_size": 4 * topology.num_chips, "steps": 1},
    }
    return make_plan(load_config(source, run.overrides), topology, compiles=False)


def share(run: Published, plan: Plan) -> float:
    """Of the most that can be, what was measured."""
    assert plan.mfu is not None and plan.tokens_per_second is not None
    most = plan.mfu if run.measured < 1 else plan.tokens_per_second / plan.topology.num_chips
    return run.measured / most


def main() -> None:
    print("| run | on | measured | at most | measured / at most | bound by | source |\n|---|---|---|---|---|---|---|")
    for run in RUNS:
        plan = plan_of(run)
        assert plan.mfu is not None and plan.tokens_per_second is not None and plan.bound is not None
        if run.measured < 1:
            measured, most = f"MFU {run.measured:.1%}", f"{plan.mfu:.1%}"
        else:
            measured = f"{run.measured:,.0f} tokens/s a chip"
            most = f"{plan.tokens_per_second / plan.topology.num_chips:,.0f}"
        print(
            f"| {run.name}, {run.length:,} | {run.topology} | {measured} | {most} | {share(run, plan):.2f} "
            f"| {plan.bound.by} | {run.source} |"
        )


if __name__ == "__main__":
    main()
