"""Faults of one process among several: how soon all are gone, what they say last, and whether the run goes on.

    python tests/faults/hosts.py WORK --processes 2 --trials 5 --faults kill,stopped     # adds to WORK/trials.jsonl
    python tests/faults/hosts.py WORK --table                                            # of all trials there

Each trial starts a run in several processes on CPU (gloo), plants one fault in one of them in the middle of training,
and holds if all others end within a minute with the cause as their last words and the exit code of docs/reliability.md,
and if the same command then leaves what the calm run left: the arrays of the last checkpoint, every line of the metrics
and the export, to the byte.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

REPO = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests" / "helpers"), str(REPO / "tests" / "faults")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from campaign import difference, result_of  # noqa: E402
from compilation import xla_flags  # noqa: E402
from tiny_model import write_tiny_model  # noqa: E402

STEPS, AT, BAD_ROW = 16, 6, 90
"""Steps of a run, the one before which a fault comes, and the line of the data that is bad; rows are read in windows of
32, and a step trains some five of them."""

HOST = re.escape(socket.gethostname())


class Fault(NamedTuple):
    """A way to fail."""

    words: str
    """For the table."""
    code: int | None
    """What the process itself ends with; None where it is killed."""
    others: int
    """What all others end with."""
    last: str
    """A pattern for the last line of all others; RANK is the number of the process that fails."""
    own: str = ""
    """A pattern for the last line of the process itself."""
    script: str = ""
    """Run before the command in the process that fails; may use `at(step, work)`."""
    signal: int | None = None
    overrides: tuple[str, ...] = ()


PLANT = """
import os, signal, sys, time
from jaxsft.training.stop import StopSignal
before = StopSignal.at
def at(step, work):
    def then(self, now):
        if now == step:
            print("FAULT", flush=True)
            work()
        return before(self, now)
    StopSignal.at = then
"""
RUN = "\nfrom jaxsft.cli import main\nsys.exit(main())\n"

FAULTS = {
    "kill": Fault(
        "SIGKILL", None, 75, rf"process RANK on {HOST} (has not answered for \d+ s|is gone)", signal=signal.SIGKILL
    ),
    "exception": Fault(
        "exception in a step", 1, 1, rf"process RANK on {HOST} failed: KeyError: 'planted'", "KeyError: 'planted'",
        script=f"def work(): raise KeyError('planted')\nat({AT}, work)",
    ),
    "bad-row": Fault(
        "bad row in the middle of the data", 65, 65, rf"(process \d on {HOST} failed|error): .*train.jsonl",
    ),
    "disk-full": Fault(
        "disk full in a save", 74, 74, rf"process RANK on {HOST} failed: .*checkpoints/8", "error: .*checkpoints/8",
        script="import resource\ndef work():\n signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f" resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\nat({AT}, work)",
    ),
    "stopped": Fault(
        "SIGSTOP", 75, 75, rf"process RANK on {HOST} has not answered for \d+ s",
        rf"process (RANK on {HOST} stood still for \d+ s; the others have ended|\d on {HOST} .*)",
        signal=signal.SIGSTOP,
    ),
    "stuck": Fault(
        "alive but stuck in its data", 75, 75,
        rf"process RANK on {HOST} failed: no step was finished for \d+ s .* while the next batch was waited for",
        r"error: no step was finished for \d+ s .* while the next batch was waited for",
        script="from jaxsft.batches.stream import StreamLoader\nmake = StreamLoader.batch\n"
        "def batch(self, step, rows=slice(None)):\n"
        f" if step == {AT}:\n  print('FAULT', flush=True)\n  time.sleep(1000)\n"
        " return make(self, step, rows)\nStreamLoader.batch = batch",
    ),
    "terminated": Fault("SIGTERM", 75, 75, r"", signal=signal.SIGTERM),
}  # fmt: skip


class Trial(NamedTuple):
    """How one ended."""

    fault: str
    processes: int
    rank: int
    seconds: float
    """From the fault to the end of the last of the others."""
    is_continued: bool
    """Whether the same command was given again, and left what the calm run left."""
    problem: str
    """Empty where all held."""


def make_config(work: pathlib.Path) -> pathlib.Path:
    """A config of a tiny model; its data are in the `data` folder beside the run."""
    model = write_tiny_model(work / "model")
    path = work / "hosts.yaml"
    path.write_text(
        f"""
model: {{path: {model}, weights: random, remat: none}}
data: {{stream: true, shuffle_buffer: 32, seq_len: 128}}
train: {{batch_size: 8, steps: {STEPS}}}
log: {{every: 1}}
optim: {{learning_rate: 1e-2}}
checkpoint: {{every: 4}}
"""
    )
    return path


def make_data(place: pathlib.Path, *, is_bad: bool = False) -> None:
    """Rows in `place/data`; a bad one is as long as the one in whose place it is."""
    lines = (REPO / "configs" / "quickstart" / "train.jsonl").read_text().splitlines(keepends=True)[:240]
    if is_bad:
        lines[BAD_ROW] = "x" * (len(lines[BAD_ROW].encode()) - 1) + "\n"
    (place / "data").mkdir(parents=True, exist_ok=True)
    (place / "data" / "train.jsonl").write_text("".join(lines))


def start(
    config: pathlib.Path, place: pathlib.Path, num_processes: int, scripts: dict[int, str], *overrides: str
) -> list[subprocess.Popen]:
    """The command in each of the processes, or a script in its place; what they say goes to `place/N.txt`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": xla_flags(1),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(num_processes),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    arguments = ["train", str(config), f"run_dir={place}/run", f"data.train={place}/data/train.jsonl", *overrides]
    processes = []
    for rank in range(num_processes):
        program = ["-c", PLANT + scripts[rank] + RUN] if rank in scripts else ["run.py"]
        with open(place / f"{rank}.txt", "w") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *program, *arguments],
                    cwd=REPO,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment | {"JAX_PROCESS_ID": str(rank)},
                )  # fmt: skip
            )
    return processes


def wait(processes: list[subprocess.Popen], seconds: float) -> float:
    """Until all have ended; how long that took, infinity where not all did."""
    begin = time.monotonic()
    while any(process.poll() is None for process in processes):
        if time.monotonic() - begin > seconds:
            return float("inf")
        time.sleep(0.02)
    return time.monotonic() - begin


def run_calmly(config: pathlib.Path, place: pathlib.Path, num_processes: int) -> str:
    """The command with nothing planted; what went wrong."""
    processes = start(config, place, num_processes, {})
    try:
        wait(processes, 400)
    finally:
        for process in processes:
            process.kill()
    codes = [process.wait() for process in processes]
    return (
        "" if not any(codes) else f"exit codes {codes}: {said(place, codes.index(next(filter(None, codes))))[-1500:]}"
    )


def said(place: pathlib.Path, rank: int) -> str:
    return (place / f"{rank}.txt").read_text(errors="replace")


def calm_result(config: pathlib.Path, place: pathlib.Path, num_processes: int) -> dict[str, object]:
    """What the run leaves that nothing happens to."""
    if not (place / "run" / "export").exists():
        make_data(place)
        assert not (problem := run_calmly(config, place, num_processes)), problem
    return result_of(place / "run")


def trial(
    name: str,
    config: pathlib.Path,
    place: pathlib.Path,
    expected: dict[str, object],
    *,
    num_processes: int,
    rank: int,
    is_continued: bool = True,
    overrides: tuple[str, ...] = (),
) -> Trial:
    """Plants a fault in one process, waits for the end of all, and starts them again if they are to be continued."""
    fault = FAULTS[name]
    make_data(place, is_bad=name == "bad-row")
    scripts = {rank: fault.script} if fault.script else {}
    processes = start(config, place, num_processes, scripts, *overrides)
    try:
        seconds, problem = _watch(fault, place, processes, rank)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if not problem and is_continued:
        make_data(place)
        problem = run_calmly(config, place, num_processes)
        if not problem and (found := difference(result_of(place / "run"), expected)):
            problem = f"continued, it left other {found}"
    return Trial(name, num_processes, rank, seconds, is_continued, problem)


def _watch(fault: Fault, place: pathlib.Path, processes: list[subprocess.Popen], rank: int) -> tuple[float, str]:
    """Waits for the fault, or sends it; then for the end of all. Seconds, and what did not hold."""
    metrics = place / "run" / "metrics.jsonl"
    is_planted = bool(fault.script)
    deadline = time.monotonic() + 300
    while True:
        if fault.signal is not None and metrics.exists() and f'"step": {AT},' in metrics.read_text():
            processes[rank].send_signal(fault.signal)
            break
        if is_planted and "FAULT" in said(place, rank):
            break
        if not is_planted and fault.signal is None and any(process.poll() is not None for process in processes):
            break
        if time.monotonic() > deadline or (is_planted and processes[rank].poll() is not None):
            return float("inf"), f"the fault did not come: {said(place, rank)[-1500:]}"
        time.sleep(0.01)
    others = [process for number, process in enumerate(processes) if number != rank]
    is_stopped = fault.signal == signal.SIGSTOP
    seconds = wait(others if is_stopped else processes, 100)
    if is_stopped:
        processes[rank].send_signal(signal.SIGCONT)
        if wait([processes[rank]], 60) > 20:
            return seconds, "the stopped one did not end"
    for number, process in enumerate(processes):
        is_own = number == rank
        code = (fault.code if fault.code is not None else -signal.SIGKILL) if is_own else fault.others
        pattern = (fault.own if is_own else fault.last).replace("RANK", str(rank))
        last = said(place, number).rstrip().rpartition("\n")[2]
        if process.poll() != code:
            return seconds, f"process {number} ended with {process.poll()}: {said(place, number)[-1500:]}"
        if pattern and not re.match(pattern, last):
            return seconds, f"the last words of process {number}: {last}"
    return seconds, "" if seconds <= 60 else f"took {seconds:.0f} s"


def table(trials: list[Trial]) -> str:
    """Seconds by fault and number of processes."""
    lines = [
        "| fault in one process | processes | trials | held | continued bitwise | median | worst | exit code | others |"
    ]
    lines.append("|---" * 9 + "|")
    for name, fault in FAULTS.items():
        for processes in sorted({each.processes for each in trials if each.fault == name}):
            mine = [each for each in trials if (each.fault, each.processes) == (name, processes)]
            seconds = [each.seconds for each in mine]
            held = sum(not each.problem for each in mine)
            continued = sum(each.is_continued and not each.problem for each in mine)
            own = "killed" if fault.code is None else fault.code
            figures = f"{statistics.median(seconds):.1f} s | {max(seconds):.1f} s"
            lines.append(
                f"| {fault.words} | {processes} | {len(mine)} | {held} | {continued} "
                f"| {figures} | {own} | {fault.others} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Faults of one process among several.")
    parser.add_argument("work", type=pathlib.Path, help="folder for runs and trials.jsonl")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial; its rank is that of the fault")
    parser.add_argument("--continued", type=int, default=2, help="how many of the trials are started again")
    parser.add_argument("--faults", default=",".join(FAULTS), help="comma-separated, of: " + ", ".join(FAULTS))
    parser.add_argument("--at-once", type=int, default=1, help="how many trials; most of the time most of them wait")
    parser.add_argument("--table", action="store_true", help="print the table of all trials, and try nothing")
    args = parser.parse_args()
    work = args.work.resolve()
    record = work / "trials.jsonl"
    if not args.table:
        work.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(work / "compiled"))
        config = make_config(work)
        expected = calm_result(config, work / f"calm-{args.processes}", args.processes)

        def tried(number: int, name: str) -> None:
            place = work / f"trial-{args.processes}-{name}-{number}"
            shutil.rmtree(place, ignore_errors=True)
            done = trial(
                name,
                config,
                place,
                expected,
                num_processes=args.processes,
                rank=number % args.processes,
                is_continued=number < args.continued,
            )
            with record.open("a") as file:
                file.write(json.dumps(done) + "\n")
            print(done, flush=True)

        numbers = range(args.first, args.first + args.trials)
        with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
            pending = [pool.submit(tried, number, name) for number in numbers for name in args.faults.split(",")]
            for each in pending:
                each.result()
    trials = [Trial(*json.loads(line)) for line in record.read_text().splitlines()]
    print(table(trials))


if __name__ == "__main__":
    main()
