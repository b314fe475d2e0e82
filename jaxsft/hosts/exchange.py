"""Texts that every process gives and every process gets, without a collective: in any thread, and beside a step."""

import collections
from collections.abc import Callable

import jax

from jaxsft.hosts.table import PREFIX, Table, client

WAIT_SECONDS = 2 * 3600.0
"""How long the slowest process may take, such as to send its part of an export. One that is dead is noticed before."""

_ROUNDS: collections.Counter[str] = collections.Counter()


def gather_texts(name: str, text: str, *, seconds: float = WAIT_SECONDS) -> list[str]:
    """The texts of all processes, in the order of their numbers.

    Every process must call this as often as the others, for each name from one thread at a time.

    Args:
        name: of what is told.
        text: of this process.
        seconds: waited for each of the others.

    Raises:
        RuntimeError: a process has told nothing; says which. (Of JAX's own: the one that keeps the table is gone.)
    """
    if jax.process_count() == 1:
        return [text]
    _ROUNDS[name] += 1
    number, this = _ROUNDS[name], jax.process_index()
    table = Table("texts")
    table.put(f"{name}/{number}/{this}", text)
    texts = []
    for process in range(jax.process_count()):
        found = text if process == this else table.get(f"{name}/{number}/{process}", seconds=seconds)
        if found is None:
            raise RuntimeError(f"{name}: process {process} has told nothing for {seconds:.0f} s")
        texts.append(found)
    if number > 1:  # All have begun this round, so that nobody reads the one before any more.
        client().key_value_delete(f"{PREFIX}texts/{name}/{number - 1}/{this}")
    return texts


def first_text(name: str, text: str) -> str:
    """The text of process 0, on every process; as `gather_texts`."""
    return gather_texts(name, text)[0]


def done_by_first(name: str, act: Callable[[], object]) -> None:
    """Process 0 does something, and the others wait for it.

    Raises:
        OSError: what went wrong, on every process; on process 0 as it was raised, such as a ConfigError.
    """
    problem, text = None, ""
    if jax.process_index() == 0:
        try:
            act()
        except Exception as error:  # whatever it is, the others must not wait for ever
            problem, text = error, getattr(error, "strerror", None) or str(error) or type(error).__name__
    told = first_text(name, text)
    if problem is not None:
        raise problem
    if told:
        raise OSError(f"process 0: {told}")
