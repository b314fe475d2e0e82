"""A traced program, read: the matrix products of a step and their FLOPs, also of those that remat computes again.

In: what `jax.jit(step).trace(...)` gives, of which nothing is compiled. Out: its `Matmul`s, for all devices together.
Of a loop whose end is computed, such as that of the loss over chunks of trained tokens, one turn counts, on one device;
of a kernel, which may leave out places of its grid, one place; a branch counts as the largest of its kind.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax._src.interpreters import partial_eval  # Public jax has no way to leave out what is not needed.

AGAIN = "rematted_computation"
"""What jax calls the part of a backward pass that computes a forward pass again."""


class Matmul(NamedTuple):
    """A matrix product of a program."""

    flops: int
    """Of all its runs on all devices: 2 for each product of two numbers, and its addition. Of an open one, of one turn
    of its loop, or place of its grid, on one device."""
    dtype: str
    """Of what comes out."""
    shape: tuple[int, ...]
    name: str
    """Scopes and names of the functions that it stands in."""
    is_again: bool
    """It is computed a second time, for the backward pass."""
    is_open: bool
    """Within a loop whose end is computed, or in a kernel."""
    runs: int
    """How often it is begun, of all devices as one: for an open one, how often its loop or kernel is."""


def read_matmuls(traced: Any) -> list[Matmul]:
    """The matrix products of a traced program (`jax.stages.Traced`, or its `jaxpr`) that its results need.

    Others are traced as well, such as the gradients of weights that are not trained, and left out by the compiler.
    """
    jaxpr = _inner(getattr(traced, "jaxpr", traced))
    needed, _ = partial_eval.dce_jaxpr(jaxpr, True)
    return list(_matmuls(needed, _Visit(1, 1, 1, "", is_open=False)))


def _inner(jaxpr: Any) -> Any:
    """Without the constants that are closed over."""
    return getattr(jaxpr, "jaxpr", jaxpr)


class _Visit(NamedTuple):
    """How a part of the program is reached."""

    times: int
    """How often it runs, on all devices; in an open loop, in a turn on one of them."""
    turns: int
    """Of all scans around it; of those around an open loop."""
    runs: int
    """Of all scans around the innermost program that is given by hand for each device (`shard_map`); of all, where
    there is none."""
    path: str
    is_open: bool
    is_by_hand: bool = False
    """Within such a program."""


def _matmuls(jaxpr: Any, visit: _Visit) -> Iterator[Matmul]:
    for equation in jaxpr.eqns:
        kind, params = equation.primitive.name, equation.params
        name = f"{visit.path}/{equation.source_info.name_stack}"
        if kind == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            flops = 2 * math.prod(left.shape[dim] for dim in contracted) * math.prod(out.shape) * visit.times
            yield Matmul(flops, str(out.dtype), out.shape, name, AGAIN in name, visit.is_open, visit.runs)
        inner, branches = visit._replace(path=name), list(_parts(params))
        if kind == "scan":
            turns = visit.turns * (1 if visit.is_open else params["length"])
            runs = visit.runs if visit.is_by_hand else turns
            inner = inner._replace(times=visit.times * params["length"], turns=turns, runs=runs)
        elif kind in ("while", "pallas_call") and not visit.is_open:
            inner = inner._replace(times=1, is_open=True)
        elif kind == "shard_map":  # the shapes inside are parts along the axes that are given by hand from here on
            sizes = (params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            count = 1 if visit.is_open else math.prod(sizes)
            inner = inner._replace(times=visit.times * count, runs=visit.turns, is_by_hand=True)
        of_branches = [list(_matmuls(part, inner)) for part in branches]
        if kind == "cond":
            yield from max(of_branches, key=lambda each: sum(matmul.flops for matmul in each), default=[])
        else:
            for each in of_branches:
                yield from each


def _parts(params: dict[str, Any]) -> Iterator[Any]:
    """The programs within an instruction."""
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(_inner(each), "eqns"):
                yield _inner(each)
