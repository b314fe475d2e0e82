"""What is said where a device runs out of memory: what takes so much, and which keys would lower it.

In: the table of `memory.py`, for any number of rows at once. Out: one error in place of JAX's own.
"""

from collections.abc import Callable

import jax

from jaxsft.training.chips import chip_of
from jaxsft.training.memory import Bytes

CODE = "RESOURCE_EXHAUSTED"
LONGEST = 200
"""Letters of JAX's own words that are quoted."""


class OutOfMemory(RuntimeError):
    """A device has too little memory for what the config asks for."""

    exit_code = 1


def memory_limit() -> int | None:
    """Bytes that a device of this process has for arrays; None where it is not known, as of CPUs."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    chip = chip_of(device)
    return limit or (None if chip is None else int(chip.memory_bytes))


def explained(error: Exception, count: Callable[[int], Bytes], *, batch_size: int, rows: int, shares: int) -> Exception:
    """An error that says what helps, where a device has run out of memory; else the error itself.

    Args:
        error: any.
        count: the table for so many rows at once.
        batch_size: rows of a step, over all devices.
        rows: those at once.
        shares: devices among which rows are shared out.
    """
    if not isinstance(error, jax.errors.JaxRuntimeError) or not str(error).startswith(CODE):
        return error
    said = " ".join(str(error).split())[:LONGEST]
    return OutOfMemory(advice(count, batch_size=batch_size, rows=rows, shares=shares, said=said))


def advice(count: Callable[[int], Bytes], *, batch_size: int, rows: int, shares: int, said: str) -> str:
    """The sentences; arguments as of `explained`, and what JAX has said."""
    found, limit = count(rows), memory_limit()
    there = "" if limit is None else f", of {_gib(limit)} that are there"
    largest = found.largest
    parts = [
        f"out of memory: a device needs about {_gib(found.peak)} at once{there}; most are {largest.name} "
        f"({_gib(largest.num_bytes)}), fewer with {largest.lowered_by}"
    ]
    fewer = [each for each in range(shares, rows, shares) if batch_size % each == 0][::-1]
    if limit is None:
        parts += [f"train.microbatch_size {each} (now {rows}) takes less" for each in fewer[:1]]
    elif fits := next((each for each in fewer if count(each).peak <= limit), None):
        parts.append(f"as counted, train.microbatch_size {fits} (now {rows}) would fit")
    elif found.peak <= limit:
        parts.append("as counted it fits: something else holds memory of this device, or XLA cuts it up")
    else:
        parts.append("as counted, no fewer rows at once would fit")
    return "; ".join([*parts, f"JAX says: {said}"])


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
