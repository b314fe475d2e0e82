"""A process with one device, as eight simulated ones of a tiny model mostly wait for each other; it imports once."""

import concurrent.futures
import contextlib
import io
import multiprocessing
from collections.abc import Iterator

import jax
import pytest

from jaxsft.cli import main


@contextlib.contextmanager
def process_of_one_device(*, xla_flags: str | None) -> Iterator[concurrent.futures.Executor]:
    """A pool of one process that compiles with these flags, or as for users."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("XLA_FLAGS") if xla_flags is None else patch.setenv("XLA_FLAGS", xla_flags)
            assert pool.submit(jax.device_count).result() == 1
        yield pool


def said_by(words: list[str]) -> tuple[int, str]:
    """The exit code of a command, and what it said; to be submitted to the pool."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return main(words), said.getvalue()
