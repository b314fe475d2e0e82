"""A train step compiled for TPUs that are not there: its memory, what it sends between chips, and its largest arrays.

Run as `python benchmarks/tpu_compile.py CONFIG [key=value ...] --topology v6e:8x8 [--slices N]`; needs
`pip install libtpu`, whose compiler is the real one. CONFIG is a config of ours (YAML), or the `config.json` of a model
(`benchmarks/models/`), of which neither tokenizer nor weights are needed. Nothing is allocated. `run.py plan` says
what a run needs; this says what the compiler made of a step. Compute is in bfloat16 unless the config says otherwise.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from jaxsft.config import Config
from jaxsft.config_files import load_config
from jaxsft.mesh import make_mesh
from jaxsft.plan import compiling, topologies
from jaxsft.plan.compiling import Compiled, open_planned
from jaxsft.plan.topologies import read_topology
from jaxsft.training import compiler_options
from jaxsft.training.program import Report, total_bytes

GIB = 2**30
SCOPE_NAMES = {"layers": "layers", "loss": "loss", "": "the rest"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("config", type=pathlib.Path, help="a config (YAML), or a model's config.json")
    parser.add_argument("overrides", nargs="*", help="key=value, as of run.py")
    parser.add_argument("--topology", required=True, help="such as v6e:8x8, v5e:16x16, v5p:4x4x4, tpu7x:2x2x1")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="without the compiler options that a run has")
    parser.add_argument("--text", type=pathlib.Path, help="where the compiled program is written to, as text")
    args = parser.parse_intermixed_args()
    config = read_config(args.config, args.overrides)
    compiled = compile_step(config, args.topology, num_slices=args.slices, plain=args.plain)
    if args.text:
        args.text.write_text(compiled.text)
    print(describe(compiled, config))


def read_config(path: pathlib.Path, overrides: list[str]) -> Config:
    """A config of ours; one of defaults and overrides where all that there is is a model's config.json."""
    source: Any = path
    if path.suffix == ".json":
        source = {"model": {"path": str(path), "weights": "random"}, "data": {"train": "none"}}
    config = load_config(source, overrides)
    # Left out, it would be what suits the CPU of this machine.
    model = config.model.model_copy(update={"compute_dtype": config.model.compute_dtype or "bfloat16"})
    return config.model_copy(update={"model": model})


def compile_step(config: Config, topology: str, *, num_slices: int = 1, plain: bool = False) -> Compiled:
    """Compiles the step of a config for every device of a topology, `plain` without the options that are for it.

    Raises:
        ConfigError: model, batch and mesh do not go together.
    """
    planned = open_planned(config, make_mesh(config.mesh, devices_of(topology, num_slices=num_slices)))
    with mock.patch.dict(compiler_options.TPU, clear=plain):
        return compiling.compile_step(config, planned)


def devices_of(topology: str, *, num_slices: int = 1) -> Sequence[Any]:
    """Devices to compile for, none of which is there."""
    return topologies.devices_of(read_topology(topology, num_slices=num_slices))


def describe(compiled: Compiled, config: Config) -> str:
    """All of it as text."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in compiled.mesh.items() if size > 1) or "one device"
    rows = f"{config.train.batch_size} rows of {config.data.seq_len:,}"
    if config.train.microbatch_size:
        rows += f", {config.train.microbatch_rows} at once"
    flops = compiled.flops
    lines = [
        f"{config.model.path}: {mesh}; {rows}; remat {config.model.remat}",
        f"peak {compiled.peak_bytes / GIB:.2f} GiB on each device: arguments {compiled.argument_bytes / GIB:.2f}, "
        f"temporary {compiled.temp_bytes / GIB:.2f}; compiled in {compiled.seconds:.0f} processor seconds",
        f"matmuls {flops.all / 1e12:,.1f} TFLOP a step on all devices, if every token is trained: maps "
        f"{flops.maps / 1e12:,.1f}, attention {flops.attention / 1e12:,.1f}, experts {flops.experts / 1e12:,.1f}, loss "
        f"{flops.loss / 1e12:,.1f}; {flops.again / 1e12:,.1f} of these are computed again",
        f"compiled by {compiled.options}",
        f"asynchronous collectives: {compiled.report.num_async}; share of all gathered bytes: "
        f"{async_share(compiled.report):.2f}",
        "",
        f"{'where':<10}{'kind':<20}{'along':<24}{'a step':>8}{'MiB':>12}",
    ]
    for (scope, kind, axes), (number, num_bytes) in sorted(total_bytes(compiled.report.collectives).items()):
        along = ", ".join(axes) or "one device"
        lines.append(f"{SCOPE_NAMES[scope]:<10}{kind:<20}{along:<24}{number:>8,}{num_bytes / 2**20:>12,.1f}")
    all_bytes = sum(each.times * each.num_bytes for each in compiled.report.collectives)
    lines += [f"{'all':<62}{all_bytes / 2**20:>12,.1f}", "", "largest arrays that are made:"]
    for array in compiled.report.arrays:
        lines.append(
            f"{SCOPE_NAMES[array.scope]:<10}{array.num_bytes / 2**20:>10,.1f} MiB  {array.shape}  {array.op_name}"
        )
    return "\n".join(lines)


def async_share(report: Report) -> float:
    """Of the bytes that are gathered in a step, the share that is gathered while other work may be done."""
    gathers = [each for each in report.collectives if each.kind == "all-gather"]
    total = sum(each.times * each.num_bytes for each in gathers)
    return sum(each.times * each.num_bytes for each in gathers if each.is_async) / total if total else 0.0


if __name__ == "__main__":
    main()
