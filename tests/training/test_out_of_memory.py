"""What is said where memory runs out: the largest term, its keys, and how many rows at once would have fitted."""

import jax
import pytest

from jaxsft import train as train_module
from jaxsft.cli import main
from jaxsft.training import out_of_memory
from jaxsft.training.memory import Bytes, Term
from jaxsft.training.out_of_memory import OutOfMemory, explained

GIB = 2**30
FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nDetails follow")


def count(rows):
    """1 GiB, and half of one for each row."""
    terms = Term("parameters", GIB, "more devices"), Term("activations", rows * GIB // 2, "model.remat full (now none)")
    return Bytes(terms, GIB + rows * GIB // 2)


def said(limit, monkeypatch, *, rows=16, shares=2, batch_size=48):
    monkeypatch.setattr(out_of_memory, "memory_limit", lambda: limit)
    error = explained(FULL, count, batch_size=batch_size, rows=rows, shares=shares)
    assert isinstance(error, OutOfMemory) and error.exit_code == 1
    assert "\n" not in str(error) and str(error).endswith(
        "RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes. Details follow"
    )
    return str(error)


def test_the_largest_term_and_what_lowers_it(monkeypatch):
    text = said(6 * GIB, monkeypatch)
    assert "a device needs about 9.00 GiB at once, of 6.00 GiB that are there" in text
    assert "most are activations (8.00 GiB), fewer with model.remat full (now none)" in text


def test_the_most_rows_that_divide_the_batch_and_fit(monkeypatch):
    # 12 rows need 7 GiB, 8 rows 5; 10 do not divide 48, and 9 are no even shares.
    assert "train.microbatch_size 8 (now 16) would fit" in said(6 * GIB, monkeypatch)
    assert "train.microbatch_size 12 (now 16) would fit" in said(7 * GIB, monkeypatch)
    assert "no fewer rows at once would fit" in said(1 * GIB, monkeypatch)
    assert "something else holds memory" in said(100 * GIB, monkeypatch, rows=2)
    assert "train.microbatch_size 12 (now 16) takes less" in said(None, monkeypatch)


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("INTERNAL: no"), ValueError("RESOURCE_EXHAUSTED")])
def test_other_errors_stay_as_they_are(error):
    assert explained(error, count, batch_size=8, rows=8, shares=1) is error


@pytest.mark.parametrize("where", ["make_train_step", "load_weights"])
def test_a_run_ends_with_it(where, tiny_config, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise FULL

    monkeypatch.setattr(train_module, where, fails if where == "load_weights" else lambda *_, **__: fails)
    assert main(["train", str(tiny_config), f"run_dir={tmp_path}/run"]) == 1
    text = capsys.readouterr().err
    assert text.count("error:") == 1 and "Traceback" not in text
    assert "out of memory: a device needs about" in text and "mesh.fsdp" in text
