"""A compiled program, read: what it sends between devices, how often and where, and the largest array that it makes.

In: the text of a compiled program (`compiled.as_text()`), for TPU, GPU or CPU, and the sizes of the mesh that it was
compiled for. Out: its `Collective`s, and its largest `Array`s. Times of a loop are read from its condition where the
compiler does not say them (that for TPUs does not); a loop whose end is computed, such as that of the loss over chunks
of trained tokens, counts once.
"""

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

SCOPES = ("loss", "layers")
"""Names that `jax.named_scope` gave to parts of the step, each of which counts by itself."""

_ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|(?:branch|true|false|called)_computations?)=(\{[^}]*\}|[%\w.\-]+)")


class Collective(NamedTuple):
    """One instruction that sends arrays between devices."""

    kind: str
    """One of `KINDS`."""
    axes: tuple[str, ...]
    """Axes of the mesh along which a device meets others; several where groups are along all of them."""
    num_bytes: int
    """Of what a device holds before it or after it, whichever is more: the whole of what is gathered or reduced."""
    times: int
    """In one run of the program."""
    scope: str
    """One of `SCOPES`, or empty: the rest of the step."""
    is_async: bool
    """Other work may be done meanwhile."""
    is_open: bool
    """Within a loop whose end is computed, so that `times` says how often all such loops are come to, not turned."""


class Array(NamedTuple):
    """What an instruction writes to memory."""

    num_bytes: int
    """Without what fills up tiles."""
    shape: str
    """As the compiler writes it, such as `bf16[128256,4096]`."""
    scope: str
    op_name: str
    """Where in the program it comes from, as far as the compiler says."""


class Report(NamedTuple):
    """Of one compiled program."""

    collectives: list[Collective]
    arrays: list[Array]
    """The largest of each scope, the largest first; arguments are not made, so not among them."""

    @property
    def num_async(self) -> int:
        """Collectives that start in one place and end in another, each counted once however often it runs."""
        return sum(each.is_async for each in self.collectives)


class _Instruction(NamedTuple):
    name: str
    is_root: bool
    shape: str
    opcode: str
    rest: str
    """From the operands on."""

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    @property
    def called(self) -> list[str]:
        """Computations that it runs as parts of itself, bodies of loops left out."""
        return [name for listed in _CALLED.findall(self.rest) for name in re.findall(r"[\w.\-]+", listed)]


_Computation = dict[str, _Instruction]


def read_program(text: str, mesh_shape: Mapping[str, int]) -> Report:
    """Reads the text of a compiled program.

    Args:
        text: of `compiled.as_text()`.
        mesh_shape: sizes of the axes of the mesh, in its order.
    """
    entry, computations = _computations(text)
    collectives: list[Collective] = []
    largest: dict[str, Array] = {}  # by scope
    for instruction, visit in _visited(
        computations, entry, _Visit(1, "", is_inner=False, is_async=False, is_open=False)
    ):
        if (kind := _kind(instruction, visit)) is not None:
            collectives.append(_collective(kind, instruction, computations[visit.computation], visit, mesh_shape))
        if not visit.is_inner and instruction.opcode not in _MAKE_NOTHING:
            for shape, size, space in _arrays(instruction.shape):
                array = Array(size, shape, visit.scope, instruction.op_name)
                if not space:
                    largest[visit.scope] = max(largest.get(visit.scope, array), array)
    return Report(collectives, sorted(largest.values(), reverse=True))


_MAKE_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "optimization-barrier", "while", "conditional",
    "call",
}  # fmt: skip
"""What names arrays that are there, or are made by the parts of it."""


def hlo_lines(text: str) -> list[str]:
    """The lines of a program, an instruction on each, without what libtpu writes of Pallas kernels on further lines."""
    return re.sub(r"(kernel_metadata=\{)\n[^\n]*\n(\})", r"\1\2", text).splitlines()


def total_bytes(collectives: Sequence[Collective]) -> dict[tuple[str, str, tuple[str, ...]], tuple[int, int]]:
    """(scope, kind, axes) -> how many a run of the program does, and the sum of their bytes."""
    totals: dict[tuple[str, str, tuple[str, ...]], tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for each in collectives:
        key = (each.scope, each.kind, each.axes)
        number, num_bytes = totals[key]
        totals[key] = (number + each.times, num_bytes + each.times * each.num_bytes)
    return dict(totals)


# The walk through a program.


class _Visit(NamedTuple):
    """How a computation is come to."""

    times: int
    scope: str
    is_inner: bool
    """Within a fusion: its instructions write nothing to memory."""
    is_async: bool
    is_open: bool
    """Within a loop whose end is computed."""
    computation: str = ""


def _computations(text: str) -> tuple[str, dict[str, _Computation]]:
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in hlo_lines(text):
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _LINE.match(line)):
            current[found[2]] = _Instruction(found[2], bool(found[1]), *found.groups()[2:])
    assert entry, "no program"
    return entry, computations


def _visited(computations: dict[str, _Computation], name: str, visit: _Visit) -> Iterator[tuple[_Instruction, _Visit]]:
    """Every instruction that runs, those of a computation that is called twice, twice."""
    computation = computations[name]
    for each in computation.values():
        scope = visit.scope or _scope(each.op_name) or _scope(_origin(each, computation))
        here = visit._replace(scope=scope, computation=name)
        yield each, here
        if each.opcode == "while":
            body = re.search(r"body=%?([\w.\-]+)", each.rest)
            assert body
            count = _trip_count(each, computation, computations)
            inside = here._replace(times=visit.times * (count or 1), is_open=visit.is_open or count is None)
            yield from _visited(computations, body[1], inside)
        elif each.opcode in ("fusion", "call", "conditional", "async-start", "call-start"):
            is_inner = visit.is_inner or each.opcode == "fusion"
            inside = here._replace(is_inner=is_inner, is_async=visit.is_async or each.opcode.endswith("-start"))
            for called in each.called:
                yield from _visited(computations, called, inside)


def _scope(op_name: str) -> str:
    words = set(re.findall(r"\w+", op_name))
    return next((scope for scope in SCOPES if scope in words), "")


def _origin(instruction: _Instruction, computation: _Computation) -> str:
    """Where a collective that was put together from several, and so has no name, got its first array."""
    if instruction.op_name or not instruction.opcode.startswith(KINDS) or not instruction.operands:
        return ""
    source = computation.get(instruction.operands[0])
    while source is not None and not source.op_name and source.operands:
        source = computation.get(source.operands[0])
    return source.op_name if source else ""


def _trip_count(loop: _Instruction, computation: _Computation, computations: dict[str, _Computation]) -> int | None:
    """How often a loop runs, where that is a constant."""
    if known := re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', loop.rest):
        return int(known[1])
    name = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    assert name
    condition = computations[name[1]]
    root = next(each for each in condition.values() if each.is_root)
    if root.opcode == "fusion":  # its parameters are the root's operands, in order
        inner = computations[root.called[0]]
        compared = next(each for each in inner.values() if each.is_root)
        numbers = {each.name: int(each.rest.split(")")[0]) for each in inner.values() if each.opcode == "parameter"}
        sides = [root.operands[numbers[side]] if side in numbers else side for side in compared.operands]
        condition = inner | condition
    else:
        compared, sides = root, root.operands
    if compared.opcode != "compare" or "direction=LT" not in compared.rest:
        return None
    end = _constant(condition.get(sides[1]), condition)
    counter = condition.get(sides[0])
    index = re.search(r"index=(\d+)", counter.rest) if counter and counter.opcode == "get-tuple-element" else None
    if end is None or index is None:
        return None
    first = computation.get(loop.operands[0])
    start = None
    if first is not None and first.opcode == "tuple":
        start = _constant(computation.get(first.operands[int(index[1])]), computation)
    return max(end - (start or 0), 0)


def _constant(instruction: _Instruction | None, computation: _Computation) -> int | None:
    while instruction is not None and instruction.opcode in ("copy", "convert", "bitcast"):
        instruction = computation.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "constant":
        return None
    value = re.match(r"-?\d+\)", instruction.rest)
    return int(value[0][:-1]) if value else None


# One collective.


def _kind(instruction: _Instruction, visit: _Visit) -> str | None:
    """The kind of a collective, None for what is none, and for its later pieces where it is cut into some."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode not in KINDS:
        return None
    piece = re.search(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"', instruction.rest)
    if piece and piece[1] != "-1":
        return None
    # How the TPU's compiler writes it: an all-reduce of which each device keeps its part.
    is_scattered = visit.is_inner and visit.computation.startswith("all-reduce-scatter")
    return "reduce-scatter" if is_scattered else opcode


def _collective(
    kind: str, instruction: _Instruction, computation: _Computation, visit: _Visit, mesh_shape: Mapping[str, int]
) -> Collective:
    before = sum(_size(computation[name].shape) for name in instruction.operands if name in computation)
    after = _size(instruction.shape)
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        after -= before  # its result names what goes in, too
    is_async = (
        visit.is_async or instruction.opcode.endswith("-start") or "async_collective_fusion_config" in instruction.rest
    )
    axes = _axes(_groups(instruction.rest, mesh_shape), mesh_shape)
    return Collective(kind, axes, max(before, after), visit.times, visit.scope, is_async, visit.is_open)


def _arrays(shape: str) -> Iterator[tuple[str, int, bool]]:
    """Each array of a shape: how it is written, its bytes, and whether it lies in memory of its own (on TPUs, VMEM)."""
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = _ITEM_BITS.get(dtype)
        if bits is None:
            digits = re.search(r"\d+", dtype)
            bits = int(digits[0]) if digits else 8
        size = math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8
        yield f"{dtype}[{dims}]", size, bool(re.search(r"S\([1-9]", layout))


def _size(shape: str) -> int:
    return sum(size for _, size, _ in _arrays(shape))


def _groups(rest: str, mesh_shape: Mapping[str, int]) -> np.ndarray:
    """Numbers of devices, [groups, members]; all devices are one group where none is named.

    The compilers write them in four ways, here those of groups along the second axis of a mesh of 2 x 2:

        {{0,1},{2,3}}    [2,2]<=[4]    mesh['a'=2,'b'=2] {'b'}    source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
    """
    devices = np.arange(math.prod(mesh_shape.values()))
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        return np.array([[int(number) for number in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])])
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", rest):
        return np.array(
            [[int(number) for number in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        )
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return _counted(counted[2]).reshape(_numbers(counted[1]))
    meshed = re.search(
        r"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? \{([^}]*)\}", rest
    )
    if meshed:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", meshed[1])}
        placed = (_counted(meshed[2]) if meshed[2] else devices).reshape(tuple(sizes.values()))
        along = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", meshed[3])]
        across = [axis for axis in range(len(sizes)) if axis not in along]
        return placed.transpose(*across, *along).reshape(-1, math.prod(placed.shape[axis] for axis in along))
    assert re.search(r"replica_groups=\{\}", rest) or "replica_groups" not in rest, (
        f"groups in no known form: {rest[:300]}"
    )
    return devices[None]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _counted(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: the numbers from 0 on in rows of this shape, then with its dims in this order."""
    shape, _, order = text.partition("T")
    sizes = _numbers(shape)
    counted = np.arange(math.prod(sizes)).reshape(sizes)
    return counted.transpose(_numbers(order)) if order else counted


def _axes(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which members of a group differ."""
    places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, does in zip(mesh_shape, differ, strict=True) if does)
