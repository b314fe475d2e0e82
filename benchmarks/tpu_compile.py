"""A train step compiled for TPUs that are not there: its memory, what it sends between chips, and its largest arrays.

Run as `python benchmarks/tpu_compile.py CONFIG [key=value ...] --topology v6e:8x8 [--slices N]`; needs
`pip install libtpu`, whose compiler is the real one. CONFIG is a config of ours (YAML), or the `config.json` of a model
(`benchmarks/models/`), of which neither tokenizer nor weights are needed. Nothing is allocated: the step is that of
`jaxsft.training.step`, with shapes in place of arrays. Compute is in bfloat16 unless the config says otherwise.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxsft.batch import Batch
from jaxsft.config import Config
from jaxsft.config_files import load_config
from jaxsft.folders.pretrained import check_positions, decoder_maker
from jaxsft.mesh import batch_sharding, check_divisible, make_mesh
from jaxsft.model.abstract import abstract_model
from jaxsft.model.families.known import decoder_config, family
from jaxsft.setup import Setup
from jaxsft.training import compiler_options
from jaxsft.training.matmuls import Matmul, read_matmuls
from jaxsft.training.program import Report, read_program, total_bytes
from jaxsft.training.step import abstract_state, make_train_step

GIB = 2**30
SCOPE_NAMES = {"layers": "layers", "loss": "loss", "": "the rest"}


class Compiled(NamedTuple):
    """What is known of a step once it is compiled; bytes are those of one device."""

    mesh: dict[str, int]
    peak_bytes: int
    argument_bytes: int
    temp_bytes: int
    matmuls: list[Matmul]
    """Of all devices."""
    report: Report
    seconds: float
    """Of the processor, for tracing and compiling."""
    options: str
    text: str


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
    mesh = make_mesh(config.mesh, devices_of(topology, num_slices=num_slices))
    path = pathlib.Path(config.model.path)
    if path.suffix == ".json":
        hf_config = json.loads(path.read_text())
        structure = decoder_config(hf_config)
        model = abstract_model(
            decoder_maker(config.model, structure, family(hf_config), config.lora, config.train.only)
        )
    else:
        pretrained = Setup(config).pretrained
        structure, model = pretrained.decoder_config, pretrained.model
    rows, length = config.train.batch_size, config.data.seq_len
    check_positions(structure, length)
    sizes = {"train.microbatch_size (b)": config.train.microbatch_rows, "data.seq_len (t)": length}
    check_divisible(mesh, model.weights, sizes)

    with mock.patch.dict(compiler_options.TPU, clear=plain):
        step = make_train_step(
            model, config.optim, num_steps=1000, num_microbatches=config.train.num_microbatches, mesh=mesh
        )
        options = compiler_options.describe_options(mesh)
    dtypes = Batch(jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
    batch = jax.tree.map(
        lambda dtype: jax.ShapeDtypeStruct((rows, length), dtype, sharding=batch_sharding(mesh)), dtypes
    )
    began = time.process_time()
    with jax.set_mesh(mesh):
        traced = step.trace(abstract_state(model.params, config.optim, mesh), model.frozen, batch)
        compiled = traced.lower().compile()
    seconds = time.process_time() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Compiled(
        dict(mesh.shape),
        memory.peak_memory_in_bytes,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        read_matmuls(traced),
        read_program(text, mesh.shape),
        seconds,
        options or "no options",
        text,
    )


def devices_of(topology: str, *, num_slices: int = 1) -> list[Any]:
    """Devices to compile for, none of which is there."""
    # No TPU is looked for, and several processes may compile at once.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    jax.config.update("jax_platforms", "cpu")
    options = {} if num_slices == 1 else {"num_slices": num_slices}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def describe(compiled: Compiled, config: Config) -> str:
    """All of it as text."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in compiled.mesh.items() if size > 1) or "one device"
    rows = f"{config.train.batch_size} rows of {config.data.seq_len:,}"
    if config.train.microbatch_size:
        rows += f", {config.train.microbatch_rows} at once"
    flops = sum(each.flops for each in compiled.matmuls)
    again = sum(each.flops for each in compiled.matmuls if each.is_again)
    lines = [
        f"{config.model.path}: {mesh}; {rows}; remat {config.model.remat}",
        f"peak {compiled.peak_bytes / GIB:.2f} GiB on each device: arguments {compiled.argument_bytes / GIB:.2f}, "
        f"temporary {compiled.temp_bytes / GIB:.2f}; compiled in {compiled.seconds:.0f} processor seconds",
        f"matmuls {flops / 1e12:,.1f} TFLOP a step on all devices, of which {again / 1e12:,.1f} are computed again "
        f"({again / (flops - again):.1%} on top)",
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
