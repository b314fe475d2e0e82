"""Starts that cannot go well: how soon all processes are gone, with which exit codes, and what they say.

    python tests/hosts/trials.py WORK --processes 4 --trials 3 [--cases config,data]     # prints a table

Each process has a folder of its own as its current one. Paths through /proc/self/cwd have the same name on all of them
and lead to other files, as those of hosts with disks of their own do.
"""

import argparse
import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import NamedTuple

REPO = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests" / "helpers")]

from compilation import xla_flags  # noqa: E402
from tiny_model import write_tiny_model  # noqa: E402

RUN = "\nimport sys\nfrom jaxsft.cli import main\nsys.exit(main())\n"
OWN = "/proc/self/cwd"


class Case(NamedTuple):
    """One process, the last one, is not as the others."""

    words: str
    code: int
    says: str
    """A part of what process 0 says; LAST is the number of the last process, OTHERS those of the others."""
    overrides: tuple[str, ...] = ()
    """Of the last process."""
    all_overrides: tuple[str, ...] = ()
    script: str = ""
    """Run before the command in the last process."""
    environment: tuple[tuple[str, str], ...] = ()
    """Of the last process."""
    all_environment: tuple[tuple[str, str], ...] = ()
    rows: int | None = None
    """In the data of the last process, where it has others."""
    is_absent: bool = False


WAIT = (("JAXSFT_START_SECONDS", "15"),)
OTHER_VERSION = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: "0.0.1" if name == "optax" else version(name)
"""
FAILS = """
from jaxsft.training.stop import StopSignal
def at(self, step):
    raise KeyError("planted")
StopSignal.at = at
"""
CASES = {
    "config": Case(
        "another learning rate",
        1,
        "OTHERS have optim.learning_rate 0.01, process LAST has 0.02",
        overrides=("optim.learning_rate=0.02",),
    ),
    "data": Case("other rows", 65, "OTHERS have source ", rows=30),
    "version": Case("another version of optax", 1, "process LAST has 0.0.1", script=OTHER_VERSION),
    "devices": Case(
        "another number of devices", 1, "process LAST has 2 x cpu", environment=(("XLA_FLAGS", xla_flags(2)),)
    ),
    "same mistake": Case("all have the same mistake", 1, "error: ", all_overrides=("optim.learning_rte=1",)),
    "mistake": Case("one has a mistake in its config", 1, "failed: ", overrides=("optim.learning_rte=1",)),
    "run folder": Case("a run folder of its own", 1, "do not see|does not see", all_overrides=(f"run_dir={OWN}/run",)),
    "failure": Case("one fails before the first step", 1, "the last lines of process LAST:", script=FAILS),
    "absent": Case("one does not come", 75, "within 15 s: missing LAST;", all_environment=WAIT, is_absent=True),
    "no coordinator": Case(
        "one has the address of nobody",
        75,
        "within 15 s: missing LAST;",
        environment=(("JAX_COORDINATOR_ADDRESS", "localhost:9"),),
        all_environment=WAIT,
    ),
}


class Ended(NamedTuple):
    """How processes ended."""

    seconds: float
    """Until all were gone, from the start of the first."""
    apart: float
    """Between the ends of the first and of the last."""
    codes: list[int | None]
    said: list[str]


def make_config(work: pathlib.Path) -> pathlib.Path:
    """A config of a tiny model; its data are in the current folder of each process."""
    model = write_tiny_model(work / "model")
    path = work / "trial.yaml"
    path.write_text(
        f"""
model: {{path: {model}, weights: random, remat: none}}
data: {{train: {OWN}/train.jsonl, seq_len: 128}}
train: {{batch_size: 8, steps: 2}}
log: {{every: 1}}
optim: {{learning_rate: 0.01}}
"""
    )
    return path


def run_all(
    config: pathlib.Path, place: pathlib.Path, case: Case | None, *, num_processes: int, seconds: float = 240
) -> Ended:
    """The command in each process, until all are gone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "XLA_FLAGS": xla_flags(1),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(num_processes),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    processes = []
    begin = time.monotonic()
    for number in range(num_processes):
        own = place / str(number)
        own.mkdir(parents=True, exist_ok=True)
        is_last = case is not None and number == num_processes - 1
        rows = 60 if case is None or not is_last or case.rows is None else case.rows
        lines = (REPO / "configs" / "quickstart" / "train.jsonl").read_text().splitlines(keepends=True)[:rows]
        (own / "train.jsonl").write_text("".join(lines))
        overrides = [f"run_dir={place}/run", f"data.cache={place}/cache"]
        mine = environment | {"JAX_PROCESS_ID": str(number)}
        script = ""
        if case is not None:
            overrides += case.all_overrides
            mine |= dict(case.all_environment)
        if case is not None and is_last:
            if case.is_absent:
                continue
            overrides += case.overrides
            mine |= dict(case.environment)
            script = case.script
        command = [sys.executable, "-c", script + RUN, "train", str(config), *overrides]
        with (own / "said.txt").open("w") as output:
            processes.append(subprocess.Popen(command, cwd=own, stdout=output, stderr=subprocess.STDOUT, env=mine))
    try:
        first = None
        while any(each.poll() is None for each in processes) and time.monotonic() - begin < seconds:
            if first is None and any(each.poll() is not None for each in processes):
                first = time.monotonic()
            time.sleep(0.05)
        took = time.monotonic() - begin
        apart = 0.0 if first is None else time.monotonic() - first
    finally:
        for each in processes:
            if each.poll() is None:
                each.kill()
                each.wait()
    said = [(place / str(number) / "said.txt").read_text(errors="replace") for number in range(len(processes))]
    return Ended(took, apart, [each.returncode for each in processes], said)


def problem_of(case: Case, ended: Ended, num_processes: int) -> str:
    """What did not hold; empty where all did."""
    others = "processes 0 and 1" if num_processes == 3 else f"processes 0 to {num_processes - 2}"
    others = "process 0" if num_processes == 2 else others
    says = case.says.replace("LAST", str(num_processes - 1)).replace("OTHERS have", f"{others} have")
    says = says.replace("process 0 have", "process 0 has")
    if set(ended.codes) != {case.code}:
        return f"exit codes {ended.codes}"
    if not any(each in ended.said[0] for each in says.split("|")):
        return f"process 0 does not say: {says}"
    if any(word in "".join(ended.said) for word in ("stack trace", "gloo", "Fatal")):
        return "C++ spoke"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES))
    args = parser.parse_args()
    config = make_config(args.work.resolve())
    for name in args.cases.split(","):
        case = CASES[name]
        found = []
        for number in range(args.trials):
            place = args.work.resolve() / f"{name.replace(' ', '-')}-{number}"
            ended = run_all(config, place, case, num_processes=args.processes)
            found.append((ended.seconds, ended.apart, problem_of(case, ended, args.processes)))
            if number == 0:
                for who, said in enumerate(ended.said):
                    print("\n".join(f"    [{who}] {line}" for line in said.splitlines()[-6:]))
        seconds, apart = (max(column) for column in list(zip(*found, strict=True))[:2])
        problems = "; ".join(problem for *_, problem in found if problem) or "all held"
        times = f"worst of {len(found)} {seconds:.1f} s, {apart:.1f} s from the first to the last"
        print(f"{case.words}: {times}: {problems}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
