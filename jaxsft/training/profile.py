"""Where the time of some steps goes: a trace for TensorBoard, xprof or Perfetto, and its summary as text.

In: the training loop, around its steps, and the compiled step. Out, in `profile/` of the run folder: the trace as JAX's
profiler writes it (`plugins/profile/TIME/`), `step.hlo.txt`, the compiled step, and `summary.txt`. A trace knows
operations by the names of their instructions; what they belong to is told by the metadata of the compiled step, which
carries the names that `jax.named_scope` gave to attention, loss and gradients.
"""

import collections
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from etils import epath

from jaxsft.config import ConfigError, LogConfig
from jaxsft.disk.buckets import is_bucket
from jaxsft.disk.pages import refuse_other_pages, write_page
from jaxsft.disk.writing import refuse_others, write_whole
from jaxsft.training.program import hlo_lines

SKIPPED_STEPS = 3
"""Steps of a start that are not traced: the first compiles, and the next ones may still wait for data."""

KINDS = ("matmul", "attention", "loss", "optimizer", "collectives", "other", "host")
"""What time is divided into. `matmul` is that of layers, outside of attention and loss; `optimizer` is all that comes
after the gradients; `host` the time in which the device has nothing to do."""

TRACED = "jaxsft: traced steps"
"""The name of the traced stretch within the trace."""

_COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective", "ragged-all-to-all", "send", "recv"
)  # fmt: skip


class Instruction(NamedTuple):
    """What is known of an instruction of a compiled program."""

    kind: str
    """One of KINDS."""
    is_container: bool
    """A loop or call, whose instructions are in the trace as well."""
    op_name: str
    """Where it stands in the Python program."""


class Shares(NamedTuple):
    """How one device spent the traced time."""

    device: str
    seconds: float
    """From the start of the first traced step to the end of the last."""
    of_kind: dict[str, float]
    """Seconds of each of KINDS; together `seconds`."""
    hidden_collectives: float
    """Seconds of collectives during which something was computed, which is where these seconds are counted."""
    operations: dict[tuple[str, Instruction], float]
    """Seconds of each instruction, with its name."""


STEP, SUMMARY = "step.hlo.txt", "summary.txt"
STEP_MARK = b"// jaxsft: the compiled step\n"
"""A comment to HLO."""
OLDER_STEP_MARK = b"HloModule jit_train_step,"


def check_profile(log: LogConfig, num_steps: int, folder: epath.Path) -> None:
    """Refuses a profile for which a whole run is too short, or whose files others have in its folder.

    Raises:
        ConfigError: says how many steps it has, and how many there would have to be; or which file is not ours.
    """
    if log.profile_steps is not None and is_bucket(folder):
        raise ConfigError(f"log.profile_steps: traces are written to a disk, and run_dir {folder.parent} is a bucket")
    if log.profile_steps is not None:
        _refuse_others(_own_folder(folder))
    if log.profile_steps is not None and SKIPPED_STEPS + log.profile_steps > num_steps:
        raise ConfigError(
            f"log.profile_steps: {log.profile_steps} steps after the first {SKIPPED_STEPS} are more than the run's"
            f" {num_steps}"
        )


class Profiler:
    """Traces some steps of this start of a run; does nothing where none are asked for."""

    def __init__(
        self, steps: int | None, folder: epath.Path, *, first: int, num_steps: int, say: Callable[[str], None]
    ) -> None:
        """Nothing is traced yet.

        Args:
            steps: to be traced; None for none.
            folder: for trace and summary; of several processes each has one of its own inside.
            first: the step with which this start begins.
            num_steps: of the whole run.
            say: is told the summary.
        """
        self._folder = _own_folder(folder)
        self._say = say
        self._begin = self._end = -1
        self._traced: Any = None
        if steps is None:
            return
        self._begin, self._end = first + SKIPPED_STEPS, first + SKIPPED_STEPS + steps
        if self._end > num_steps:
            self._begin = self._end = -1
            say(f"no profile: {num_steps - first} steps are left, and {SKIPPED_STEPS} + {steps} are needed")

    def is_edge(self, done: int) -> bool:
        """Whether the trace begins or ends after so many steps."""
        return done in (self._begin, self._end)

    def start_at(self, done: int, state: Any) -> None:
        """Begins the trace, once all steps before it are over, if it is to begin here."""
        if done != self._begin:
            return
        jax.block_until_ready(state)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow down the host, and then be taken for the host's own time
        jax.profiler.start_trace(str(self._folder), profiler_options=options)
        self._traced = jax.profiler.TraceAnnotation(TRACED)
        self._traced.__enter__()

    def stop_at(self, done: int, state: Any, compiled: Callable[[], str]) -> None:
        """Ends the trace and summarises it, if it is to end here; `compiled` gives the HLO text of the step."""
        if done != self._end or self._traced is None:
            return
        jax.block_until_ready(state)
        try:
            self.close()
            text = compiled()
            _refuse_others(self._folder)
            write_whole(self._folder / STEP, STEP_MARK.decode() + text)
            summary = describe(
                read_trace(newest_trace(self._folder), text), first=self._begin, num_steps=self._end - self._begin
            )
            write_page(self._folder / SUMMARY, f"jaxsft: summary of a profile\n{summary}")
        except Exception as error:  # other makers' traces: their shape may be new; and no profile is worth a run
            self._say(f"WARNING: no summary of the trace in {self._folder}: {type(error).__name__}: {error}")
            return
        self._say(summary.split("\n\n")[0])
        self._say(f"trace and summary: {self._folder}")

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._traced is not None:
            self._traced.__exit__(None, None, None)
            self._traced = None
            jax.profiler.stop_trace()


def _own_folder(folder: epath.Path) -> epath.Path:
    return folder / f"process_{jax.process_index()}" if jax.process_count() > 1 else folder


def _refuse_others(folder: epath.Path) -> None:
    refuse_others(folder / STEP, STEP_MARK, OLDER_STEP_MARK)
    refuse_other_pages([folder / SUMMARY])


def newest_trace(folder: epath.Path) -> epath.Path:
    """The `.xplane.pb` that was written last."""
    return max(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().mtime)


def read_trace(path: epath.Path, hlo: str) -> list[Shares]:
    """How each device of this process spent the traced time.

    Args:
        path: an `.xplane.pb` with a stretch called TRACED.
        hlo: text of the compiled step.

    Raises:
        ValueError: the stretch, or any operation of a device, is not in the trace.
    """
    instructions = read_instructions(hlo)
    module = re.search(r"^HloModule ([\w.\-]+)", hlo, re.MULTILINE)
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    stretches = [event for plane in planes for line in plane.lines for event in line.events if event.name == TRACED]
    if not stretches:
        raise ValueError(f"{path}: nothing is called {TRACED!r}")
    window = float(stretches[0].start_ns), float(stretches[0].end_ns)
    found: dict[str, list[_Run]] = collections.defaultdict(list)
    for plane in planes:
        for device, name, in_module, start, end in _operations(plane):
            instruction = instructions.get(name) or _by_kernel(name, instructions)
            if module is not None and in_module not in (None, module[1]):
                instruction = Instruction("other", False, f"of {in_module}")
            found[device].append(_Run(name, start, end, instruction))
    if not found:
        raise ValueError(f"{path}: no operation of a device")
    return [_divide(device, runs, window) for device, runs in sorted(found.items())]


class _Run(NamedTuple):
    """An operation that ran, in nanoseconds."""

    name: str
    start: float
    end: float
    instruction: Instruction


def _operations(plane: Any) -> Iterable[tuple[str, str, str | None, float, float]]:
    """(device, instruction, module, start, end) of what ran on devices.

    An accelerator has a plane of its own, with a line for each stream, or one line of operations. On CPU operations are
    events of the host's threads that name their device; where one goes on in other threads after its call, a second
    event with the same number marks its end.
    """
    lines = list(plane.lines)
    is_device = plane.name.startswith("/device:")
    if is_device:
        of_operations = [line for line in lines if line.name == "XLA Ops"]
        lines = of_operations or [line for line in lines if line.name.startswith("Stream")]
    started = []
    ends: dict[Any, float] = {}
    for line in lines:
        for event in line.events:
            stats = dict(event.stats)
            if not is_device and event.name.startswith("end: "):
                ends[stats.get("_c")] = float(event.end_ns)
            elif is_device or "hlo_op" in stats:
                started.append((event.name, float(event.start_ns), float(event.end_ns), stats))
    for text, start, end, stats in started:
        device = plane.name.removeprefix("/device:") if is_device else f"CPU:{stats.get('device_ordinal', 0)}"
        name = str(stats.get("hlo_op") or text.lstrip("%").split(" ")[0])
        yield device, name, stats.get("hlo_module"), start, max(end, ends.get(stats.get("_p"), 0.0))


def _divide(device: str, runs: list[_Run], window: tuple[float, float]) -> Shares:
    """Every moment of the window goes to what is computed in it, in equal parts; failing that to collectives; failing
    that to the loop around it; else to the host."""
    begin, end = window
    edges = [
        (at, change, index)
        for index, run in enumerate(runs)
        if run.end > begin and run.start < end
        for at, change in ((max(run.start, begin), 1), (min(run.end, end), -1))
    ]
    active: tuple[set[int], set[int], set[int]] = (set(), set(), set())
    of_kind: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    operations: dict[tuple[str, Instruction], float] = collections.defaultdict(float)
    hidden, before = 0.0, begin
    for at, change, index in [*sorted(edges), (end, 0, -1)]:
        running = next((each for each in active if each), None)
        for each in running or ():
            part = (at - before) / len(running or ())
            of_kind[runs[each].instruction.kind] += part
            operations[runs[each].name, runs[each].instruction] += part
        if running is None:
            of_kind["host"] += at - before
        elif running is active[0] and active[1]:
            hidden += at - before
        before = at
        if change:
            instruction = runs[index].instruction
            rank = 2 if instruction.is_container else 1 if instruction.kind == "collectives" else 0
            (active[rank].add if change > 0 else active[rank].discard)(index)
    return Shares(
        device,
        (end - begin) / 1e9,
        {kind: spent / 1e9 for kind, spent in of_kind.items()},
        hidden / 1e9,
        {operation: spent / 1e9 for operation, spent in operations.items()},
    )


def read_instructions(hlo: str) -> dict[str, Instruction]:
    """Every instruction of a compiled program by its name, from its text."""
    lines: dict[str, tuple[str, str, str]] = {}
    members: dict[str, list[str]] = collections.defaultdict(list)
    computation = ""
    for line in hlo_lines(hlo):
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = header[1]
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\((.*)", line):
            lines[found[1]] = found[2], found[3], _attribute("op_name", found[3])
            members[computation].append(found[1])

    def inside(name: str) -> Iterable[tuple[str, str, str]]:
        """An instruction, and those that it calls."""
        yield lines[name]
        called = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", lines[name][1])
        if called and lines[name][0] in ("fusion", "call", "async-start"):
            for member in members[called[1]]:
                yield from inside(member)

    return {name: _classify(list(inside(name))) for name in lines}


def _attribute(name: str, text: str) -> str:
    found = re.search(rf'{name}="([^"]*)"', text)
    return found[1] if found else ""


def _classify(parts: list[tuple[str, str, str]]) -> Instruction:
    """The kind of an instruction, by itself and those that it calls, each with its opcode, the rest of its line, and
    op_name."""
    opcode, _, op_name = parts[0]
    is_container = opcode in ("while", "conditional", "call")
    if any(part.startswith(_COLLECTIVES) for part, _, _ in parts):
        return Instruction("collectives", is_container, op_name)
    products = [part for part in parts if _is_product(*part[:2])]
    # A fusion with a matmul in it goes by the name of the matmul; else by its own name, or by those of its parts.
    names = [part[2] for part in products] or [op_name] * bool(op_name) or [part[2] for part in parts if part[2]]
    op_name = names[0] if names else ""
    if opcode == "while":
        return Instruction("other", True, op_name)
    kind = _scope(op_name) or ("matmul" if products else "other")
    return Instruction(kind, is_container, op_name)


def _is_product(opcode: str, rest: str) -> bool:
    if opcode == "custom-call":
        return bool(re.search("gemm|matmul|conv", _attribute("custom_call_target", rest)))
    return opcode in ("dot", "convolution", "ragged-dot", "scaled-dot")


def _scope(op_name: str) -> str | None:
    words = set(re.findall(r"\w+", op_name))
    if "attention" in words or "loss" in words:
        return "attention" if "attention" in words else "loss"
    return "optimizer" if "train_step" in words and "gradients" not in words else None


def _by_kernel(name: str, instructions: dict[str, Instruction]) -> Instruction:
    """The kind of a kernel by its own name: within a graph of kernels, its instruction is not known."""
    for pattern, kind in (("nccl", "collectives"), ("flash|fmha|sdpa", "attention"), ("gemm|cutlass|nvjet", "matmul")):
        if re.search(pattern, name, re.IGNORECASE):
            return Instruction(kind, False, name)
    return instructions.get(re.sub(r"_(\d+)$", r".\1", name), Instruction("other", False, name))


def describe(devices: list[Shares], *, first: int, num_steps: int) -> str:
    """The summary as text: a table with a line for each device, then the operations that took longest on the first."""
    seconds = devices[0].seconds
    lines = [
        f"profile of steps {first + 1} to {first + num_steps}: {seconds / num_steps * 1000:,.1f} ms each, of which",
        "  " + " " * 10 + "".join(f"{kind:>13}" for kind in KINDS),
    ]
    for shares in devices:
        parts = "".join(f"{shares.of_kind[kind] / shares.seconds:>13.1%}" for kind in KINDS)
        lines.append(f"  {shares.device:<10}{parts}")
    hidden = max(shares.hidden_collectives / shares.seconds for shares in devices)
    if hidden >= 0.001:
        lines.append(f"  collectives behind other work, counted there: up to {hidden:.1%}")
    lines += ["", f"the longest operations of {devices[0].device}:"]
    longest = sorted(devices[0].operations.items(), key=lambda item: -item[1])[:20]
    for (name, instruction), spent in longest:
        place = "/".join(instruction.op_name.split("/")[-2:])
        lines.append(
            f"  {spent / seconds:>6.1%}  {spent / num_steps * 1000:>9.2f} ms a step  {instruction.kind:<12}"
            f"{name:<34}{place}".rstrip()
        )
    return "\n".join(lines) + "\n"
