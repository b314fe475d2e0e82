"""A table of short texts that all processes of a run share, whatever state their devices are in.

It is kept by the coordination service of `jax.distributed`, in the process that started it (process 0), and needs no
collective: a process can write why it fails while all others wait for it in a step.
"""

from typing import Any

import jax
from jax._src import distributed  # Public jax has no way to this table.

PREFIX = "jaxsft/"
"""Of all keys, so that they meet none of jax's or Orbax's own."""


class Table:
    """The texts of one kind, by key.

    Args:
        kind: one word; begins every key.
    """

    def __init__(self, kind: str) -> None:
        self._prefix = f"{PREFIX}{kind}/"

    def put(self, key: str | int, text: str) -> None:
        """Writes a text, over what may be there."""
        client().key_value_set(f"{self._prefix}{key}", text, allow_overwrite=True)

    def put_first(self, key: str | int, text: str) -> str:
        """Writes a text where there is none; the one that is there then."""
        try:
            client().key_value_set(f"{self._prefix}{key}", text)
            return text
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
            return client().blocking_key_value_get(f"{self._prefix}{key}", 10_000)

    def get(self, key: str | int, *, seconds: float) -> str | None:
        """A text, waited for; None where it has not come in `seconds`.

        Raises:
            jax.errors.JaxRuntimeError: the process that keeps the table is gone.
        """
        try:
            return client().blocking_key_value_get(f"{self._prefix}{key}", max(int(seconds * 1000), 1))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    def all(self) -> dict[str, str]:
        """What is there now.

        Raises:
            jax.errors.JaxRuntimeError: the process that keeps the table is gone.
        """
        return {key.removeprefix(self._prefix): text for key, text in client().key_value_dir_get(self._prefix)}


def client() -> Any:
    """The connection to the coordination service; of several processes only."""
    return distributed.global_state.client


def process_number() -> int:
    """Of this process, from 0; unlike `jax.process_index`, before any device is touched."""
    return distributed.global_state.process_id


def num_processes() -> int:
    """Of this run; unlike `jax.process_count`, before any device is touched."""
    return distributed.global_state.num_processes
