"""A report as plain records: what was compared, what was found, and the runs that it shows.

`compare` and `report` fill them in; `page.py` shows them, and `as_json` is the same for machines.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxsft.disk.pages import MADE_BY
from jaxsft.rows.strict import DataError

JSON_VERSION = 1
"""Changes when a field changes its meaning or goes."""


class Run(NamedTuple):
    """The metrics of one training run, whoever made it."""

    name: str
    """Unique within a report."""
    kind: str
    """Who wrote it: "jaxsft", "transformers", "trl", "tensorboard" or "csv"."""
    source: str
    """The file or folder that it was read from, or the command that made it."""
    lines: tuple[dict[str, float], ...]
    """Each with `step` (steps done) and any of the keys of our `metrics.jsonl`: `loss`, `grad_norm`, `learning_rate`,
    `total_tokens`, `total_trained_tokens`, `eval_loss`, ... Ordered by step."""
    figures: dict[str, float]
    """Of the whole run, in units of our metrics: `tokens_per_second`, `trained_tokens_per_second`, `memory_gib`,
    `step_seconds`, `startup_seconds`, as far as known."""
    settings: dict[str, Any]
    """By name, as far as known; what differs between runs is shown."""
    caveats: tuple[str, ...]
    """What must be known to read its numbers, such as that its loss is a mean of means."""


class Check(NamedTuple):
    """One comparison of two runs, in the order in which faults show."""

    name: str
    """Such as "gradients of the first step"."""
    passed: bool | None
    """None: not made, `detail` says why."""
    measured: float | None
    """The largest difference, in the measure that `detail` names."""
    tolerance: float | None
    where: str
    """The step, layer or tensor with the largest difference."""
    detail: str


class TokenDifference(NamedTuple):
    """One place where two preparations of the same example differ."""

    example: str
    """Its origin, file:line."""
    kind: str
    """Its class, such as "stop token"; `explanations` of the report says what each means."""
    position: int
    """Index of the first token that differs."""
    ours: str
    """The tokens around it, as text; trained ones in [[...]]."""
    theirs: str


class Report(NamedTuple):
    """Everything that a page shows."""

    title: str
    command: str
    """What makes it again."""
    verdict: str
    """One or two sentences, the first thing that is read."""
    passed: bool | None
    """None where nothing is judged, as in an overlay of curves."""
    checks: tuple[Check, ...]
    runs: tuple[Run, ...]
    differences: tuple[TokenDifference, ...]
    """The first few of each kind."""
    difference_counts: dict[str, int]
    """By kind: examples that have one."""
    explanations: dict[str, str]
    """What a kind of difference means, and whose doing it is."""
    facts: dict[str, str]
    """Versions, machine and the like, by name."""


def as_json(report: Report) -> dict[str, Any]:
    """The report for machines; numbers that JSON cannot hold become null."""
    return MADE_BY | {"version": JSON_VERSION} | _plain(report)


def from_json(data: Any) -> Report:
    """The report of `as_json`; what could not be held as a number is NaN again.

    Raises:
        DataError: not a report, or one of another version.
    """
    if not isinstance(data, dict) or data.get("version") != JSON_VERSION or not set(Report._fields) <= data.keys():
        version = data.get("version") if isinstance(data, dict) else None
        raise DataError(f"no report of jaxsft: version {JSON_VERSION} expected, {version!r} found")
    fields = {name: data[name] for name in Report._fields}
    runs = [Run(**run) for run in data["runs"]]
    fields["runs"] = tuple(
        run._replace(
            lines=tuple(_numbers(line) for line in run.lines), figures=_numbers(run.figures), caveats=tuple(run.caveats)
        )
        for run in runs
    )
    fields["checks"] = tuple(Check(**check) for check in data["checks"])
    fields["differences"] = tuple(TokenDifference(**each) for each in data["differences"])
    return Report(**fields)


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in values.items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {key: _plain(each) for key, each in value._asdict().items()}
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)
