"""What one process ends with that has no other's end to explain its error."""

import collections
import subprocess
import sys

import jax
import pytest

from jaxsft.config import ConfigError
from jaxsft.hosts import failure
from jaxsft.training.checkpoint import SaveError


class Alone:
    """Stands for the threads that watch the others, none of which ends."""

    patience = 0.0

    def __init__(self):
        self.told = []

    def fail(self, text, code, own=""):
        self.told.append((text, code))


def of_jax(text):
    return jax.errors.JaxRuntimeError(text)


def caused_by(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (of_jax("UNKNOWN: Gloo AllReduce failed: Connection closed by peer [127.0.0.1]:3000"), 75),
        (of_jax("INTERNAL: NCCL operation failed: remote process exited"), 75),
        (caused_by(SaveError("checkpoints/4: it stopped"), of_jax("UNAVAILABLE: failed to connect")), 75),
        (of_jax("INTERNAL: Failed to compile: no such instruction"), 1),
        (of_jax("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), 1),
        (ConfigError("mesh.tensor: 3 given"), 1),
    ],
)
def test_a_lost_connection_can_be_started_again_and_an_error_of_ones_own_cannot(error, code, monkeypatch):
    watch = Alone()
    monkeypatch.setattr(failure, "_watch", watch)
    monkeypatch.setattr(failure, "WAIT_SECONDS", 0.0)
    failure.fail(error)
    ((text, ended),) = watch.told
    assert ended == code and str(error) in text


NOISE = """
import os, threading
from jaxsft.hosts import failure

def noise():
    while True:
        os.write(2, b"from C++\\n")

for _ in range(4):
    threading.Thread(target=noise, daemon=True).start()
failure._last_words("process 1 is gone", 75)
"""


def test_nothing_that_other_threads_say_comes_after_the_last_words(tmp_path):
    for _ in range(5):
        with open(tmp_path / "said", "w") as said:
            assert subprocess.run([sys.executable, "-c", NOISE], stderr=said).returncode == 75
        with open(tmp_path / "said") as said:
            assert collections.deque(said, 1).pop() == "process 1 is gone\n"
