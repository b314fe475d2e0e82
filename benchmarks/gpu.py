"""What only a GPU can tell, part by part: whether cuDNN's attention is right, how fast steps are, whether they repeat.

Run as `python benchmarks/gpu.py [PART ...] [--small]` on one H100 or H200 with JAX 0.11.2; all parts if none is named.
Needs no network and no files. Each case is a line of JSON with what was measured, why it was left out (`skipped`) or
what went wrong (`error`); a case that ends its process ends none of the others, and a part takes less than 8 minutes:
what does not fit is left out. On a CPU the half that is XLA's runs, with small shapes (`--small`, which is then given).

  numbers    cuDNN on packed rows against the formula in float32, beside our own attention in bfloat16
  speed      attention of one layer: ours, cuDNN, and cuDNN where a row is one example, which it need not be told
  step-135M, step-1.5B   steps of models of these sizes: time, memory, start-up
  loss       its loop over chunks, with a number of turns that follows from the rows and with a fixed one
  repeat     10 steps twice, and 5, a checkpoint and 5 more: the same to the bit?
  embed      the gradient of a table of embeddings where one token is frequent
"""

import argparse
import functools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# Importing JAX touches no device: only the children do.
import jax
from gpu_attention import numbers, speed
from gpu_cases import STARTED, Case
from gpu_pieces import embed, loss
from gpu_steps import repeat, steps

from jaxsft.config import ConfigError, MeshConfig
from jaxsft.mesh import make_mesh

SECONDS_OF_A_PART = 450
AGAIN = 3
"""Exit code of a process whose GPU may be in disorder: the next case gets a new one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--small", action="store_true", help="small shapes, to see whether it runs")
    parser.add_argument("--child", nargs=2, type=int, metavar=("FIRST", "STOP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: unknown; parts are {', '.join(PARTS)}")
    if args.child:
        run_cases(args.parts[0], slice(*args.child), is_small=args.small)
        return
    platform = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.devices()[0].platform)"], capture_output=True, text=True
    ).stdout.strip()
    for part in args.parts or PARTS:
        with tempfile.TemporaryDirectory() as scratch:
            for line in run_part(part, is_small=args.small or platform != "gpu", scratch=scratch):
                print(line, flush=True)


# A part, case by case, in processes that may die.


def run_part(part: str, *, is_small: bool, scratch: str) -> Iterator[str]:
    """The lines of a part."""
    ends, at, cases = time.monotonic() + SECONDS_OF_A_PART, 0, PARTS[part](is_small)
    while at < len(cases):
        stop = at + 1
        while stop < len(cases) and not cases[at].is_alone and cases[stop][2:] == cases[at][2:]:
            stop += 1
        if (left := ends - time.monotonic()) < 10:
            for case in cases[at:]:
                yield as_line(part, case, {"skipped": f"the part has had its {SECONDS_OF_A_PART} seconds"})
            return
        code, tail = None, ""
        for line in (lines := child_lines(part, at, stop, cases[at], is_small=is_small, scratch=scratch, seconds=left)):
            if isinstance(line, str):
                yield line
                at += 1
            else:
                code, tail = line
        lines.close()
        if at < stop and code != AGAIN:
            yield as_line(part, cases[at], {"error": f"its process ended with {code}: {tail}"})
            at += 1


def child_lines(
    part: str, first: int, stop: int, case: Case, *, is_small: bool, scratch: str, seconds: float
) -> Iterator[str | tuple[int, str]]:
    """The lines of some cases, in a process of their own; then its exit code and the end of what it complained of."""
    command = [sys.executable, __file__, part, "--child", str(first), str(stop), *["--small"] * is_small]
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "JAX_COMPILATION_CACHE_DIR": f"{scratch}/compiled"}
    environment |= os.environ | case.environment | {STARTED: str(time.time())}
    with tempfile.TemporaryFile("w+") as complaints:
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=complaints, text=True)
        timer = threading.Timer(seconds, child.kill)
        timer.start()
        assert child.stdout is not None
        yield from (line.rstrip("\n") for line in child.stdout if line.startswith("{"))
        code = child.wait()
        timer.cancel()
        complaints.seek(0)
        yield code, " ".join(complaints.read()[-600:].split())


def run_cases(part: str, chosen: slice, *, is_small: bool) -> None:
    """Runs some cases of a part and prints a line for each."""
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for case in PARTS[part](is_small)[chosen]:
        is_sound = True
        try:
            with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
                found = case.run(**case.settings)
        except ConfigError as error:
            found = {"skipped": str(error)}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = {"error": f"{type(error).__name__}: {str(error)[:400]} ({where.filename}:{where.lineno})"}
            is_sound = not isinstance(error, jax.errors.JaxRuntimeError)
        print(as_line(part, case, found | about), flush=True)
        if not is_sound:
            os._exit(AGAIN)


def as_line(part: str, case: Case, found: dict[str, Any]) -> str:
    return json.dumps(plain({"part": part} | case.settings | case.environment | found))


def plain(value: Any) -> Any:
    """As JSON can hold it: what is no number as text."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


PARTS: dict[str, Callable[[bool], list[Case]]] = {
    "numbers": numbers,
    "speed": speed,
    "step-135M": functools.partial(steps, "135M"),
    "step-1.5B": functools.partial(steps, "1.5B"),
    "loss": loss,
    "repeat": repeat,
    "embed": embed,
}

if __name__ == "__main__":
    main()
