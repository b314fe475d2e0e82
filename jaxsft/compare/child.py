"""Starts a program of a comparison as a process of its own, with its packages checked first.

Each of the two runs has a process, so that neither shares memory, threads or imports with the other.

In: the name of a module, and a folder. Out: files that the program wrote there, or an error with its last words.
"""

import concurrent.futures
import importlib.metadata
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxsft.compare.exchange import NO_ROOM
from jaxsft.config import ConfigError
from jaxsft.disk.writing import write_error, writing
from jaxsft.hosts.children import child_command, end_with_parent

LINES_SHOWN = 25
OUTPUT_OF = "jaxsft: output of "
SECONDS_BETWEEN_NEWS = 30.0

NEEDED = {"torch": "2.4", "accelerate": "1.1"}
"""Package -> oldest version, of every baseline."""
NEEDED_FOR_ADAPTERS = {"peft": "0.21"}
"""The same, where the config has adapters."""


def check_packages(needed: Mapping[str, str]) -> None:
    """Raises a ConfigError that names every package that is missing or too old, and what installs it."""
    problems = []
    for name, oldest in needed.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed")
            continue
        if _numbers(version) < _numbers(oldest):
            problems.append(f"{name} is {version}, needed is {oldest} or newer")
    if problems:
        raise ConfigError(
            f"the baseline cannot run with {sys.executable}: {'; '.join(problems)}; "
            "install it with: pip install 'jaxsft[compare]'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` to (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def call_apart(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function in a process of its own, which ends with it and so gives its memory and accelerator back."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, end_with_parent, (os.getpid(),)) as pool:
        return pool.submit(function, *args).result()


def run_child(module: str, folder: pathlib.Path, *, say: Callable[[str], None], log: str = "log.txt") -> None:
    """Runs `python -m MODULE FOLDER` to its end; its last line of output is told from time to time.

    Args:
        module: of ours.
        folder: what it reads and writes.
        say: is told how far it is.
        log: file in the folder for its output.

    Raises:
        ConfigError: it failed; with the last lines of its output.
        WriteError: it failed for want of room.
    """
    path = folder / log
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    with writing(path), path.open("wb") as out:
        out.write(f"{OUTPUT_OF}{module}\n".encode())  # by which the file is known again
        out.flush()
        process = subprocess.Popen(child_command(module, str(folder)), stdout=out, stderr=out, env=environment)
    told = time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(0.2)
            if time.monotonic() - told > SECONDS_BETWEEN_NEWS and (lines := _last_lines(path, 1)):
                say(f"  {lines[-1]}")
                told = time.monotonic()
    finally:
        if process.poll() is None:  # interrupted
            process.kill()
            process.wait()
    if process.returncode != 0:
        how = f"exit code {process.returncode}"
        if process.returncode < 0:
            how = f"signal {-process.returncode}" + ", probably for want of memory" * (process.returncode == -9)
        lines = _last_lines(path, LINES_SHOWN)
        if found := next((line for line in reversed(lines) if NO_ROOM.search(line)), None):
            raise write_error(folder, f"{module}: {found.strip()}")
        shown = "\n".join(f"  {line}" for line in lines)
        raise ConfigError(f"{module} ended with {how}; the end of its output:\n{shown}")


def _last_lines(path: pathlib.Path, count: int) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 16384, 0))
        text = file.read().decode(errors="replace")
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip() and not line.startswith(OUTPUT_OF)]
    return lines[-count:]
