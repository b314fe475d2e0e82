"""The train step of a config, compiled for devices that are not there.

In: a config and devices. Out: `Compiled`: what the compiler says of memory, and what can be read in its program.
Nothing is allocated: the step is that of `jaxsft.training.step`, with shapes in place of arrays.
"""

import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxsft.batch import Batch
from jaxsft.config import Config
from jaxsft.disk.foreign import read_object
from jaxsft.folders.pretrained import check_positions, decoder_maker
from jaxsft.mesh import AXES, AnyMesh, batch_sharding, check_divisible, in_scope, make_mesh, mesh_shape
from jaxsft.model.abstract import Model, abstract_model
from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families.known import decoder_config, family
from jaxsft.plan.costs import Flops, count_flops
from jaxsft.plan.topologies import Topology, devices_of, missing_compiler
from jaxsft.setup import Setup
from jaxsft.training.compiler_options import describe_options
from jaxsft.training.matmuls import read_matmuls
from jaxsft.training.program import Report, read_program
from jaxsft.training.step import abstract_state, make_train_step


class Planned(NamedTuple):
    """A model without weights, on a mesh of devices that are not there."""

    model: Model
    structure: DecoderConfig
    mesh: AnyMesh


class Compiled(NamedTuple):
    """What is known of a step once it is compiled; bytes are those of one device."""

    mesh: dict[str, int]
    peak_bytes: int
    argument_bytes: int
    temp_bytes: int
    flops: Flops
    report: Report
    seconds: float
    """Of the processor, for tracing and compiling."""
    options: str
    text: str


def mesh_of(config: Config, topology: Topology) -> AnyMesh:
    """The mesh of a run on chips: of devices where a compiler is there for them, else of shapes alone.

    Raises:
        ConfigError: the sizes do not fit the topology, or its compiler does not know it.
    """
    if missing_compiler(topology) is None:
        return make_mesh(config.mesh, devices_of(topology))
    sizes = mesh_shape(config.mesh, topology.num_chips, num_slices=topology.num_slices)
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def open_planned(config: Config, mesh: AnyMesh) -> Planned:
    """The model of a config, or of a model's `config.json`, on a mesh.

    Raises:
        ConfigError: model, batch and mesh do not go together.
    """
    path = pathlib.Path(config.model.path)
    if path.suffix == ".json":
        hf_config = read_object(path)
        structure = decoder_config(hf_config)
        maker = decoder_maker(config.model, structure, family(hf_config), config.lora, config.train.only)
        model = abstract_model(maker)
    else:
        pretrained = Setup(config).pretrained
        structure, model = pretrained.decoder_config, pretrained.model
    check_positions(structure, config.data.seq_len)
    sizes = {"train.microbatch_size (b)": config.train.microbatch_rows, "data.seq_len (t)": config.data.seq_len}
    check_divisible(mesh, model.weights, sizes)
    return Planned(model, structure, mesh)


def trace_step(config: Config, planned: Planned) -> Any:
    """The train step, traced (`jax.stages.Traced`)."""
    model, _, mesh = planned
    rows, length = config.train.batch_size, config.data.seq_len
    step = make_train_step(
        model, config.optim, num_steps=1000, num_microbatches=config.train.num_microbatches, mesh=mesh
    )
    dtypes = Batch(jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
    batch = jax.tree.map(
        lambda dtype: jax.ShapeDtypeStruct((rows, length), dtype, sharding=batch_sharding(mesh)), dtypes
    )
    with in_scope(mesh):
        return step.trace(abstract_state(model.params, config.optim, mesh), model.frozen, batch)


def flops_of(traced: Any, config: Config, planned: Planned) -> Flops:
    """FLOPs of a traced step."""
    return count_flops(read_matmuls(traced), planned.model, planned.structure, config, planned.mesh.shape)


def compile_step(config: Config, planned: Planned) -> Compiled:
    """Compiles the step of a config for every device of its mesh."""
    began = time.process_time()
    mesh = planned.mesh
    assert isinstance(mesh, Mesh), "a step is compiled for devices"
    traced = trace_step(config, planned)
    with jax.set_mesh(mesh):
        compiled = traced.lower().compile()
    seconds = time.process_time() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    arguments, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    # What XLA calls the peak on a CPU or GPU leaves out what is temporary.
    is_tpu = mesh.devices.flat[0].platform == "tpu"
    peak = memory.peak_memory_in_bytes if is_tpu else arguments + temp
    flops, report = flops_of(traced, config, planned), read_program(text, mesh.shape)
    options = describe_options(mesh) or "no options"
    return Compiled(dict(mesh.shape), peak, arguments, temp, flops, report, seconds, options, text)
