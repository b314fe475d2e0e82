"""Looks over all hosts before a run: devices, versions, memory, disks, clocks, the run folder, and the links between.

In: the processes, which have found each other (`start.py` names those that have not). Out: lines for the terminal of
process 0: problems first, then a row for each process.
"""

import contextlib
import math
import os
import pathlib
import socket
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsft.disk.writing import Path, WriteError, free_bytes
from jaxsft.hosts.agreement import differences, program, share
from jaxsft.hosts.disks import first_with
from jaxsft.hosts.table import client, num_processes
from jaxsft.hosts.words import processes

REDUCE_SECONDS = 5.0
"""Of all-reduces after the first, which is compiled."""
MOST_SKEW, LEAST_FREE = 1.0, 2**30
"""Seconds between two clocks, and bytes of a disk or of memory, beyond which there is a problem."""
GIB = 2**30


def examine(places: dict[str, Path]) -> tuple[list[str], list[str]]:
    """What is wrong, and what was found, in lines; the same on all processes.

    Args:
        places: folders by what they are, such as "run_dir", which need not exist yet; all processes should share them.
    """
    if num_processes() > 1:
        client().wait_at_barrier("jaxsft/doctor", 600_000)
    clock = time.time()
    devices = jax.local_devices()
    mine: dict[str, Any] = {
        "host": socket.gethostname(),
        "clock": clock,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "device memory": (devices[0].memory_stats() or {}).get("bytes_limit"),
        "memory": _memory(),
        "program": program(),
        "places": {name: _look_at(place) for name, place in places.items()},
    }
    mine["reduced"] = _all_reduce()
    found = share("looking over all hosts", mine, list)
    return _problems(found, places), _table(found, places)


def _memory() -> list[int] | None:
    """Bytes of this host: available, and all."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return [sizes["MemAvailable"], sizes["MemTotal"]]
    return None


def _look_at(place: Path) -> dict[str, Any]:
    """The lowest process that has the same folder, None where this one cannot write there; and what is free.

    Of a folder that is not there yet, it is its nearest parent that counts.
    """
    folder = place
    while "://" not in os.fspath(folder) and not folder.exists() and folder != folder.parent:
        folder = folder.parent
    first, problem = None, ""
    try:
        first = first_with(folder)
    except WriteError as error:
        problem = str(error)
    return {"first": first, "problem": problem, "free": free_bytes(folder)}


def _all_reduce() -> dict[str, Any] | None:
    """Sums numbers over all devices: the bytes of each, seconds of one sum, and whether it is right; None of one
    device."""
    devices = jax.devices()
    if len(devices) == 1:
        return None
    size = (2**20 if devices[0].platform == "cpu" else 2**24) // 4 * 4
    mesh = Mesh(np.array(devices), ("all",))
    cut, whole = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
    # Device i has the number i, over and over.
    make = jax.jit(lambda: jax.lax.broadcasted_iota(np.float32, (len(devices), size), 0), out_shardings=cut)
    numbers = make()
    add = jax.jit(lambda numbers: numbers.sum(0), out_shardings=whole)
    total = jax.block_until_ready(add(numbers))
    right = len(devices) * (len(devices) - 1) / 2
    is_right = all(bool((np.asarray(part.data) == right).all()) for part in total.addressable_shards)
    # As many on all processes, or some would wait for ever.
    begin = time.perf_counter()
    jax.block_until_ready(add(numbers))
    once = share("how long an all-reduce takes", time.perf_counter() - begin, max)
    count = min(max(int(REDUCE_SECONDS / max(once, 1e-6)), 1), 100)
    begin = time.perf_counter()
    for _ in range(count):
        total = add(numbers)
        jax.block_until_ready(total)
    return {"bytes": size * 4, "seconds": (time.perf_counter() - begin) / count, "is_right": is_right}


def _problems(found: Sequence[dict[str, Any]], places: dict[str, Path]) -> list[str]:
    problems = differences([each["program"] for each in found])
    problems += differences([{"devices": each["devices"]} for each in found])
    for number, each in enumerate(found):
        who = f"process {number} ({each['host']})"
        if abs(skew := each["clock"] - found[0]["clock"]) > MOST_SKEW:
            problems.append(f"{who}: its clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} process 0's")
        if each["memory"] is not None and each["memory"][0] < LEAST_FREE:
            problems.append(f"{who}: {_gib(each['memory'][0])} of memory are available")
        for name, seen in each["places"].items():
            if seen["problem"]:
                problems.append(f"{who}: {name}: {seen['problem']}")
            if seen["free"] is not None and seen["free"] < LEAST_FREE:
                problems.append(f"{who}: {name}: {_gib(seen['free'])} are free")
        if each["reduced"] is not None and not each["reduced"]["is_right"]:
            problems.append(f"{who}: a sum over all devices came out wrong on its devices")
    for name in places:
        apart = [n for n, each in enumerate(found) if each["places"][name]["first"] not in (0, None)]
        if apart:
            does = "does" if len(apart) == 1 else "do"
            problems.append(f"{name}: {processes(apart)} {does} not see {places[name]} as process 0 has it")
    return problems


def _table(found: Sequence[dict[str, Any]], places: dict[str, Path]) -> list[str]:
    rows = [["process", "host", "devices", "memory of each", "memory of the host", "clock", *places]]
    for number, each in enumerate(found):
        memory = each["memory"]
        row = [
            str(number),
            each["host"],
            each["devices"],
            _gib(each["device memory"]),
            "not known" if memory is None else f"{memory[0] / GIB:.1f} of {_gib(memory[1])}",
            f"{round(each['clock'] - found[0]['clock'], 2) + 0.0:+.2f} s",
        ]
        for name in places:
            seen = each["places"][name]
            shared = "as process 0" if seen["first"] == 0 else "not as process 0"
            row.append(f"{'cannot write' if seen['problem'] else shared}, {_gib(seen['free'])} free")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    first = found[0]
    lines.append("of process 0: " + ", ".join(f"{name} {text}" for name, text in first["program"].items()))
    if first["reduced"] is None:
        return [*lines, "one device: there is nothing to reduce over"]
    size, seconds = first["reduced"]["bytes"], max(each["reduced"]["seconds"] for each in found)
    count = sum(int(each["devices"].split()[0]) for each in found)
    moved = 2 * (count - 1) / count * size / seconds
    return [
        *lines,
        f"all-reduce of {size / 2**20:.0f} MiB on each of {count} devices: {seconds * 1e3:.3g} ms, "
        f"{_significant(moved / 1e9)} GB/s in and out of each",
    ]


def _significant(number: float) -> str:
    return f"{number:.{max(2 - math.floor(math.log10(number)), 0) if number > 0 else 0}f}"


def _gib(size: int | None) -> str:
    return "not known" if size is None else f"{size / GIB:.1f} GiB"
