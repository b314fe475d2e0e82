"""A case of `gpu.py`, the rows that cases are about, and how long a call takes."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from attention_pairs import pack

from jaxsft.batch import count_segments
from jaxsft.model.cudnn import room_for_segments

DETERMINISTIC = {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}
STARTED = "GPU_BENCHMARK_STARTED"
"""Variable of the environment: when the process of a case was started."""
TURNS = 5
"""Of which the median is taken."""


class Case(NamedTuple):
    """Something to be measured."""

    settings: dict[str, Any]
    """What its line begins with, and `run` is given."""
    run: Callable[..., dict[str, Any]]
    environment: dict[str, str] = {}
    is_alone: bool = False
    """In a process of its own, as the most memory that was ever used is measured."""


def seconds_since_start() -> float | None:
    """Of this process; None where nobody has said when it was started."""
    started = os.environ.get(STARTED)
    return time.time() - float(started) if started else None


def milliseconds(function: Callable[..., Any], *arrays: Any) -> float:
    """Of a call, in a row of some; compiled before."""
    jax.block_until_ready(function(*arrays))
    at = time.perf_counter()
    jax.block_until_ready(function(*arrays))
    calls, found = max(1, min(20, int(0.3 / (time.perf_counter() - at)))), []
    for _ in range(TURNS):
        at = time.perf_counter()
        out = [function(*arrays) for _ in range(calls)]
        jax.block_until_ready(out)
        found.append((time.perf_counter() - at) / calls * 1e3)
    return statistics.median(found)


def rows_of(kind: str, num_rows: int, length: int) -> tuple[Any, Any]:
    """Segment ids and positions, int32 [rows, length]: of examples of some lengths, the last part padding."""
    if kind == "packed":
        mean = min(600, length // 8)
        drawn = np.random.default_rng(0).lognormal(np.log(mean) - 0.32, 0.8, 40 * num_rows * length // mean)
        return pack(drawn.astype(int) + 1, length, most=num_rows)
    lengths = {
        "one example": [length],
        "padded": [length // 3, length // 5, length // 7],
        "of one token": [1] * (length // 4) + [length // 2],
        "eight and no padding": [length // 2 - 7, *[1] * 5, 2, length // 2],
    }[kind]
    padding = length - sum(lengths)
    ids = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])
    positions = np.concatenate([np.arange(each) for each in [*lengths, padding]])
    return tuple(np.tile(each.astype(np.int32), (num_rows, 1)) for each in (ids, positions))


def room_for(segment_ids: Any) -> int:
    return room_for_segments(int(count_segments(segment_ids).max()))
