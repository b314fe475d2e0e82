"""What a client says of an export: checks by name, each with whether it holds and a note; and what it is compared with.

Every client runs in an environment of its own, with `EXPORT REFERENCE OUT` as arguments, and imports this file, which
needs NumPy alone. The reference is what transformers 5 makes of the same folder (`with_transformers.py`).
"""

import contextlib
import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

QUESTIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "slide: please spell it."}],
    [
        {
            "role": "user",
            "content": "Once upon a time, there was a girl named Lily. Größe, 東京, 🦊 and  two spaces.",
        }
    ],
    [
        {"role": "user", "content": "blob: please reverse it."},
        {"role": "assistant", "content": "bolb"},
        {"role": "user", "content": "Say it in capitals.\n\nThen\tstop."},
    ],
]
"""Asked of every model, by its own chat template."""
MAX_NEW_TOKENS = 24
TOLERANCE = 2e-4
"""Largest difference of two logits, as a share of the largest logit: float32 in other orders of summation."""


class Reference(NamedTuple):
    """What transformers makes of an export."""

    said: dict[str, Any]
    logits: np.ndarray
    """[questions, V], after the last token of each question."""


def load_reference(path: pathlib.Path) -> Reference:
    return Reference(json.loads(path.read_text()), np.load(path.with_suffix(".npy")))


class Checks:
    """Gathers checks; `attempt` turns an error into one that does not hold."""

    def __init__(self, *packages: str) -> None:
        self.versions = {package: importlib.metadata.version(package) for package in packages}
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, name: str, holds: bool, note: str = "") -> None:
        self.found[name] = {"holds": bool(holds), "note": "" if holds else note}

    def same(self, name: str, given: Any, expected: Any) -> None:
        self.add(name, given == expected, f"{_short(given)}, expected {_short(expected)}")

    def near(self, name: str, given: np.ndarray, expected: np.ndarray) -> None:
        """Logits, over the rows that both have."""
        if given.shape != expected.shape:
            self.add(name, False, f"shape {given.shape}, expected {expected.shape}")
            return
        difference = np.abs(given - expected).max() / np.abs(expected).max()
        self.add(name, difference <= TOLERANCE, f"differ by {difference:.1e} of the largest")

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever another program raises is what we want to know
            first = error
            while first.__context__ is not None:
                first = first.__context__
            told = [f"{type(each).__name__}: {' '.join(str(each).split())[:200]}" for each in (error, first)]
            self.add(name, False, "; after ".join(dict.fromkeys(told)))
        else:
            self.found.setdefault(name, {"holds": True, "note": ""})

    def write(self, path: pathlib.Path) -> None:
        path.write_text(json.dumps({"versions": self.versions, "checks": self.found}, ensure_ascii=False, indent=1))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."


def differing(given: Sequence[Any], expected: Sequence[Any]) -> str:
    """Which of several values differ, and the first of them; empty where none does."""
    different = [n for n, (ours, theirs) in enumerate(zip(given, expected, strict=True)) if ours != theirs]
    if not different:
        return ""
    first = different[0]
    return f"{len(different)} of {len(expected)} differ, such as {_short(given[first])} for {_short(expected[first])}"


def arguments() -> tuple[pathlib.Path, Reference, pathlib.Path]:
    export, reference, out = map(pathlib.Path, sys.argv[1:4])
    return export, load_reference(reference), out
