"""What a campaign of faults is made of: runs that are killed, files that are damaged, disks that fill up, by a seed.

Every trial ends in one of two ways: what is there is what the calm run left, to the byte and with every line of its
metrics; or there is one clear error, an exit code that says so, and no traceback.
"""

import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import traceback
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from compilation import xla_flags
from etils import epath

from jaxsft.cli import main
from jaxsft.training.writers import SPEED

REPO = pathlib.Path(__file__).resolve().parents[2]
STOPPED = 75
CLEAR = (1, 65, 74)
"""Exit codes of an error that says what to do."""

STEPS = 12


class Outcome(NamedTuple):
    """How a trial ended."""

    kind: str
    """Of the fault."""
    held: bool
    ended: str
    """"right", "one error", or what went wrong."""


def overrides_of(place: pathlib.Path, *more: str) -> list[str]:
    """A run in `place/run` that prepares its data in `place/cache`."""
    return [f"run_dir={place}/run", f"data.cache={place}/cache", "log.every=12", "checkpoint.every=4", *more]


def result_of(run: pathlib.Path) -> dict[str, object]:
    """All that a run leaves that must be the same again: state, export and metrics, without what clocks say."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in SPEED} for line in lines]
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdecimal() else -1)
    # How Orbax lays them out in files is not the same each time.
    reader, folder = ocp.PyTreeCheckpointer(), epath.Path(newest) / "state"
    # As numpy arrays: it may be of devices that this process does not have.
    names = json.loads((newest / "meta.json").read_text())["arrays"]
    state = reader.restore(folder, restore_args=dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray)))
    arrays = {name: zlib.crc32(np.asarray(state[name]).tobytes()) for name in names}
    export = {path.name: zlib.crc32(path.read_bytes()) for path in (run / "export").iterdir()}
    return {"step": newest.name, "arrays": arrays, "metrics": metrics, "export": export}


def has_open_window(run: pathlib.Path) -> bool:
    """Whether the newest checkpoint holds steps that no line of metrics reports yet."""
    newest = json.loads((run / "progress.json").read_text())["sealed"]
    return bool(json.loads((run / "checkpoints" / str(newest) / "meta.json").read_text())["progress"]["window"])


def difference(result: dict[str, object], expected: dict[str, object]) -> str:
    """The first thing in which two results differ; empty where they are the same."""
    return next((name for name in expected if result[name] != expected[name]), "")


# In this process.


def run_here(config: pathlib.Path, overrides: list[str]) -> tuple[int, str, str]:
    """Trains as the command does; exit code, and what it said on both streams."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["train", str(config), *overrides])
    except BaseException:
        return -1, out.getvalue(), err.getvalue() + traceback.format_exc()
    return code, out.getvalue(), err.getvalue()


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flip": lambda content, chance: _flipped(content, chance),
    "truncate": lambda content, chance: content[: chance.randrange(len(content))] if content else b"",
    "delete": lambda content, chance: None,
    "append": lambda content, chance: content + chance.randbytes(chance.randint(1, 200)),
    "replace": lambda content, chance: b"[]",
}


def _flipped(content: bytes, chance: random.Random) -> bytes:
    if not content:
        return b"\0"
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]


def damage_one(place: pathlib.Path, chance: random.Random) -> tuple[str, str]:
    """Damages one file below a folder; returns how, and which."""
    # Folders before files: there are many files of arrays, and one of each of the others.
    path = place
    while path.is_dir():
        path = chance.choice(sorted(child for child in path.iterdir() if child.is_file() or any(child.iterdir())))
    kind = chance.choice(list(DAMAGES))
    content = DAMAGES[kind](path.read_bytes(), chance)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    return kind, str(path.relative_to(place))


def damage_trial(
    config: pathlib.Path, base: pathlib.Path, expected: dict[str, object], place: pathlib.Path, chance: random.Random
) -> Outcome:
    """A copy of a run and its cache, with one damaged file, is started again."""
    shutil.copytree(base, place)
    try:
        kind, name = damage_one(place, chance)
        code, out, err = run_here(config, overrides_of(place))
        label = f"{kind} of {name}"
        if code == 0:
            found = difference(result_of(place / "run"), expected)
            said = any(f"metrics.jsonl is {what}" in out for what in ("damaged", "gone"))
            if not found or (found == "metrics" and name == "run/metrics.jsonl" and said):
                return Outcome(kind, True, "right" if not found else "right but for lost lines, which is said")
            return Outcome(kind, False, f"{label}: ended with other {found}")
        if code in CLEAR and "Traceback" not in err and err.count("error: ") == 1:
            return Outcome(kind, True, "one error")
        return Outcome(kind, False, f"{label}: exit code {code}: {err[-2000:]}")
    finally:
        shutil.rmtree(place, ignore_errors=True)


# In processes of their own. What is let be after that goes on in this one: what it starts from is in its folder alone.


def start(
    config: pathlib.Path, overrides: list[str], *, most_bytes: int | None = None, script: str | None = None
) -> subprocess.Popen:
    """The command as a user starts it, or a script in its place.

    With `most_bytes`, no file may grow larger, as on a disk that is full.
    """
    if most_bytes is not None:
        limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({most_bytes}, {most_bytes}))"
        ignore = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
        script = f"import resource, signal, sys; {ignore}; {limit}; from jaxsft.cli import main; sys.exit(main())"
    command = [sys.executable, *(["run.py"] if script is None else ["-c", script]), "train", str(config), *overrides]
    environment = os.environ | {"XLA_FLAGS": xla_flags(8)}
    return subprocess.Popen(
        command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str]:
    _, err = process.communicate(timeout=timeout)
    return process.returncode, err


def kill_trial(
    config: pathlib.Path, expected: dict[str, object], place: pathlib.Path, chance: random.Random, seconds: float
) -> Outcome:
    """A run that is killed or stopped up to three times, at any moment of about `seconds`, and then let be."""
    names = []
    for _ in range(chance.randint(1, 3)):
        number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        process = start(config, overrides_of(place))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.random() * seconds)
        process.send_signal(number)
        code, err = finish(process)
        names.append(number.name)
        if number != signal.SIGKILL and code not in (0, STOPPED, 1, -number):
            return Outcome("kill", False, f"{'+'.join(names)}: exit code {code}: {err[-2000:]}")
    code, _, err = run_here(config, overrides_of(place))
    if code != 0:
        return Outcome("kill", False, f"after {'+'.join(names)}: exit code {code}: {err[-2000:]}")
    found = difference(result_of(place / "run"), expected)
    return Outcome("kill", not found, f"after {'+'.join(names)}: other {found}" if found else "right")


def disk_trial(
    config: pathlib.Path, expected: dict[str, object], place: pathlib.Path, chance: random.Random, largest: int
) -> Outcome:
    """A run in which no file may grow beyond a random size, and then, with room again, the same command."""
    most_bytes = int(largest ** chance.random())
    code, err = finish(start(config, overrides_of(place), most_bytes=most_bytes))
    if code not in (0, 74) or "Traceback" in err or err.count("error: ") != (code == 74):
        return Outcome("disk full", False, f"at {most_bytes:,} bytes: exit code {code}: {err[-2000:]}")
    if code == 74 and "bytes free" not in err:
        return Outcome("disk full", False, f"at {most_bytes:,} bytes: {err[-500:]}")
    again, _, err = run_here(config, overrides_of(place))
    if again != 0:
        return Outcome("disk full", False, f"then, with room: exit code {again}: {err[-2000:]}")
    found = difference(result_of(place / "run"), expected)
    return Outcome("disk full", not found, f"other {found}" if found else "right")


def together_trial(config: pathlib.Path, expected: dict[str, object], place: pathlib.Path) -> Outcome:
    """Two runs at once in one folder: one does it, the other is refused with its name."""
    both = [start(config, overrides_of(place)) for _ in range(2)]
    ended = sorted(finish(process) for process in both)
    codes = [code for code, _ in ended]
    if codes == [0, 0]:  # The second one came when the first was done.
        return Outcome("two at once", not difference(result_of(place / "run"), expected), "right")
    refused = ended[1][1]
    is_named = any(f"in use by process {each.pid} on " in refused for each in both)
    held = codes == [0, 1] and is_named and not difference(result_of(place / "run"), expected)
    return Outcome("two at once", held, "right" if held else f"exit codes {codes}: {refused[-2000:]}")


WAYS = ("right", "right but for lost lines, which is said", "one error")


def table(outcomes: list[Outcome], seconds: float, seed: int) -> str:
    """What was tried, and what held."""
    head = "| fault | trials | right | right but for lost lines of metrics, which is said | one clear error | failed |"
    lines = [f"seed {seed}, {seconds / 60:.0f} minutes", "", head, "|---" * 6 + "|"]
    for kind in [*dict.fromkeys(each.kind for each in outcomes), "all"]:
        mine = [each for each in outcomes if kind in (each.kind, "all")]
        counts = [len(mine), *(sum(each.held and each.ended == way for each in mine) for way in WAYS)]
        counts.append(sum(not each.held for each in mine))
        lines.append(f"| {kind} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    return "\n".join(lines)
