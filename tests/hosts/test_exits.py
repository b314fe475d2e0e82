"""Exit codes, and what is said of errors."""

import pytest

from jaxsft.config import ConfigError
from jaxsft.disk.writing import WriteError
from jaxsft.hosts.exits import exit_code, sentence
from jaxsft.rows.sources import DataError
from jaxsft.training.checkpoint import SaveError


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("seq_len: 0 given,\n  expected more"), 1, "seq_len: 0 given, expected more"),
        (DataError("rows.jsonl:3: no message"), 65, "rows.jsonl:3: no message"),
        (SaveError("checkpoints/8: No space left"), 74, "checkpoints/8: No space left"),
        (WriteError("config.yaml: No space left"), 74, "config.yaml: No space left"),
        (OSError(5, "Input/output error", "a.txt"), 74, "[Errno 5] Input/output error: 'a.txt'"),
        (KeyError("loss"), 1, "KeyError: 'loss'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_has_the_exit_code_of_its_kind_and_is_one_line(error, code, said):
    assert (exit_code(error), sentence(error)) == (code, said)
