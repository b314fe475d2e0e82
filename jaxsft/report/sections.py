"""The tables of a report's page, as HTML; every text that is not ours is escaped.

In: parts of a `Report`. Out: cards, or nothing where there is nothing to show.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from jaxsft.preview.document import escape
from jaxsft.report.records import Check, Report, Run, TokenDifference
from jaxsft.report.svg import swatch

FIGURES = {
    "trained_tokens_per_second": ("trained tokens per second", "{:,.0f}"),
    "tokens_per_second": ("tokens per second", "{:,.0f}"),
    "step_seconds": ("seconds per step", "{:,.3g}"),
    "memory_gib": ("peak memory, GiB", "{:,.2f}"),
    "startup_seconds": ("seconds to the first step", "{:,.1f}"),
}
"""Figures of a run -> what they are called and how they are written."""

KINDS = {
    "jaxsft": "jaxsft",
    "transformers": "transformers",
    "trl": "TRL",
    "tensorboard": "TensorBoard",
    "csv": "CSV",
}


def checks_card(checks: Sequence[Check]) -> str:
    if not checks:
        return ""
    words = {True: ("pass", "✓ passed"), False: ("fail", "✗ differs"), None: ("plain", "not made")}
    rows = "".join(
        f"<tr><td><b>{escape(check.name)}</b><br><small>{escape(check.detail)}</small></td>"
        f'<td class="{words[check.passed][0]}">{words[check.passed][1]}</td>'
        f"<td>{number(check.measured, '{:.3g}')}</td><td>{number(check.tolerance, '{:.3g}')}</td>"
        f'<td class="where">{escape(check.where) or "–"}</td></tr>'
        for check in checks
    )
    return card(
        "Checks, in the order in which faults show",
        '<div class="scroll-x"><table class="checks"><thead><tr><th>what</th><th>result</th><th>measured</th>'
        f"<th>tolerance</th><th>largest at</th></tr></thead><tbody>{rows}</tbody></table></div>",
    )


def figures_card(runs: Sequence[Run]) -> str:
    """Loss, speed and memory by run, and how the first compares with each of the others."""
    found: list[tuple[str, str, list[float | None], bool]] = [
        ("steps", "{:,.0f}", [run.lines[-1]["step"] if run.lines else None for run in runs], False),
        ("last loss", "{:.4f}", [last_loss(run) for run in runs], False),
        ("best held-out loss", "{:.4f}", [best_eval_loss(run) for run in runs], False),
    ]
    found += [(name, pattern, [run.figures.get(key) for run in runs], True) for key, (name, pattern) in FIGURES.items()]
    rows = []
    for name, pattern, values, has_ratio in found:
        if all(value is None for value in values):
            continue
        cells = []
        for index, value in enumerate(values):
            cells.append(f"<td>{number(value, pattern)}</td>")
            if index:
                cells.append(f'<td class="ratio">{_ratio(values[0], value) if has_ratio else ""}</td>')
        rows.append(f"<tr><th>{name}</th>{''.join(cells)}</tr>")
    if not rows:
        return ""
    heads = "".join(
        f"<th>{swatch(index)} {escape(run.name)}<br><small>{KINDS.get(run.kind, escape(run.kind))}</small></th>"
        + '<th class="ratio">ratio</th>' * bool(index)
        for index, run in enumerate(runs)
    )
    ratios = f"A ratio is {escape(runs[0].name)} divided by the run to its left." if len(runs) > 1 else ""
    return card(
        "Loss, speed and memory",
        f'<div class="scroll-x"><table class="figures"><thead><tr><th></th>{heads}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="hint">{ratios}</p>',
    )


def _ratio(first: float | None, other: float | None) -> str:
    if not first or not other or not math.isfinite(first / other):
        return ""
    return f"{first / other:.2f}\u00a0×" if 0.1 <= first / other < 100 else f"{first / other:.2g}\u00a0×"


def differences_card(report: Report) -> str:
    """How the prepared tokens differ, class by class, with the first few places of each."""
    if not report.difference_counts and not report.differences:
        return ""
    kinds = dict.fromkeys([*report.difference_counts, *(each.kind for each in report.differences)])
    names = [escape(run.name) for run in report.runs[:2]] if len(report.runs) == 2 else ["ours", "theirs"]
    parts = []
    opened = " open" * (len(report.differences) <= 6)
    for kind in kinds:
        count = report.difference_counts.get(kind)
        examples = [each for each in report.differences if each.kind == kind]
        amount = "" if count is None else f" <small>{count:,} example{'s' * (count != 1)}</small>"
        shown = "".join(_difference(each, names) for each in examples)
        places = f"<details{opened}><summary>the first {len(examples)}</summary>{shown}</details>" if examples else ""
        meaning = escape(report.explanations.get(kind, "No explanation is known."))
        parts.append(f'<div class="difference"><h3>{escape(kind)}{amount}</h3><p>{meaning}</p>{places}</div>')
    note = '<p class="hint"><span class="t trained">trained tokens</span> are marked; the others are context.</p>'
    return card("Token by token", note + "".join(parts))


def _difference(each: TokenDifference, names: Sequence[str]) -> str:
    rows = "".join(
        f"<tr><th>{name}</th><td><pre>{_marked(text)}</pre></td></tr>"
        for name, text in zip(names, (each.ours, each.theirs), strict=True)
    )
    return (
        f'<h4>{escape(each.example)} <small>from token {each.position:,}</small></h4><table class="pair">{rows}</table>'
    )


def _marked(text: str) -> str:
    """Text with [[...]] as marks; a bracket that is none is text."""
    parts = re.split(r"\[\[(.*?)\]\]", text, flags=re.S)
    return "".join(
        f'<span class="t trained">{escape(part)}</span>' if index % 2 else escape(part)
        for index, part in enumerate(parts)
        if part
    )


def settings_card(runs: Sequence[Run]) -> str:
    """What differs between runs that have it; what is the same, or only one has, folded away."""
    names = sorted({name for run in runs for name in run.settings})
    if not names:
        return ""
    differ = differing(runs)
    rest = [name for name in names if name not in differ]
    single = [name for name in rest if sum(name in run.settings for run in runs) == 1]
    same = [name for name in rest if name not in single]
    body = _settings_table(differ, runs) if differ else '<p class="none">None that several runs have.</p>'
    for title, chosen in (("the same", same), ("that only one run has", single)):
        if chosen:
            summary = f"{len(chosen)} setting{'s' * (len(chosen) != 1)} {title}"
            body += f"<details><summary>{summary}</summary>{_settings_table(chosen, runs)}</details>"
    return card("Settings that differ", body)


def differing(runs: Sequence[Run]) -> list[str]:
    """Names of settings that several runs have, and not the same."""
    texts: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.settings.items():
            texts.setdefault(name, set()).add(_setting(value))
    return sorted(name for name, found in texts.items() if len(found) > 1)


def _settings_table(names: Iterable[str], runs: Sequence[Run]) -> str:
    rows = []
    for name in names:
        texts = [
            f"<code>{escape(_setting(run.settings[name]))}</code>" if name in run.settings else "–" for run in runs
        ]
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{text}</td>' for text in texts)}</tr>")
    heads = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    table = f'<table class="settings"><thead><tr><th></th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll-x">{table}</div>'


def _setting(value: Any) -> str:
    """As text that is the same for values that are: 1 and 1.0, tuples and lists."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.12g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def caveats_card(runs: Sequence[Run]) -> str:
    """The caveats by run; one that several runs share is shown once."""
    owners: dict[str, list[str]] = {}
    for run in runs:
        for caveat in run.caveats:
            owners.setdefault(caveat, []).append(run.name)
    if not owners:
        return ""
    groups: dict[tuple[str, ...], list[str]] = {}
    for caveat, names in owners.items():
        groups.setdefault(tuple(names), []).append(caveat)
    parts = "".join(
        f"<h3>{escape(', '.join(names))}</h3><ul>{''.join(f'<li>{escape(caveat)}</li>' for caveat in caveats)}</ul>"
        for names, caveats in groups.items()
    )
    return card("To know before comparing", parts, "caveats")


def facts_card(report: Report) -> str:
    facts = report.facts | {f"{run.name}, read from": run.source for run in report.runs}
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return card("Facts", f'<table class="facts">{rows}</table>')


def card(title: str, body: str, kind: str = "") -> str:
    return f'<section class="card {kind}"><h2>{title}</h2>{body}</section>'


def number(value: float | None, pattern: str = "{:.4g}") -> str:
    """A number for people; a dash where there is none."""
    if value is None:
        return "–"
    return pattern.format(value) if math.isfinite(value) else "not finite"


def last_loss(run: Run) -> float | None:
    """The loss of the last line of training."""
    return next((line["loss"] for line in reversed(run.lines) if "loss" in line), None)


def best_eval_loss(run: Run) -> float | None:
    """The lowest held-out loss that training has led to; NaN where it never was a number."""
    losses = [line["eval_loss"] for line in eval_lines(run)]
    return min((loss for loss in losses if not math.isnan(loss)), default=losses[0] if losses else None)


def first_eval_loss(run: Run) -> float | None:
    """The held-out loss of the model that a run began with."""
    return next((line["eval_loss"] for line in run.lines if "eval_loss" in line and line["step"] == 0), None)


def eval_lines(run: Run) -> list[dict[str, float]]:
    """The lines with a held-out loss, without step 0: the model that a run begins with is none of its results."""
    return [line for line in run.lines if "eval_loss" in line and line["step"] > 0]
