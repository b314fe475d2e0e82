"""`metrics.jsonl`, the file of a run's metrics: one flat object of plain numbers per line, each with its `step`.

In: lines, in the order of their steps. Out: the file, written by process 0 only, and its lines again. A run that goes
on after a crash does some steps again: the file forgets the lines of those steps, and gets new ones. What the numbers
mean is `metrics.py`; where else they go, `writers.py` and `console.py`.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from jaxsft.disk.writing import append, is_file, set_aside, write_whole
from jaxsft.training.metrics import Totals, from_json_line, to_json_line


class MetricsFile:
    """`metrics.jsonl`: one object per line, every line with its `step`; written by process 0 only."""

    last_step: int
    """Step of the last line before this start, also if that line was dropped; -1 where there was none."""

    def __init__(
        self,
        path: epath.Path,
        *,
        step: int,
        sealed: dict[str, Any] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Opens the file of a run that is at `step`; lines after it, of steps that will be done again, are dropped.

        What is no line of metrics is left out and said, and the file with it kept under another name.

        Args:
            path: of the file.
            step: steps done.
            sealed: what `state` said when the checkpoint of this step was saved, so that a changed line is noticed.
            say: is told what was wrong with the file.
        """
        self._path = path
        self._lines: list[str] = []
        self.last_step = -1
        content = None
        if jax.process_index() == 0 and path.exists() and not is_file(path):
            say(f"{path} is no file: renamed to {set_aside(path, 'damaged').name}")
        if jax.process_index() == 0 and path.exists():
            content = path.read_bytes()
            lines, problems, torn = _parse_lines(content)
            self._lines = [text for at, text in lines if 0 < step >= at]
            self.last_step = max((at for at, _ in lines), default=-1)
            if torn:
                say(f"{path}: its last line was cut off, and is left out")
            if step and sealed and self.state() != sealed and not problems:
                problems = ["its lines are not those that were there when this step was saved"]
            if problems:
                aside = set_aside(path, "damaged")
                say(f"{path} is damaged, the rest is kept, and the file as it was in {aside.name}: {problems[0]}")
        elif jax.process_index() == 0 and step and sealed and sealed["bytes"]:
            say(f"{path} is gone: the lines up to step {step} are lost; the counts go on from the checkpoint")
        if jax.process_index() == 0 and (self._content() != content or not path.exists()):
            write_whole(path, self._content())

    def state(self) -> dict[str, int]:
        """Size and CRC-32 of the lines, by which a change is noticed."""
        return _state(self._content())

    def totals(self) -> Totals:
        """Counts at the last line of training."""
        for line in map(from_json_line, reversed(self._lines)):
            if "total_tokens" in line:
                return Totals(line["total_tokens"], line["total_trained_tokens"], line["skipped_steps"])
        return Totals()

    def lines(self) -> list[dict[str, Any]]:
        """All that the file holds."""
        return [from_json_line(line) for line in self._lines]

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line, on disk when this returns.

        Raises:
            WriteError: there is no room for it.
        """
        self._lines.append(to_json_line(line))
        if jax.process_index() != 0:
            return
        append(self._path, (self._lines[-1] + "\n").encode())

    def _content(self) -> bytes:
        return "".join(line + "\n" for line in self._lines).encode()


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line cut off by a crash, and what is no line of metrics, are left out."""
    return [from_json_line(text) for _, text in _parse_lines(path.read_bytes())[0]]


def metrics_problem(path: epath.Path, *, step: int, sealed: dict[str, Any] | None) -> str | None:
    """What is wrong with a `metrics.jsonl`, None if nothing is.

    Args:
        path: of the file, which need not be there where nothing was sealed.
        step: of a checkpoint.
        sealed: what `MetricsFile.state` was when it was saved; None where that is not known.
    """
    if not is_file(path):
        return "it is not there" if sealed and sealed["bytes"] else None
    lines, problems, torn = _parse_lines(path.read_bytes())
    if problems:
        return problems[0]
    if sealed and _state("".join(text + "\n" for at, text in lines if at <= step).encode()) != sealed:
        return f"its lines up to step {step} are not those that were there when that checkpoint was saved"
    return "its last line was cut off" if torn else None


def _state(content: bytes) -> dict[str, int]:
    return {"bytes": len(content), "crc32": zlib.crc32(content)}


def last_step(path: epath.Path) -> int:
    """Step of the last line of a `metrics.jsonl`; -1 where there is none."""
    return max((at for at, _ in _parse_lines(path.read_bytes())[0]), default=-1) if is_file(path) else -1


def _parse_lines(content: bytes) -> tuple[list[tuple[int, str]], list[str], bool]:
    """The lines of metrics with their steps; what is wrong with others; and whether the last one was cut off."""
    *complete, rest = content.split(b"\n")
    lines: list[tuple[int, str]] = []
    problems = []
    for number, line in enumerate(complete, start=1):
        try:
            text = line.decode("utf-8")
            found = from_json_line(text)
            if not isinstance(found, dict) or type(found.get("step")) is not int:
                raise ValueError("no object with a step")
            if other := [key for key, value in found.items() if not isinstance(value, int | float | None)]:
                raise ValueError(f"{other[0]} is no number")
            if lines and found["step"] < lines[-1][0]:
                raise ValueError(f"step {found['step']} after step {lines[-1][0]}")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            problems.append(f"line {number} is no line of metrics ({' '.join(str(error).split())[:80]})")
        else:
            lines.append((found["step"], text))
    return lines, problems, bool(rest)
