"""The plan of a run: its bytes, FLOPs, messages and least time, on chips that need not be there.

In: a config and a topology. Out: a `Plan`: plain numbers, for the terminal, for programs and for the header of a
recipe.
"""

import dataclasses
import math
import pathlib
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxsft.config import Config, ConfigError
from jaxsft.folders.pretrained import compute_dtype
from jaxsft.model.lora import of_files
from jaxsft.plan.compiling import Compiled, Planned, compile_step, flops_of, mesh_of, open_planned, trace_step
from jaxsft.plan.costs import (
    Bound,
    Flops,
    bound_of,
    expected_collectives,
    link_seconds,
    memory_bytes,
)
from jaxsft.plan.topologies import Topology, missing_compiler
from jaxsft.setup import Setup
from jaxsft.training.memory import Bytes, where_bytes_go
from jaxsft.training.metrics import num_params
from jaxsft.training.program import Collective, total_bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs. Bytes are those of one device, unless they are of the whole run."""

    model: str
    topology: Topology
    mesh: dict[str, int]
    rows: int
    """Of a step."""
    microbatch_rows: int
    seq_len: int
    remat: str
    num_trained: int
    num_frozen: int
    """Parameters."""
    counted: Bytes
    """By shapes and an estimate."""
    compiled: Compiled | None
    missing: str | None
    """What to install for `compiled`."""
    flops: Flops
    collectives: list[Collective]
    """Those of the compiled program, or expected ones."""
    bound: Bound | None
    num_steps: int | None
    """None where neither `train.steps` nor data say it."""
    checkpoint_bytes: int
    """Of one, of all devices."""
    export_bytes: int
    seconds: float
    """That planning took, of the processor."""

    @property
    def peak_bytes(self) -> int:
        """As compiled, where it was."""
        return self.compiled.peak_bytes if self.compiled is not None else self.counted.peak

    @property
    def room_bytes(self) -> float | None:
        """Memory that is left over on each device, negative where it is too little; None where it is not known."""
        return None if self.capacity_bytes is None else self.capacity_bytes - self.peak_bytes

    @property
    def capacity_bytes(self) -> float | None:
        """Memory of a device, None where it is not known. Some compilers give a chip two devices."""
        if self.topology.chip is None:
            return None
        return self.topology.chip.memory_bytes * self.topology.num_chips / math.prod(self.mesh.values())

    @property
    def tokens_per_second(self) -> float | None:
        """At most, of all chips."""
        return None if self.bound is None else self.rows * self.seq_len / self.bound.seconds

    @property
    def mfu(self) -> float | None:
        """At most."""
        if self.bound is None or self.topology.chip is None:
            return None
        return self.flops.needed / self.bound.seconds / self.topology.chip.flops / self.topology.num_chips

    @property
    def hours(self) -> float | None:
        """Of the whole run, at least."""
        return None if self.bound is None or self.num_steps is None else self.num_steps * self.bound.seconds / 3600


def make_plan(config: Config, topology: Topology, *, compiles: bool = True) -> Plan:
    """Plans the run of a config.

    Args:
        config: of the run; `model.path` may be a `config.json` alone, with `train.steps`.
        topology: what it is to run on.
        compiles: with the real compiler, where that is installed.

    Raises:
        ConfigError: model, batch and mesh do not go together, or it cannot be known how long the run is.
    """
    began = time.process_time()
    jax.config.update("jax_platforms", "cpu")
    config = as_on(config, topology)
    num_steps = _num_steps(config)  # refused before anything is compiled
    planned = open_planned(config, mesh_of(config, topology))
    missing = missing_compiler(topology)
    compiled = compile_step(config, planned) if compiles and missing is None else None
    flops = flops_of(trace_step(config, planned), config, planned) if compiled is None else compiled.flops
    plan = plan_of(config, topology, planned, flops, num_steps=num_steps, compiled=compiled)
    return dataclasses.replace(plan, missing=missing if compiles else None, seconds=time.process_time() - began)


def plan_of(
    config: Config,
    topology: Topology,
    planned: Planned,
    flops: Flops,
    *,
    num_steps: int | None = None,
    compiled: Compiled | None = None,
) -> Plan:
    """The plan of a model whose FLOPs were counted; arguments as what it holds."""
    model, structure, mesh = planned
    sizes, train, length = dict(mesh.shape), config.train, config.data.seq_len
    counted = where_bytes_go(
        model,
        config.optim,
        mesh,
        rows=train.microbatch_rows,
        length=length,
        num_microbatches=train.num_microbatches,
    )
    itemsize = jnp.dtype(compute_dtype(config.model)).itemsize
    if compiled is not None:
        collectives = compiled.report.collectives
    else:
        collectives = expected_collectives(model, structure, config, sizes, itemsize=itemsize)
    terms = {term.name: term.num_bytes for term in counted.terms}
    num_bytes = memory_bytes(
        model,
        config,
        sizes,
        moments=terms["optimizer"],
        activations=terms["activations"],
        itemsize=itemsize,
    )
    return Plan(
        config.model.path,
        topology,
        sizes,
        train.batch_size,
        train.microbatch_rows,
        length,
        config.model.remat,
        num_trained=num_params(model.params, structure)[0],
        num_frozen=num_params(of_files(model.frozen), structure)[0],
        counted=counted,
        compiled=compiled,
        missing=None,
        flops=flops,
        collectives=collectives,
        bound=bound_of(flops, num_bytes, link_seconds(collectives, sizes, topology), topology),
        num_steps=num_steps,
        checkpoint_bytes=(terms["parameters"] + terms["optimizer"]) * math.prod(sizes.values()) // sizes["data"],
        export_bytes=_export_bytes(config, planned),
        seconds=0.0,
    )


def as_on(config: Config, topology: Topology) -> Config:
    """The config as a run on these chips has it: bfloat16 compute, where the config leaves that open."""
    dtype = config.model.compute_dtype or ("float32" if topology.chip is None else "bfloat16")
    return config.model_copy(update={"model": config.model.model_copy(update={"compute_dtype": dtype})})


def _num_steps(config: Config) -> int | None:
    """Of the whole run.

    Raises:
        ConfigError: it has no data that can be read here, and no `train.steps`.
    """
    if config.train.steps is not None:
        return config.train.steps
    if pathlib.Path(config.model.path).suffix == ".json":
        raise ConfigError(
            f"model.path: {config.model.path} has no tokenizer, so that the rows of data.train cannot be counted; give "
            "train.steps, or the model's folder"
        )
    return Setup(config).num_steps


def _export_bytes(config: Config, planned: Planned) -> int:
    """Of the weights that a run ends with: of adapters alone, or of a whole model."""
    itemsize = jnp.dtype(config.model.export_dtype or config.model.param_dtype).itemsize
    params = planned.model.params if config.lora is not None else of_files(planned.model.weights)
    return sum(math.prod(leaf.shape) * itemsize for leaf in jax.tree.leaves(params))


# Words.


def describe(plan: Plan) -> str:
    """All of it as text, for a terminal."""
    chips, chip = plan.topology.num_chips, plan.topology.chip
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    slices = f" x {plan.topology.num_slices} slices" if plan.topology.num_slices > 1 else ""
    rows = f"{plan.rows} rows of {plan.seq_len:,} a step"
    if plan.microbatch_rows < plan.rows:
        rows += f", {plan.microbatch_rows} at once"
    frozen = f", {_count(plan.num_frozen)} frozen" if plan.num_frozen else ""
    lines = [
        _line("model", f"{plan.model}: {_count(plan.num_trained)} parameters trained{frozen}"),
        _line("on", f"{plan.topology.name}{slices}, {chips} chip{'s' * (chips > 1)}: {mesh}"),
        _line("step", f"{rows}; remat {plan.remat}"),
        "",
        _line("memory", f"of one device; {_gib(plan.counted.peak)} counted, " + _compiled_words(plan)),
    ]
    lines += [_line("", f"{term.name:<14}{_gib(term.num_bytes):>12}") for term in plan.counted.terms if term.num_bytes]
    if plan.room_bytes is not None and plan.capacity_bytes is not None:
        room = plan.room_bytes
        fits = f"fits, with {_gib(room)} to spare" if room >= 0 else f"DOES NOT FIT: {_gib(-room)} too much"
        lines.append(_line("", f"{fits} ({_gib(plan.capacity_bytes)} there)"))
    if chip is not None and not chip.is_tpu:
        whole = "JAX takes three quarters of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise"
        lines.append(_line("", whole))
    lines.append(_line("", f"most are {plan.counted.largest.name}; fewer with {plan.counted.largest.lowered_by}"))
    lines += ["", _line("FLOPs", f"{plan.flops.all / 1e12:,.1f} T a step on all chips, if every token is trained:")]
    parts = {name: getattr(plan.flops, name) for name in ("maps", "attention", "experts", "loss")}
    lines += [_line("", f"{name:<14}{value / 1e12:>12,.1f} T") for name, value in parts.items() if value]
    if plan.flops.again:
        lines.append(_line("", f"{'of these':<14}{plan.flops.again / 1e12:>12,.1f} T  again, for the backward pass"))
    if plan.collectives:
        source = "in the compiled program" if plan.compiled is not None else "expected; no compiler was asked"
        lines += ["", _line("messages", f"of one device a step, {source}:")]
        for kind, axes, number, num_bytes in messages_by_kind(plan.collectives):
            along = ", ".join(axes) or "one device"
            lines.append(_line("", f"{kind:<18}{along:<22}{number:>7,}{_gib(num_bytes):>13}"))
    lines.append("")
    if plan.bound is None or chip is None:
        lines.append(_line("time", "no bound: nothing is known of this processor"))
    else:
        lines += _time_lines(plan)
    lines += [
        "",
        _line("on disk", f"a checkpoint {_gb(plan.checkpoint_bytes)}, the export {_gb(plan.export_bytes)}"),
        _line("planned in", f"{plan.seconds:.0f} processor seconds, {_resident_gib():.1f} GiB"),
    ]
    return "\n".join(lines)


def _time_lines(plan: Plan) -> list[str]:
    bound, chip = plan.bound, plan.topology.chip
    assert bound is not None and chip is not None and plan.tokens_per_second is not None and plan.mfu is not None
    lines = [_line("time", f"a step takes at least {bound.seconds:.3g} s, bound by {bound.by}:")]
    rates = {
        "compute": f"at {chip.flops / 1e12:,.0f} TFLOP/s a chip",
        "memory": f"at {chip.memory_rate / 1e9:,.0f} GB/s a chip",
        "links": f"at {chip.link_rate / 1e9:,.0f} GB/s into a chip",
    }
    if plan.topology.num_slices > 1 or (chip.linked and plan.topology.num_chips > chip.linked):
        rates["links"] += f", {chip.network_rate / 1e9:,.3g} by the network"
    lines += [_line("", f"{name:<14}{getattr(bound, name):>10.3g} s  {rate}") for name, rate in rates.items()]
    lines.append(_line("", f"({chip.source})"))
    each = plan.tokens_per_second / plan.topology.num_chips
    lines.append(
        _line("", f"at most {plan.tokens_per_second:,.0f} tokens/s, {each:,.0f} a chip; MFU bound {plan.mfu:.1%}")
    )
    if plan.hours is not None:
        hours, chips = plan.hours, plan.topology.num_chips
        lines.append(
            _line("", f"{plan.num_steps:,} steps: at least {hours:,.2f} hours, {hours * chips:,.1f} chip-hours")
        )
    return lines


def _compiled_words(plan: Plan) -> str:
    if plan.compiled is not None:
        away = plan.counted.peak / plan.compiled.peak_bytes - 1
        return f"{_gib(plan.compiled.peak_bytes)} as compiled ({away:+.1%})"
    if plan.missing is not None:
        return f"not compiled: pip install {plan.missing}"
    return "not compiled"


def as_json(plan: Plan) -> dict[str, Any]:
    """All of it for programs; bytes, FLOPs and seconds."""
    compiled, bound = plan.compiled, plan.bound
    return {
        "model": plan.model,
        "topology": plan.topology.name,
        "slices": plan.topology.num_slices,
        "chips": plan.topology.num_chips,
        "mesh": plan.mesh,
        "batch_size": plan.rows,
        "microbatch_size": plan.microbatch_rows,
        "seq_len": plan.seq_len,
        "remat": plan.remat,
        "parameters": {"trained": plan.num_trained, "frozen": plan.num_frozen},
        "memory": {
            "counted": {term.name: term.num_bytes for term in plan.counted.terms} | {"peak": plan.counted.peak},
            "compiled": None
            if compiled is None
            else {"peak": compiled.peak_bytes, "arguments": compiled.argument_bytes},
            "left": plan.room_bytes,
        },
        "flops": plan.flops._asdict(),
        "messages": [
            {"kind": kind, "axes": list(axes), "number": number, "bytes": num_bytes}
            for kind, axes, number, num_bytes in messages_by_kind(plan.collectives)
        ],
        "bound": None if bound is None else bound._asdict() | {"seconds": bound.seconds, "by": bound.by},
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "steps": plan.num_steps,
        "hours": plan.hours,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "export_bytes": plan.export_bytes,
    }


def messages_by_kind(collectives: list[Collective]) -> list[tuple[str, tuple[str, ...], int, int]]:
    """Kind, axes, how many a step, and their bytes, summed up."""
    found = total_bytes([each._replace(scope="") for each in collectives])
    return [(kind, axes, number, num_bytes) for (_, kind, axes), (number, num_bytes) in sorted(found.items())]


def _line(label: str, text: str) -> str:
    return f"{label:<11}{text}".rstrip()


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"


def _count(number: int) -> str:
    return f"{number / 1e9:,.2f} B" if number >= 1e9 else f"{number / 1e6:,.1f} M"


def _resident_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
