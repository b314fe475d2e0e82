"""Which of several ways to run a config would do best: how many rows at once, which mesh, how much is computed again.

In: a config and a topology. Out: plans, counted without a compiler, or the one that the compiler says fits.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType

from jaxsft.config import Config, ConfigError
from jaxsft.mesh import AXES, ROW_AXES, check_divisible
from jaxsft.plan.compiling import Planned, flops_of, mesh_of, open_planned, trace_step
from jaxsft.plan.costs import Flops
from jaxsft.plan.make import Plan, as_on, make_plan, plan_of
from jaxsft.plan.topologies import Topology, missing_compiler

MOST_ROWS = 1024
"""Of one device at once."""
LONG = 16384
"""Positions from which on rows are worth cutting."""

NOTHING = Flops(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""Where memory alone is asked for."""

Say = Callable[[str], None]


def largest_microbatch(config: Config, topology: Topology, *, compiles: bool, say: Say) -> Plan:
    """The plan with the most rows at once that fit, by powers of two for each device.

    The step has as many microbatches as the config asks for. Where a compiler is there, it has the last word.

    Args:
        config: of the run.
        topology: what it is to run on.
        compiles: with the real compiler, where that is installed.
        say: is told what was tried.

    Raises:
        ConfigError: nothing is known of the chips, or not even one row for each device fits.
    """
    if topology.chip is None:
        raise ConfigError("--search: it is not known how much memory this processor has; name a chip with --topology")
    jax.config.update("jax_platforms", "cpu")
    config = as_on(config, topology)
    planned = open_planned(config, mesh_of(config, topology))
    shares = math.prod(planned.mesh.shape[axis] for axis in ROW_AXES)
    sizes = [shares * 2**power for power in range(MOST_ROWS.bit_length())]
    at = max(_counted_to_fit(config, topology, planned, sizes), 0)
    if not compiles or missing_compiler(topology) is not None:
        return _checked(make_plan(with_rows(config, sizes[at]), topology, compiles=compiles))
    best: Plan | None = None
    direction = 0
    while 0 <= at < len(sizes):
        plan = make_plan(with_rows(config, sizes[at]), topology)
        fits = plan.room_bytes is not None and plan.room_bytes >= 0
        verdict = "fits" if fits else "too much"
        say(f"{sizes[at]} rows at once: {plan.peak_bytes / 2**30:,.2f} GiB as compiled, {verdict}")
        best = plan if fits else best
        before, direction = direction, 1 if fits else -1
        if before not in (0, direction):
            break  # One of two neighbours fits.
        at += direction
    return _checked(best or plan)


def _counted_to_fit(config: Config, topology: Topology, planned: Planned, sizes: Sequence[int]) -> int:
    """Index of the most rows that fit, as counted; -1 where none do."""
    for at, rows in enumerate(sizes):
        plan = plan_of(with_rows(config, rows), topology, planned, NOTHING)
        if plan.room_bytes is None or plan.room_bytes < 0:
            return at - 1
    return len(sizes) - 1


def _checked(plan: Plan) -> Plan:
    if plan.room_bytes is not None and plan.room_bytes < 0:
        raise ConfigError(
            f"--search: {plan.microbatch_rows} rows, one for each device, need {plan.peak_bytes / 2**30:,.2f} GiB, "
            f"{-plan.room_bytes / 2**30:,.2f} more than there is; most are {plan.counted.largest.name}, fewer with "
            f"{plan.counted.largest.lowered_by}"
        )
    return plan


def with_rows(config: Config, rows: int) -> Config:
    """The config with so many rows at once, and as many microbatches as before."""
    train = {"batch_size": rows * config.train.num_microbatches, "microbatch_size": rows}
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def suggest(config: Config, topology: Topology) -> list[Plan]:
    """Plans of the same step on other meshes, with other remat policies and microbatches, those that fit; best first.

    They are counted, not compiled: the first ones are worth a plan of their own. For each mesh and policy it is the
    microbatch with the most rows that fit, as fewer microbatches gather weights less often.

    Raises:
        ConfigError: nothing is known of the chips, or nothing fits.
    """
    if topology.chip is None:
        raise ConfigError("--suggest: nothing is known of this processor; name a chip with --topology")
    jax.config.update("jax_platforms", "cpu")
    config = as_on(config, topology)
    found: list[Plan] = []
    for remat in ("none", "attention", "full", "offload"):
        of_policy = config.model_copy(update={"model": config.model.model_copy(update={"remat": remat})})
        planned = open_planned(of_policy, mesh_of(of_policy, topology))
        flops = flops_of(trace_step(of_policy, planned), of_policy, planned)
        for sizes in _meshes(of_policy, topology, has_experts=planned.structure.routing is not None):
            plan = _on_mesh(of_policy, topology, planned, sizes, flops)
            found += [plan] if plan is not None else []
    if not found:
        raise ConfigError(
            f"--suggest: nothing fits {topology.name}; try more chips, adapters (lora) or a smaller batch"
        )
    return sorted(found, key=lambda plan: (plan.bound.seconds, sum(plan.bound)) if plan.bound else (math.inf, math.inf))


def _meshes(config: Config, topology: Topology, *, has_experts: bool) -> Iterator[dict[str, int]]:
    """Sizes of the axes that make sense: copies along slices, `tensor` within a host, `context` of long rows."""
    chips = topology.num_chips
    contexts = (1, 2, 4, 8) if config.data.seq_len >= LONG else (1,)
    for tensor, context, expert in itertools.product((1, 2, 4, 8), contexts, (1, 4, 8) if has_experts else (1,)):
        others = topology.num_slices * tensor * context * expert
        if chips % others == 0:
            yield dict(zip(AXES, (topology.num_slices, chips // others, expert, context, tensor), strict=True))


def _on_mesh(config: Config, topology: Topology, planned: Planned, sizes: dict[str, int], flops: Flops) -> Plan | None:
    """The plan with the fewest microbatches that fit; None where the mesh cuts something unevenly, or nothing fits."""
    mesh = AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    for number in (1, 2, 4, 8, 16, 32, 64):
        if config.train.batch_size % number:
            return None
        train = config.train.model_copy(update={"microbatch_size": config.train.batch_size // number})
        cut = config.model_copy(update={"train": train})
        rows = {"microbatch (b)": train.microbatch_rows, "data.seq_len (t)": config.data.seq_len}
        try:
            check_divisible(mesh, planned.model.weights, rows)
        except ConfigError:
            return None
        plan = plan_of(cut, topology, planned._replace(mesh=mesh), flops)
        if plan.room_bytes is not None and plan.room_bytes >= 0:
            return plan
    return None


def describe_suggestions(plans: Sequence[Plan], *, most: int = 10) -> str:
    """A line for each, best first."""
    lines = [f"{'mesh':<34}{'remat':<11}{'at once':>8}{'GiB':>8}{'of':>7}{'tokens/s':>13}  bound by"]
    for plan in plans[:most]:
        mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
        room = (plan.peak_bytes + (plan.room_bytes or 0.0)) / 2**30
        assert plan.bound is not None and plan.tokens_per_second is not None
        lines.append(
            f"{mesh:<34}{plan.remat:<11}{plan.microbatch_rows:>8}{plan.peak_bytes / 2**30:>8.2f}{room:>7.1f}"
            f"{plan.tokens_per_second:>13,.0f}  {plan.bound.by}"
        )
    lines.append("counted, at most, if every token is trained; plan one of them to have it compiled")
    return "\n".join(lines)
